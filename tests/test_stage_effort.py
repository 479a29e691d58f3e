"""Effort levels of the quantize stage: order of damage, keep-best, resumption, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from compressor.errors import Interrupted
from compressor.recipe import QuantizeConfig
from compressor.stages.context import StageReport
from tests.stage_fixtures import W4, Bench, random_rows, unit_files

Models = Callable[[str], Path]
SHORT = {"learning": {"steps": 12, "batch_size": 2}}
OWN = {"recovery": {"steps": 4, "batch_size": 2, "own_rows": 4}}


def quantized(model: Path, folder: Path, **keys: Any) -> StageReport:
    return Bench(model, folder, random_rows()).run({**W4, "bits": 3, **keys})


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt_neox", "gemma2"])
def test_a_learned_block_is_never_worse_than_gptq_on_the_rows_that_judge(
    tiny_models: Models, tmp_path: Path, name: str
) -> None:
    report = quantized(tiny_models(name), tmp_path / "run", effort="high", **SHORT)
    for fact in report.facts["linears"].values():
        losses = fact["held_out"]
        kept = min(losses["learned"], losses["gptq"])
        assert kept == (losses["learned"] if fact["method"] == "learned" else losses["gptq"])
        assert losses["learned"] <= losses["start"]


def test_the_block_that_was_worse_is_not_taken(tiny_models: Models, tmp_path: Path) -> None:
    keys = {"effort": "high", "learning": {"steps": 1, "rate": 1.0, "scale_rate": 0.0}}
    report = quantized(tiny_models("llama"), tmp_path / "high", **keys)
    default = quantized(tiny_models("llama"), tmp_path / "default")
    assert {f["method"] for f in report.facts["linears"].values()} == {"gptq"}
    assert report.facts["held_out_kl"] == default.facts["held_out_kl"]


def test_fast_needs_no_rows_and_is_round_to_nearest(tiny_models: Models, tmp_path: Path) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "fast", None)
    report = bench.run({**W4, "effort": "fast"})
    assert {f["method"] for f in report.facts["linears"].values()} == {"rtn"}


def test_learning_resumes_to_the_same_bytes(tiny_models: Models, tmp_path: Path) -> None:
    stage = {**W4, "bits": 3, "effort": "high", **SHORT}
    whole = Bench(tiny_models("llama"), tmp_path / "whole", random_rows())
    whole.run(stage)
    parts = Bench(tiny_models("llama"), tmp_path / "parts", random_rows())
    with pytest.raises(Interrupted):
        parts.run(stage, stop_at=3)
    parts.run(stage)
    assert unit_files(tmp_path / "parts") == unit_files(tmp_path / "whole")


def test_maximum_effort_writes_rows_recovers_scales_and_keeps_the_codes(
    tiny_models: Models, tmp_path: Path
) -> None:
    report = quantized(tiny_models("llama"), tmp_path / "run", effort="max", **SHORT, **OWN)
    facts = report.facts["recovery"]
    assert set(facts["trained"]) == {"scale", "vector"}
    assert facts["kl_after"] <= facts["kl_before"]
    skeleton = report.state.skeleton()
    learned = tmp_path / "run" / "units" / "00-quantize" / "block-0000.safetensors"
    before, after = load_file(learned), report.state.read_block(0, skeleton).tensors
    codes = [n for n in before if n.endswith("weight_packed")]
    assert codes
    assert all(torch.equal(before[n], after[n]) for n in codes)


def test_a_mixture_is_searched_at_default_effort_and_then_learned(
    tiny_models: Models, tmp_path: Path
) -> None:
    budget = {"budget": {"average_bits": 4.5, "trials": 0}, "candidates": ["W3A16", "W4A16"]}
    stage = {**W4, **budget, "effort": "high", **SHORT}
    bench = Bench(tiny_models("llama"), tmp_path / "run", random_rows())
    report = bench.run(stage)
    assert "held_out" in next(iter(report.facts["linears"].values()))
    assert report.facts["allocation"] is not None
    again = Bench(tiny_models("llama"), tmp_path / "run", random_rows()).run(stage)
    assert again.facts == report.facts


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"effort": "high", "method": "rtn"}, "leave method away"),
        ({"learning": {"steps": 3}}, "effort high and max only"),
        ({"effort": "high", "recovery": {"steps": 3}}, "effort max only"),
    ],
)
def test_settings_without_effect_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        QuantizeConfig(kind="quantize", **keys)
