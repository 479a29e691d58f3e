"""Mixed precision: budgets in real bytes, legal formats, and scores that mean something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.algorithms.allocation import Choice
from compressor.artifact.formats import LayerFormat
from compressor.errors import CompressError, RecipeError
from compressor.modeling.state import ModelState
from compressor.recipe import QuantizeConfig
from compressor.run_dir import RunDir
from compressor.stages.budget import allocate_together
from compressor.stages.candidates import legal_candidates
from compressor.stages.context import StageReport
from compressor.stages.selection import select, uniform_formats
from compressor.stages.sensitivity import UnitOption, fisher_scores, swap_in_scores
from tests.fixtures_models import build
from tests.stage_fixtures import PACK, W4, Bench, random_rows

Models = Callable[[str], Path]
AMPLIFIED = "model.layers.0.mlp.gate_proj+up_proj"
SYMMETRIC = ["W2A16", "W3A16", "W4A16", "W8A16", "BF16"]


def mixed(model: Path, folder: Path, **keys: Any) -> tuple[Bench, StageReport]:
    bench = Bench(model, folder, random_rows(6, 16))
    return bench, bench.run({**W4, "candidates": SYMMETRIC, "method": "rtn", **keys})


def stored(state: ModelState) -> tuple[int, int, dict[str, LayerFormat]]:
    """Bytes and number of weights of all quantizable linears as stored, and their formats."""
    skeleton, nbytes, weights, formats = state.skeleton(), 0, 0, {}
    for position in range(len(state.blocks)):
        block = state.read_block(position, skeleton)
        for name, tensor in block.tensors.items():
            if "_proj.weight" in name:
                nbytes += tensor.nbytes
            if name.endswith("_proj.weight"):
                weights += tensor.numel()
        for name, fmt in block.formats.items():
            weights += int(block.tensors[f"{name}.weight_shape"].prod())
            formats[f"{position}.{name}"] = fmt
    return nbytes, weights, formats


@pytest.mark.parametrize(("name", "bits"), [("llama", 3.3), ("llama", 12.0), ("qwen3_moe", 4.0)])
def test_the_budget_is_never_exceeded_in_real_bytes(
    tiny_models: Models, tmp_path: Path, name: str, bits: float
) -> None:
    _, report = mixed(
        tiny_models(name), tmp_path / "run", budget={"average_bits": bits},
        scores="output_fisher",
    )  # fmt: skip
    allocation = report.facts["allocation"]
    nbytes, weights, _ = stored(report.state)
    assert nbytes <= weights * bits / 8
    assert nbytes == allocation["bytes"][report.facts["kept"]]
    assert allocation["num_weights"] == weights
    assert allocation["bytes"]["mixed"] <= allocation["budget_bytes"]
    assert allocation["bytes"]["mixed"] >= 0.8 * allocation["budget_bytes"]


def test_candidates_may_have_groups_of_their_own(tiny_models: Models, tmp_path: Path) -> None:
    _, report = mixed(
        tiny_models("llama"), tmp_path / "run", budget={"average_bits": 6.0},
        scores="output_fisher", candidates=["W3A16@16", "W4A16@channel"], group_size=32,
    )  # fmt: skip
    nbytes, weights, formats = stored(report.state)
    assert nbytes <= weights * 6.0 / 8
    assert {(f.bits, f.group_size) for f in formats.values()} <= {(3, 16), (4, -1)}


def test_a_size_budget_covers_all_weight_files(tiny_models: Models, tmp_path: Path) -> None:
    size = 205 * 1024
    bench, _ = mixed(tiny_models("llama"), tmp_path / "run", budget={"size": "205KiB"})
    facts = bench.run(PACK).facts
    assert 0.9 * size < facts["weight_bytes"] <= size


def test_a_size_smaller_than_what_stays_dense_is_refused(
    tiny_models: Models, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="stays dense") as caught:
        mixed(tiny_models("llama"), tmp_path / "run", budget={"size": "100KB"})
    assert caught.value.code == "NU12"


def test_a_budget_below_the_smallest_candidate_is_refused(
    tiny_models: Models, tmp_path: Path
) -> None:
    with pytest.raises(CompressError) as caught:
        mixed(tiny_models("llama"), tmp_path / "run", budget={"average_bits": 2.0})
    assert caught.value.code == "NU12"


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_fused_linears_share_a_format(tiny_models: Models, tmp_path: Path, name: str) -> None:
    budget = {"average_bits": 4.4, "trials": 0}
    _, report = mixed(tiny_models(name), tmp_path / "run", budget=budget)
    _, _, formats = stored(report.state)
    assert report.facts["kept"] == "mixed"
    assert len({f.bits for f in formats.values()}) > 1
    for block in ("0", "1"):
        for leaves in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            names = [n for n in formats if n.startswith(f"{block}.") and n.endswith(leaves)]
            assert len({formats[n] for n in names}) <= 1
        experts = {f for n, f in formats.items() if f"{block}.mlp.experts" in n}
        assert len(experts) <= 1


@pytest.mark.parametrize(
    ("engines", "legal"),
    [
        (["ours"], {"W2A16", "W3A16", "W4A16", "W8A16", "W4A16_ASYM", "W2A16_ASYM", "BF16"}),
        (["vllm"], {"W2A16", "W3A16", "W4A16", "W8A16", "W4A16_ASYM", "BF16"}),
        (["sglang"], {"W4A16", "W8A16", "W4A16_ASYM", "BF16"}),
        (["ours", "vllm", "sglang"], {"W4A16", "W8A16", "W4A16_ASYM", "BF16"}),
    ],
)
def test_only_formats_that_every_engine_loads_are_candidates(
    engines: list[str], legal: set[str]
) -> None:
    labels = [*SYMMETRIC, "W4A16_ASYM", "W2A16_ASYM"]
    config = QuantizeConfig(kind="quantize", candidates=labels, engines=engines)
    assert set(legal_candidates(config)) == legal


def test_candidates_that_are_the_same_format_count_once() -> None:
    config = QuantizeConfig(kind="quantize", group_size=32, candidates=["W3A16", "W3A16@32"])
    assert legal_candidates(config) == ["W3A16"]


def test_no_legal_candidate_is_refused() -> None:
    config = QuantizeConfig(kind="quantize", candidates=["W2A16", "BF16"], engines=["sglang"])
    with pytest.raises(RecipeError, match="no candidate"):
        legal_candidates(config)


def test_candidates_that_an_engine_cannot_load_are_left_out_and_named(
    tiny_models: Models, tmp_path: Path
) -> None:
    _, report = mixed(
        tiny_models("llama"), tmp_path / "run", budget={"average_bits": 6.0}, engines=["sglang"]
    )
    assert set(report.facts["allocation"]["labels"].values()) <= {"W4A16", "W8A16", "BF16"}
    assert "W2A16 is no candidate: not every engine loads it" in report.facts["notes"]


def test_the_mixture_is_measured_against_the_best_uniform_format(
    tiny_models: Models, tmp_path: Path
) -> None:
    _, report = mixed(
        tiny_models("llama"), tmp_path / "run", budget={"average_bits": 5.4}, method="gptq"
    )
    facts = report.facts
    measured = facts["measured"]
    assert set(measured) >= {"mixed", "uniform"}
    assert facts["held_out_kl"] == measured[facts["kept"]]
    assert facts["held_out_kl"] <= min(measured["mixed"], measured["uniform"])
    additive = facts["allocation"]["additive"]
    assert additive["mixed"] <= additive["uniform"]


def test_the_front_gets_better_with_more_bytes(tiny_models: Models, tmp_path: Path) -> None:
    _, report = mixed(tiny_models("llama"), tmp_path / "run", budget={"average_bits": 5.0})
    front = report.facts["allocation"]["pareto"]
    assert [p["bytes"] for p in front] == sorted(p["bytes"] for p in front)
    assert [p["kl"] for p in front] == sorted((p["kl"] for p in front), reverse=True)


def scores_of(
    bench: Bench, kind: Callable[..., Any], bits: list[int]
) -> dict[str, dict[str, float]]:
    """Scores of every unit in symmetric formats of some widths."""
    skeleton = bench.state.skeleton()
    options = []
    for width in bits:
        config = QuantizeConfig(kind="quantize", bits=width, group_size=32, method="rtn")
        selection = select(config, skeleton)
        formats = uniform_formats(config, selection, bench.state)
        units: dict[str, list[Any]] = {}
        for target in selection.targets:
            units.setdefault(target.unit, []).append(target)
        options += [
            UnitOption(u, str(width), ts[0].position, {t.linear: formats[t.name] for t in ts})
            for u, ts in units.items()
        ]
    with RunDir.open(bench.folder, identity={"test": "1"}) as folder:
        found: dict[str, dict[str, float]] = kind(
            config, bench.context(folder, "quantize"), options
        )
    return found


@pytest.mark.parametrize("name", ["gpt_neox", "qwen3_moe"])
@pytest.mark.parametrize("kind", [swap_in_scores, fisher_scores])
def test_scores_are_positive_and_fall_with_more_bits(
    tiny_models: Models, tmp_path: Path, name: str, kind: Callable[..., Any]
) -> None:
    bench = Bench(tiny_models(name), tmp_path / "run", random_rows(5, 16))
    scores = scores_of(bench, kind, [2, 4, 8])
    assert all(s >= 0 for row in scores.values() for s in row.values())
    totals = {b: sum(row[b] for row in scores.values()) for b in ("2", "4", "8")}
    assert totals["2"] > 4 * totals["4"] > 16 * totals["8"]


def test_a_swap_in_score_is_the_kl_of_the_model_with_that_swap(
    tiny_models: Models, tmp_path: Path
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run", random_rows(5, 16))
    scores = scores_of(bench, swap_in_scores, [3])
    unit = "model.layers.0.mlp.down_proj"
    only = Bench(tiny_models("llama"), tmp_path / "only", random_rows(5, 16))
    report = only.run({**W4, "bits": 3, "method": "rtn", "targets": [unit]})
    logp = [_logp(bench, state) for state in (bench.original, report.state)]
    kl = float((logp[0].exp() * (logp[0] - logp[1])).sum(-1).mean())
    assert scores[unit]["3"] == pytest.approx(kl, rel=1e-3)


def _logp(bench: Bench, state: ModelState) -> torch.Tensor:
    """Log-probabilities on the calibration rows (4 of 5: the last one measures)."""
    from compressor.modeling.walk import Walk, WalkOptions

    assert bench.tokens is not None
    walk = Walk(state, bench.tokens, WalkOptions(bench.folder))
    stream = walk.open_stream("kl")
    for position in range(walk.num_blocks):
        walk.advance(stream, walk.load(position), position)
    return walk.logits(stream, slice(0, 4)).double().log_softmax(-1)


@pytest.fixture(scope="module")
def amplified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with two fused layers whose outliers, one in each group, make every grid coarse."""
    path = build("llama", tmp_path_factory.mktemp("amplified") / "model")
    tensors = load_file(path / "model.safetensors")
    for leaf in ("gate_proj", "up_proj"):
        tensors[f"model.layers.0.mlp.{leaf}.weight"][:, ::32] *= 6
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("kind", [swap_in_scores, fisher_scores])
def test_an_amplified_layer_is_ranked_first(
    amplified: Path, tmp_path: Path, kind: Callable[..., Any]
) -> None:
    scores = scores_of(Bench(amplified, tmp_path / "run", random_rows(6, 16)), kind, [3])
    worst = max(scores, key=lambda unit: scores[unit]["3"])
    assert worst == AMPLIFIED


