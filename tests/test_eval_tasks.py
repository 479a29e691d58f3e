"""Tasks through the real harness, on a tiny model and a tokenizer made on the spot."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compressor.errors import DataError, UnsupportedError, UsageError
from compressor_eval.tasks import TaskResult, compare_tasks, run_tasks

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tok = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, []))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    tok.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def items(tmp_path: Path) -> Path:
    rows = [
        {"id": i, "context": f"The {w} ran.", "choices": [f"{w} {c}." for c in "abcd"],
         "answer": i % 4}
        for i, w in enumerate(["dog", "cat", "bird", "fish", "horse", "cow"])
    ]  # fmt: skip
    path = tmp_path / "animals.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    """ln p(continuation | BOS context), from one full run."""
    ids = [0, *tokenizer(context + continuation, add_special_tokens=False).input_ids]
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
    start = 1 + len(tokenizer(context, add_special_tokens=False).input_ids)
    return sum(float(log_p[t - 1, ids[t]]) for t in range(start, len(ids)))


def test_a_file_of_items_is_scored_like_the_oracle(model, tokenizer, items) -> None:
    result = run_tasks(model, tokenizer, [f"mc:{items}"])["mc_animals"]
    for line, correct in zip(items.read_text().splitlines(), result.correct, strict=True):
        item = json.loads(line)
        scores = [
            log_likelihood(model, tokenizer, item["context"], " " + c) for c in item["choices"]
        ]
        assert correct == (scores.index(max(scores)) == item["answer"])
    assert result.accuracy == pytest.approx(result.metrics["acc"])


def test_the_limit_takes_the_first_items(model, tokenizer, items) -> None:
    result = run_tasks(model, tokenizer, [f"mc:{items}"], limit=2)["mc_animals"]
    assert result.doc_ids == [0, 1]


def test_nothing_is_said_about_git_outside_of_a_repository(
    model, tokenizer, items, tmp_path, monkeypatch, capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    run_tasks(model, tokenizer, [f"mc:{items}"], limit=1)
    assert "not a git repository" not in capfd.readouterr().err


def test_the_shipped_task_finds_its_data(model, tokenizer) -> None:
    result = run_tasks(model, tokenizer, ["next_line_mc"], limit=3)["next_line_mc"]
    assert len(result.correct) == 3
    assert result.metric == "acc"


def test_rolling_likelihood_predicts_every_token_once(model, tokenizer) -> None:
    from lm_eval.api.instance import Instance

    from compressor_eval.harness import CompressorLM

    request = Instance("loglikelihood_rolling", {}, ("hello world",), 0)
    (value,) = CompressorLM(model, tokenizer).loglikelihood_rolling([request])
    assert value == pytest.approx(log_likelihood(model, tokenizer, "", "hello world"), rel=1e-5)


def test_generation_is_greedy_and_stops_before_the_stop_string(model, tokenizer) -> None:
    from compressor_eval.harness import CompressorLM

    lm = CompressorLM(model, tokenizer)
    long = lm._generate("abc", {"max_gen_toks": 12})
    ids = lm.tok_encode("abc")
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert long == tokenizer.decode(ids[4:])
    stop = long[2]
    assert lm._generate("abc", {"max_gen_toks": 12, "until": [stop]}) == long.split(stop)[0]


def test_sampling_is_refused(model, tokenizer) -> None:
    from compressor_eval.harness import CompressorLM

    with pytest.raises(UnsupportedError, match="sampling"):
        CompressorLM(model, tokenizer)._generate("a", {"do_sample": True})


@pytest.mark.parametrize(
    ("text", "code"),
    [("", "CA02"), ("{", "CA05"), ('{"context": "a", "choices": ["b"], "answer": 1}', "CA06")],
)
def test_malformed_items_are_refused_with_their_place(
    model, tokenizer, tmp_path, text, code
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        run_tasks(model, tokenizer, [f"mc:{path}"])
    assert error.value.code == code
    assert "bad.jsonl" in str(error.value)


def test_a_missing_file_is_named(model, tokenizer, tmp_path) -> None:
    with pytest.raises(DataError, match="CA01"):
        run_tasks(model, tokenizer, [f"mc:{tmp_path / 'none.jsonl'}"])


def test_an_unknown_task_is_named(model, tokenizer, monkeypatch) -> None:
    import lm_eval.tasks

    manager = type("Manager", (), {"__init__": lambda self, **_: None, "all_tasks": []})
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    with pytest.raises(UsageError, match="no_such_task"):
        run_tasks(model, tokenizer, ["no_such_task"])


def test_without_lm_eval_the_error_says_what_to_install(model, tokenizer, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UnsupportedError, match=r"compressor\[eval\]"):
        run_tasks(model, tokenizer, ["next_line_mc"])


def outcomes(name: str, correct: list[int]) -> dict[str, TaskResult]:
    flags = [bool(c) for c in correct]
    return {name: TaskResult(name, "acc", list(range(len(flags))), flags, {})}


def test_flips_count_what_equal_accuracies_hide() -> None:
    result = compare_tasks(outcomes("t", [1, 1, 0, 0]), outcomes("t", [0, 1, 1, 0]))["t"]
    assert (result.lost, result.won, result.flips) == (1, 1, 0.5)
    assert result.delta == 0.0
    assert result.p_value == 1.0
    assert result.recovery == 1.0


def test_several_tasks_are_pooled_and_adjusted() -> None:
    base = outcomes("a", [1] * 8) | outcomes("b", [1] * 8)
    model = outcomes("a", [0] * 8) | outcomes("b", [1] * 8)
    result = compare_tasks(base, model)
    assert result["a"].p_value == pytest.approx(2 * 0.5**8)
    assert result["a"].p_holm == pytest.approx(4 * 0.5**8)
    assert result["pooled"].lost == 8
    assert result["pooled"].num_items == 16
    assert math.isclose(result["pooled"].delta, -0.5)


def test_runs_over_different_items_are_not_compared() -> None:
    with pytest.raises(UsageError, match="same items"):
        compare_tasks(outcomes("a", [1, 1]), outcomes("a", [1]))
