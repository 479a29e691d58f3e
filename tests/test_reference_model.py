"""The shipped reference model: complete, honest about its data, and better than chance."""

import importlib
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor import reference_model

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"base": reference_model.base_path(), "draft": reference_model.draft_path()}
BOTH = pytest.mark.parametrize("name", ["base", "draft"])
MAX_LOSS = {"base": 3.85, "draft": 4.8}  # nats per token on the first evaluation texts


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`reference.corpus`; the folder is no installed package, so its parent is put on the path."""
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("reference.corpus")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDERS["base"])


@BOTH
def test_every_file_of_a_model_folder_is_there(name: str) -> None:
    expected = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
    }
    assert expected <= {path.name for path in FOLDERS[name].iterdir()}


def test_the_base_is_small_enough_to_ship_and_the_draft_about_a_quarter() -> None:
    base, draft = (FOLDERS[name] / "model.safetensors" for name in ("base", "draft"))
    assert base.stat().st_size < 24e6
    assert 0.15 < draft.stat().st_size / base.stat().st_size < 0.35


def test_both_models_share_one_tokenizer() -> None:
    base, draft = (FOLDERS[name] / "tokenizer.json" for name in ("base", "draft"))
    assert base.read_bytes() == draft.read_bytes()


def test_finding_the_folders_does_not_import_torch() -> None:
    code = (
        "import sys; from compressor import reference_model as r; r.base_path(); r.draft_path();"
        "r.text_path('calibration'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_random_text_survives_the_tokenizer(tokenizer: Any) -> None:
    rng = random.Random(0)
    codes = [*range(256), *(rng.randrange(0xE000, 0x110000) for _ in range(500))]
    text = "".join(map(chr, codes)) + "\tdef f():\r\n        return  1   \n"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_the_tokenizer_puts_one_start_token_in_front(tokenizer: Any) -> None:
    ids = tokenizer("import os").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert len(tokenizer) == 4096


def test_a_chat_renders_to_the_form_it_was_trained_on(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "c"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = "<|system|>Be short.<|user|>ab<|assistant|><|eos|><|user|>c<|assistant|>"
    assert text == "<|bos|>" + expected


def test_a_chat_with_an_unknown_role_is_refused(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="Unknown role: wizard"):
        tokenizer.apply_chat_template([{"role": "wizard", "content": "x"}], tokenize=False)


@BOTH
def test_the_model_predicts_modules_it_never_saw(name: str, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDERS[name], dtype=torch.float32)
    losses = []
    for record in records(reference_model.text_path("evaluation"))[:8]:
        ids = tokenizer(record["text"], return_tensors="pt", truncation=True).input_ids
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=ids).loss))
    assert sum(losses) / len(losses) < MAX_LOSS[name] < math.log(4096)


@pytest.mark.parametrize(("name", "size"), [("calibration", 390_000), ("evaluation", 300_000)])
def test_texts_are_whole_lines_of_at_most_four_kibibytes(name: Any, size: int) -> None:
    texts = [record["text"] for record in records(reference_model.text_path(name))]
    assert sum(len(text.encode()) for text in texts) > size
    assert max(len(text.encode()) for text in texts) <= 4096


def test_held_out_modules_were_not_trained_on(corpus: ModuleType) -> None:
    listing = json.loads((FOLDERS["base"] / "training_files.json").read_text(encoding="utf-8"))
    assert set(listing["held_out"]) == set(corpus.HELD_OUT)
    assert not set(listing["held_out"]) & set(listing["training_files"])


def test_no_calibration_text_is_an_evaluation_text() -> None:
    seen = {record["text"] for record in records(reference_model.text_path("calibration"))}
    assert not seen & {
        record["text"] for record in records(reference_model.text_path("evaluation"))
    }


def test_multiple_choice_items_have_four_different_lines_of_like_length() -> None:
    items = records(reference_model.text_path("evaluation").with_name("next_line_mc.jsonl"))
    assert len(items) == 200
    for item in items:
        lengths = [len(choice.strip()) for choice in item["choices"]]
        assert len(set(item["choices"])) == 4
        assert max(lengths) - min(lengths) <= 4
        assert item["answer"] in range(4)
        assert item["context"] == item["context"].rstrip()


def test_chunks_join_to_the_text_they_were_cut_from(corpus: ModuleType) -> None:
    text = "".join(f"line {i} {'x' * (i % 90)}\n" for i in range(500))
    pieces = list(corpus.chunks(text))
    assert "".join(pieces) == text
    assert len(pieces) > 1


def test_two_training_steps_give_a_folder_that_loads(tmp_path: Path) -> None:
    options = ["--out", "out", "--work", "work", "--minutes", "1", "--shape", "smoke"]
    limits = ["--max-files", "3", "--max-steps", "2", "--batch-size", "1"]
    code = (
        "from reference import distill_draft, train;"
        f"train.main({options + limits}); distill_draft.main({options + limits})"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "draft")
    curve = json.loads((tmp_path / "out/draft/loss_curve.json").read_text(encoding="utf-8"))
    assert model.config.hidden_size == 32
    assert curve["steps"] == 2
