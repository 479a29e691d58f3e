"""One budget for architecture and bits: what is chosen, that it keeps to the budget, resuming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.errors import Interrupted, RecipeError
from compressor.modeling.state import ModelState
from compressor.recipe import PruneTarget
from compressor.stages.costs import stored_tensors
from tests.fixtures_models import build
from tests.fixtures_stages import Bench, export, logits, units
from tests.test_stage_prune import TOKENS, with_idle_block

Models = Callable[[str], Path]


def target(**keys: Any) -> PruneTarget:
    return PruneTarget(profile="none", mlp=[0.75], candidates=["W4A16", "W8A16"], **keys)


def deep(tmp_path: Path) -> Bench:
    model = with_idle_block(build("llama", tmp_path / "deep", num_hidden_layers=3), tmp_path / "m")
    return Bench(model, tmp_path / "run")


def parameters(state: ModelState) -> int:
    return sum(count for count, _ in stored_tensors(state))


def test_a_target_of_parameters_drops_the_idle_block(tmp_path: Path) -> None:
    bench = deep(tmp_path)
    report = bench.apply(bench.original, "prune", target=target(params=0.8))
    assert report.facts["chosen"] == "keep2"
    assert report.facts["held_out_kl"] < 1e-6
    assert report.facts["notes"][-1].startswith("keep2 of ")
    assert parameters(report.state) <= 0.8 * parameters(bench.original)
    torch.testing.assert_close(logits(report.state, TOKENS), logits(bench.original, TOKENS))


def test_the_quantize_stage_behind_it_keeps_to_the_same_size(tmp_path: Path) -> None:
    bench = deep(tmp_path)
    size = "236KB"
    report = bench.apply(bench.original, "prune", target=target(size=size))
    budget = {"size": size, "profile": "none", "trials": 0}
    keys = {"candidates": ["W4A16", "W8A16"], "budget": budget}
    quantized = bench.apply(report.state, "quantize", **keys)
    picked = quantized.facts["allocation"]
    limit, spent = picked["budget_bytes"], picked["bytes"][quantized.facts["kept"]]
    assert spent <= limit < 236_000
    assert len(quantized.state.blocks) == 2  # the idle block made room for bits
    assert report.facts["held_out_kl"] < report.facts["bits_alone_kl"]


def test_with_room_enough_nothing_is_pruned(tiny_models: Models, tmp_path: Path) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    report = bench.apply(bench.original, "prune", target=target(size="10MB"))
    assert report.state.blocks == bench.original.blocks
    assert any("nothing is pruned" in note for note in report.facts["notes"])


def test_every_measured_shape_keeps_to_the_target(tiny_models: Models, tmp_path: Path) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    report = bench.apply(bench.original, "prune", target=target(params=0.9, kv_groups=[0.5]))
    rows = report.facts["shapes"]
    assert all(row["parameters"] <= 0.9 * parameters(bench.original) for row in rows)
    best = min(rows, key=lambda row: row["measured_kl"])
    assert report.facts["chosen"] == best["shape"]
    assert parameters(report.state) == best["parameters"]
    export(report.state, tmp_path / "out")


def test_a_stopped_search_goes_on_to_the_same_shape_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, halved = deep(tmp_path / "a"), deep(tmp_path / "b")
    first = whole.apply(whole.original, "prune", target=target(params=0.7))
    with pytest.raises(Interrupted):
        halved.apply(halved.original, "prune", target=target(params=0.7), stop_after=4, index=1)
    halved.apply(halved.original, "prune", target=target(params=0.7), index=1)
    again = halved.apply(halved.original, "prune", target=target(params=0.7), index=1)
    assert again.facts == first.facts
    assert units(tmp_path / "a" / "run") == units(tmp_path / "b" / "run")
    assert torch.equal(logits(again.state, TOKENS), logits(first.state, TOKENS))


def test_a_target_out_of_reach_is_refused(tiny_models: Models, tmp_path: Path) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    with pytest.raises(RecipeError, match="no shape") as caught:
        bench.apply(bench.original, "prune", target=target(params=1000))
    assert caught.value.code == "NU12"


@pytest.mark.parametrize("keys", [{}, {"decode_ms": 3.0}, {"size": "1GB", "device": "h100"}])
def test_half_a_target_is_no_target(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"give at least one|belong together"):
        target(**keys)