def test_the_most_sensitive_units_are_protected(amplified: Path, tmp_path: Path) -> None:
    bench = Bench(amplified, tmp_path / "run", random_rows(6, 16))
    report = bench.run({**W4, "protect_auto": 0.125})
    names = "model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj"
    assert f"protected as the most sensitive: {names}" in report.facts["notes"]
    assert "0.mlp.up_proj" not in stored(report.state)[2]
    assert len(stored(report.state)[2]) == 12


def test_with_a_budget_the_most_sensitive_units_get_the_widest_candidate(
    amplified: Path, tmp_path: Path
) -> None:
    _, report = mixed(
        amplified, tmp_path / "run", budget={"average_bits": 6.5}, protect_auto=0.125,
        candidates=["W2A16", "W4A16", "W8A16"],
    )  # fmt: skip
    labels = report.facts["allocation"]["labels"]
    assert labels[AMPLIFIED] == "W8A16"
    assert set(labels.values()) > {"W8A16"}


def test_fisher_scores_are_fitted_to_measured_kl(tiny_models: Models, tmp_path: Path) -> None:
    _, report = mixed(
        tiny_models("llama"), tmp_path / "run", budget={"average_bits": 5.0},
        scores="output_fisher",
    )  # fmt: skip
    allocation = report.facts["allocation"]
    assert "fitted to the swap-in KL of 2 units" in allocation["method"]
    bench = Bench(tiny_models("llama"), tmp_path / "swap", random_rows(6, 16))
    swap = scores_of(bench, swap_in_scores, [3])
    total = sum(row["W3A16"] for row in allocation["scores"].values())
    assert total == pytest.approx(sum(row["3"] for row in swap.values()), rel=1.0)


def test_scores_do_not_depend_on_the_other_options(tiny_models: Models, tmp_path: Path) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "a", random_rows(4, 16))
    together = scores_of(bench, swap_in_scores, [3, 4])
    bench = Bench(tiny_models("llama"), tmp_path / "b", random_rows(4, 16))
    alone = scores_of(bench, swap_in_scores, [4])
    for unit, row in alone.items():
        assert row["4"] == pytest.approx(together[unit]["4"], rel=1e-4, abs=1e-9)


def test_tied_units_share_one_format_and_stay_within_the_budget() -> None:
    choices = [
        Choice(unit, option, cost, score)
        for unit in ("a.experts", "b.experts", "c")
        for option, cost, score in (("W2A16", 2, 9.0), ("W4A16", 4, 1.0))
    ]
    tied = {"a.experts", "b.experts"}
    assert allocate_together(choices, 10, tied=tied) == {
        "c": "W2A16",
        "a.experts": "W4A16",
        "b.experts": "W4A16",
    }
    assert len({allocate_together(choices, n, tied=tied)["a.experts"] for n in (6, 9)}) == 1
