"""A gate that repairs: more bits for the units that harm most, until it passes or nothing helps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressor.errors import GateError, RecipeError
from compressor.recipe import Recipe
from compressor.stages.repair import wanted_share
from tests.fixtures_pipeline import execute, recipe, stages

Models = Callable[[str], Path]


def gated(model: Path, folder: Path, max_kl: float, **quantize: Any) -> Recipe:
    """Two bits, round-to-nearest, and a gate that repairs."""
    made = stages(folder, **{"scheme": "W2A16", "method": "rtn", **quantize})
    made[-1]["gate"] = {"max_kl": max_kl, "on_fail": "repair", "repair_rounds": 4}
    return recipe(model, folder, stages=made)


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_bytes())
    return found


@pytest.fixture(scope="module")
def plain_kl(tiny_models: Models, tmp_path_factory: pytest.TempPathFactory) -> float:
    """KL of the 2-bit model without a gate."""
    folder = tmp_path_factory.mktemp("plain")
    made = stages(folder, scheme="W2A16", method="rtn")
    output = execute(recipe(tiny_models("llama"), folder, stages=made)).output
    return float(report(output)["comparison"]["kl_mean"])


def test_a_two_bit_run_that_fails_the_gate_is_repaired(
    tiny_models: Models, tmp_path: Path, plain_kl: float
) -> None:
    result = execute(gated(tiny_models("llama"), tmp_path, plain_kl / 3))
    found = report(result.output)
    assert result.verdict == "pass"
    assert found["comparison"]["kl_mean"] <= plain_kl / 3
    assert any("repair 1: the gate said fail; raised" in note for note in found["notes"])
    bits = {round(row["bits"], 1) for row in found["layers"]}
    assert len(bits) > 1  # only some units were raised


def test_a_repair_that_was_killed_goes_on_to_the_same_artifact(
    tiny_models: Models, tmp_path: Path, plain_kl: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.kill import compare, digests

    made = gated(tiny_models("llama"), tmp_path, plain_kl / 3, method="gptq")
    execute(made, run_dir=tmp_path / "plain")
    (tmp_path / "out").rename(tmp_path / "wanted")

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("compressor.pipeline.publish", die)
        with pytest.raises(KeyboardInterrupt):
            execute(made, run_dir=tmp_path / "killed")
    execute(made, run_dir=tmp_path / "killed")
    assert compare(digests(tmp_path / "wanted"), digests(tmp_path / "out")) == []


def test_a_budget_stays_a_limit_in_a_repair(
    tiny_models: Models, tmp_path: Path, plain_kl: float
) -> None:
    budget = {"average_bits": 3.2, "trials": 0}
    made = gated(
        tiny_models("llama"), tmp_path, plain_kl / 50, budget=budget,
        candidates=["W2A16", "W8A16"], scores="output_fisher",
    )  # fmt: skip
    with pytest.raises(GateError):
        execute(made)
    kept = report(tmp_path / "out.rejected")
    sizes = {s["component"]: s["artifact_bytes"] for s in kept["sizes"]}
    weights = sum(s["original_bytes"] for s in kept["sizes"] if "dense linears" in s["component"])
    assert sizes["codes"] + sizes["scales and zero points"] < weights * 3.2 / 32  # float32


def test_a_repair_without_a_quantize_stage_is_refused(tiny_models: Models, tmp_path: Path) -> None:
    made = [s for s in stages(tmp_path) if s["kind"] != "quantize"]
    made[-1]["gate"] = {"max_kl": 0.1, "on_fail": "repair"}
    with pytest.raises(RecipeError, match="needs a quantize stage") as caught:
        execute(recipe(tiny_models("llama"), tmp_path, stages=made))
    assert caught.value.code == "RC17"


def reason(metric: str, ci: tuple[float, float], limit: float, sense: str = "<=") -> dict[str, Any]:
    return {"metric": metric, "value": sum(ci) / 2, "ci": ci, "limit": limit, "sense": sense,
            "status": "fail"}  # fmt: skip


@pytest.mark.parametrize(
    ("missed", "share"),
    [
        (reason("kl_mean", (0.3, 0.4), 0.1), 0.25),
        (reason("perplexity_ratio", (1.1, 1.2), 1.05), 0.25),
        (reason("top1_agreement", (0.8, 0.9), 0.9, ">="), 0.25),
    ],
)
def test_the_share_that_may_stay_follows_from_the_missed_limit(
    missed: dict[str, Any], share: float
) -> None:
    verdict = {"status": "fail", "reasons": [missed]}
    assert wanted_share(verdict) == pytest.approx(0.85 * share)


def test_too_few_tokens_are_nothing_that_bits_could_repair() -> None:
    missed = {**reason("num_tokens", (100, 100), 1000, ">="), "status": "inconclusive"}
    assert wanted_share({"status": "inconclusive", "reasons": [missed]}) == 1.0
