"""Experts: what stands in for tokens they did not get, who is named, and who stays dense."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.modeling.block import inputs_of
from compressor.modeling.checkpoint import open_checkpoint
from compressor.modeling.families import EXPERT, routers, shared_experts
from compressor.modeling.skeleton import Skeleton, build_skeleton
from compressor.modeling.state import ModelState
from compressor.modeling.walk import Walk, WalkOptions
from compressor.recipe import QuantizeConfig
from compressor.stages.expert_statistics import (
    LAYER,
    NONE,
    OWN,
    SHRUNK,
    expert_notes,
    kind_of,
    layer_input,
)
from compressor.stages.group_sums import GroupStatistics
from compressor.stages.selection import select
from compressor.stages.statistics import (
    BlockStatistics,
    Collection,
    Streams,
    calibration_rows,
)
from tests import fixtures_models
from tests.fixtures_models import build
from tests.stage_fixtures import W4, Bench, random_rows

Models = Callable[[str], Path]
SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "moe_intermediate_size": 64, "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN2_MOE = SIZES | {"num_experts": 4, "shared_expert_intermediate_size": 64}
DEEPSEEK = SIZES | {
    "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2,
    "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip
FAMILIES = {"qwen2_moe": QWEN2_MOE, "deepseek_v3": DEEPSEEK}


def collected(model: Path, folder: Path, rows: tuple[int, int]) -> tuple[Any, Walk, Streams]:
    """Statistics of the first block by head, with the walk and streams they came from."""
    state = ModelState.of_checkpoint(open_checkpoint(model))
    walk = Walk(state, random_rows(*rows), WalkOptions(folder))
    streams = Streams(walk.open_stream("r"), walk.open_stream("c"))
    every = BlockStatistics(walk, streams, calibration_rows(walk), Collection(True, True))
    block = walk.load(0)
    groups = every.groups(0, walk.load(0), block, set(block.linears))
    return {group[0]: found for group, found in groups}, walk, streams


def of_experts(found: dict[str, GroupStatistics], kind: str) -> dict[str, GroupStatistics]:
    return {n: s for n, s in found.items() if EXPERT.match(n) and s.source == kind}


def test_the_case_follows_from_tokens_and_inputs() -> None:
    cases = [(0, NONE), (1, LAYER), (15, LAYER), (16, SHRUNK), (255, SHRUNK), (256, OWN)]
    assert [(n, kind_of(n, 64)) for n, _ in cases] == cases


@torch.no_grad()
def test_experts_with_few_tokens_get_the_hessian_of_their_whole_layer(
    tiny_models: Models, tmp_path: Path
) -> None:
    found, walk, streams = collected(tiny_models("qwen3_moe"), tmp_path, (4, 8))
    block, rows = walk.load(0), calibration_rows(walk)
    kwargs = walk.kwargs(rows, 0)
    x = layer_input(block, "mlp.experts", streams.compressed.read(rows), kwargs)
    few = of_experts(found, LAYER)
    assert {"gate_proj", "down_proj"} <= {n.rpartition(".")[2] for n in few}
    for name, statistics in few.items():
        expert = block.module.get_submodule(name.rpartition(".")[0])
        inner = expert.act(expert.gate_proj(x)) * expert.up_proj(x)  # type: ignore[operator]
        seen = inner if "down" in name else x
        torch.testing.assert_close(statistics.hessian, seen.T @ seen / len(seen))
        assert 0 < statistics.num_tokens < 16


def test_hessians_of_some_tokens_are_pulled_towards_their_diagonal(
    tiny_models: Models, tmp_path: Path
) -> None:
    found, walk, streams = collected(tiny_models("qwen3_moe"), tmp_path, (9, 24))
    block, rows = walk.load(0), calibration_rows(walk)
    name, statistics = next(iter(of_experts(found, SHRUNK).items()))
    kwargs = walk.kwargs(rows, 0)
    x = inputs_of(block, [name], streams.compressed.read(rows), kwargs)[name]
    plain, share = x.T @ x / len(x), 64 / (64 + len(x))
    wanted = (1 - share) * plain + share * plain.diagonal().diag()
    torch.testing.assert_close(statistics.hessian, wanted)
    assert statistics.cross is None


def test_an_expert_without_tokens_is_rounded_as_if_inputs_were_alike(
    tiny_models: Models, tmp_path: Path
) -> None:
    found, _, _ = collected(tiny_models("qwen3_moe"), tmp_path, (2, 1))
    none = of_experts(found, NONE)
    assert none
    for statistics in none.values():
        assert torch.equal(statistics.hessian, torch.eye(64))
        assert statistics.num_tokens == 0


def test_quantizing_names_every_expert_with_few_tokens(tiny_models: Models, tmp_path: Path) -> None:
    bench = Bench(tiny_models("qwen3_moe"), tmp_path / "run", random_rows(3, 3))
    facts = bench.run(W4).facts
    notes = [n for n in facts["notes"] if "mlp.experts: " in n]
    poor = [n for n, f in facts["linears"].items() if EXPERT.match(n) and f["statistics"] != OWN]
    assert poor
    for name in poor:
        experts, _, rest = name.partition(".experts.")
        count = facts["linears"][name]["num_tokens"]
        told = f" {rest.partition('.')[0]} ({count} tokens)"
        assert any(n.startswith(f"{experts}.experts:") and told in n for n in notes), name


def test_notes_tell_what_was_done_one_line_for_each_layer_and_case() -> None:
    facts = {
        f"m.0.mlp.experts.{i}.{leaf}": {"num_tokens": n, "statistics": kind}
        for i, n, kind in ((0, 900, OWN), (1, 0, NONE), (10, 3, LAYER), (2, 5, LAYER))
        for leaf in ("gate_proj", "up_proj", "down_proj")
    }
    first, second = expert_notes(facts)
    assert "1 (0 tokens)" in first
    assert second.endswith("used instead: 2 (5 tokens), 10 (3 tokens)")


@pytest.fixture(scope="module")
def skeletons() -> dict[str, Skeleton]:
    return {n: build_skeleton({"model_type": n, **keys}) for n, keys in FAMILIES.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_routers_and_shared_experts_stay_dense_by_default(
    name: str, skeletons: dict[str, Skeleton]
) -> None:
    selection = select(QuantizeConfig(kind="quantize"), skeletons[name])
    targets = {t.linear for t in selection.targets}
    assert not routers(targets) | shared_experts(targets)
    assert any(map(EXPERT.match, targets))
    assert any("shared experts stay dense" in note for note in selection.notes)


@pytest.mark.parametrize("name", FAMILIES)
def test_shared_experts_can_be_quantized_and_routers_cannot(
    name: str, skeletons: dict[str, Skeleton]
) -> None:
    config = QuantizeConfig(kind="quantize", protect_shared_experts=False)
    targets = {t.linear for t in select(config, skeletons[name]).targets}
    assert len(shared_experts(targets)) == 3
    assert not routers(targets)


def test_only_blocks_with_experts_have_routers() -> None:
    assert routers(["mlp.gate", "mlp.up"]) == set()
    moe = ["mlp.gate", "mlp.experts.0.gate_proj", "mlp.shared_expert_gate", "block.router.layer"]
    assert routers(moe) == {moe[0], moe[2], moe[3]}
    assert shared_experts(["mlp.shared_experts.up_proj", "a.shared_mlp.b", "mlp.up_proj"]) == {
        "mlp.shared_experts.up_proj",
        "a.shared_mlp.b",
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_with_shared_experts_is_packed_and_verified(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fixtures_models._CONFIGS, name, (name, FAMILIES[name]))
    bench = Bench(build(name, tmp_path / "model"), tmp_path / "run", random_rows())
    for stage in (W4, {"kind": "pack", "kernels_archs": []}, {"kind": "verify"}):
        bench.run(stage)
    formats = [ref.meta["formats"] for ref in bench.state.blocks]
    assert any("mlp.experts.0.up_proj" in f for f in formats)
    assert not any(shared_experts(f) for f in formats)
