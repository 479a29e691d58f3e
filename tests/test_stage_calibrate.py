"""Calibration: the rows of the run, statistics of every input, and text that must not change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compressor.errors import CheckpointError, Interrupted, NumericError, RecipeError
from tests.fixtures_models import SENTENCES, build
from tests.stage_fixtures import Bench, unit_files

Models = Callable[[str], Path]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.jsonl", "")


def write_text(path: Path, more: str) -> Path:
    lines = [more + " ".join(SENTENCES[i % 5 :] + SENTENCES[: i % 5]) + f" {i}" for i in range(12)]
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return path


def stage(text: Path) -> dict[str, Any]:
    return {"kind": "calibrate", "data": {"source": str(text), "num_samples": 8, "seq_len": 32}}


def test_rows_reach_the_later_stages_and_facts_describe_them(
    tiny_models: Models, text: Path, tmp_path: Path
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    report = bench.run(stage(text))
    assert report.tokens is not None
    assert list(report.tokens.tokens.shape) == report.facts["rows"] == [8, 32]
    assert report.facts["digest"] == report.tokens.digest
    assert report.facts["dead_inputs"] == 0
    assert report.facts["few_tokens"] == []
    assert report.state.blocks == bench.original.blocks


@torch.no_grad()
def test_statistics_are_the_mean_squares_of_what_linears_get(
    tiny_models: Models, text: Path, tmp_path: Path
) -> None:
    report = Bench(tiny_models("llama"), tmp_path / "run").run(stage(text))
    assert report.tokens is not None
    model = AutoModelForCausalLM.from_pretrained(tiny_models("llama"), dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        model.model.layers[1].get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0])
        )
    model(report.tokens.tokens)
    stored = load_file(tmp_path / "run" / "units" / "00-calibrate" / "block-0001.safetensors")
    assert set(stored) == set(seen)
    for name, x in seen.items():
        torch.testing.assert_close(stored[name], x.square().mean((0, 1)), rtol=1e-4, atol=1e-7)


def test_only_the_first_rows_are_looked_at_when_there_are_many(
    tiny_models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.stages.calibrate.LOOK_TOKENS", 70)
    report = Bench(tiny_models("qwen3_moe"), tmp_path / "run").run(stage(text))
    assert report.tokens is not None
    assert report.tokens.tokens.shape == (8, 32)
    assert report.facts["tokens_looked_at"] == 2 * 32


def test_tokens_of_experts_are_counted(tiny_models: Models, text: Path, tmp_path: Path) -> None:
    bench = Bench(tiny_models("qwen3_moe"), tmp_path / "run")
    bench.run(stage(text))
    journal = (tmp_path / "run" / "journal.jsonl").read_text()
    records = [json.loads(line) for line in journal.splitlines()]
    tokens = [r["meta"]["tokens"] for r in records if "tokens" in r.get("meta", {})]
    assert len(tokens) == 2
    for counts in tokens:
        assert sum(c for n, c in counts.items() if n.endswith("gate_proj")) == 2 * 8 * 32


def test_a_stopped_calibration_ends_with_the_same_bytes(
    tiny_models: Models, text: Path, tmp_path: Path
) -> None:
    Bench(tiny_models("gpt2"), tmp_path / "whole").run(stage(text))
    bench = Bench(tiny_models("gpt2"), tmp_path / "halves")
    with pytest.raises(Interrupted):
        bench.run(stage(text), stop_at=1)
    bench.run(stage(text))
    assert unit_files(tmp_path / "halves") == unit_files(tmp_path / "whole")


def test_a_text_that_changed_since_the_run_began_is_refused(
    tiny_models: Models, text: Path, tmp_path: Path
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    with pytest.raises(Interrupted):
        bench.run(stage(text), stop_at=1)
    write_text(text, "changed ")
    with pytest.raises(RecipeError) as caught:
        bench.run(stage(text))
    assert caught.value.code == "KI13"


def test_a_model_that_leaves_the_finite_numbers_is_refused_with_its_block(
    text: Path, tmp_path: Path
) -> None:
    path = build("llama", tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e30
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e30
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericError, match=r"model\.layers\.1") as caught:
        Bench(path, tmp_path / "run").run(stage(text))
    assert caught.value.code == "NU01"


def test_dead_inputs_are_counted(text: Path, tmp_path: Path) -> None:
    path = build("llama", tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][:5] = 0.0
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert Bench(path, tmp_path / "run").run(stage(text)).facts["dead_inputs"] == 5


def test_a_model_without_a_tokenizer_cannot_be_calibrated(text: Path, tmp_path: Path) -> None:
    path = build("llama", tmp_path / "model")
    for file in path.glob("*token*"):
        file.unlink()
    with pytest.raises(CheckpointError) as caught:
        Bench(path, tmp_path / "run").run(stage(text))
    assert caught.value.code == "CK37"
