"""What a plan promises, against what the run then does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressor.errors import RecipeError
from compressor.modeling.checkpoint import open_checkpoint
from compressor.modeling.state import ModelState
from compressor.plan import disk_bytes, make_plan, memory_bytes, seconds, weight_bytes
from compressor.recipe import load_recipe
from tests.fixtures_models import build
from tests.fixtures_pipeline import execute, recipe, stages

UNIFORM: dict[str, tuple[str, dict[str, Any]]] = {
    "symmetric": ("llama", {"scheme": "W4A16"}),
    "zero points, 3 bit, tied": ("llama_tied", {"scheme": "W3A16", "symmetric": False}),
    "channel": ("qwen3", {"scheme": "W8A16", "group_size": -1}),
    "protected": ("llama", {"scheme": "W4A16", "protect": ["*.down_proj"]}),
    "group too large": ("llama", {"scheme": "W4A16", "group_size": 128}),
    "experts": ("mixtral", {"scheme": "W4A16"}),
}


def cost(plan_json: dict[str, Any], what: str) -> dict[str, Any]:
    """One row of the costs."""
    return next(row for row in plan_json["costs"] if row["what"].startswith(what))


@pytest.mark.parametrize("name", UNIFORM)
def test_bytes_of_a_uniform_scheme_are_exact(
    name: str, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    model, settings = UNIFORM[name]
    chosen = stages(tmp_path, **settings, method="rtn")[:3]
    made = recipe(tiny_models(model), tmp_path, stages=chosen)
    planned = cost(make_plan(made).as_json(), "artifact")
    written = open_checkpoint(execute(made).output).nbytes
    assert planned["kind"] == "exact"
    assert planned["value"] == written


def test_bytes_of_a_bf16_checkpoint_are_exact(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model", dtype="bfloat16")
    made = recipe(model, tmp_path, stages=stages(tmp_path, method="rtn")[:3])
    state = ModelState.of_checkpoint(open_checkpoint(model))
    assert weight_bytes(made, state) == (open_checkpoint(execute(made).output).nbytes, True)


def test_bytes_with_a_budget_are_an_upper_bound(
    tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    chosen = stages(tmp_path, budget={"average_bits": 6.0}, candidates=["W4A16", "W8A16"],
                    method="rtn", scores="output_fisher")[:3]  # fmt: skip
    made = recipe(tiny_models("llama"), tmp_path, stages=chosen)
    planned = cost(make_plan(made).as_json(), "artifact")
    assert planned["kind"].startswith("at most")
    assert open_checkpoint(execute(made).output).nbytes <= planned["value"]


def test_disk_estimate_covers_the_run_and_is_not_wild(
    tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    made = recipe(tiny_models("llama"), tmp_path, stages=stages(tmp_path, method="rtn")[:3])
    state = ModelState.of_checkpoint(open_checkpoint(tiny_models("llama")))
    execute(made)
    used = sum(p.stat().st_size for n in ("out", "out.run") for p in (tmp_path / n).rglob("*"))
    assert used <= disk_bytes(made, state) <= used + (65 << 20)


def test_memory_and_time_grow_with_what_is_asked_for(
    tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    state = ModelState.of_checkpoint(open_checkpoint(tiny_models("llama")))
    small = recipe(tiny_models("llama"), tmp_path, stages=stages(tmp_path)[:3])
    large = recipe(tiny_models("llama"), tmp_path, stages=stages(tmp_path))
    assert memory_bytes(small, state) <= memory_bytes(large, state) < 1 << 30
    assert 0 < seconds(small, state) < seconds(large, state)


def test_every_effort_takes_longer_and_no_less_memory(
    tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    state = ModelState.of_checkpoint(open_checkpoint(tiny_models("llama")))
    made = [
        recipe(tiny_models("llama"), tmp_path, stages=stages(tmp_path, effort=effort)[:3])
        for effort in ("fast", "default", "high", "max")
    ]
    times, memory = [seconds(m, state) for m in made], [memory_bytes(m, state) for m in made]
    assert times == sorted(set(times))
    assert memory == sorted(memory)


def test_every_value_has_its_origin(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    from compressor.recipe import dump_recipe

    file = tmp_path / "tiny.yaml"
    file.write_text(dump_recipe(recipe(tiny_models("llama"), tmp_path)))
    rows = make_plan(load_recipe(file, ["stages.1.dampening=0.02"])).values
    origins = {row["key"]: row["origin"] for row in rows}
    assert all(origins.values())
    assert origins["stages.1.scheme"].startswith("line ")
    assert origins["stages.1.dampening"].startswith("--set")
    assert origins["stages.1.true_sequential"] in ("default", origins["stages.1.scheme"]) or (
        origins["stages.1.true_sequential"].startswith("line ")
    )


def test_defaults_are_named_as_such(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    rows = make_plan(recipe(tiny_models("llama"), tmp_path)).values
    origins = {row["key"]: row["origin"] for row in rows}
    assert origins["stages.1.dampening"] == "default"
    assert origins["seed"] == "default"


def test_patterns_say_what_they_match_and_the_plan_is_json(
    tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    chosen = stages(tmp_path, protect=["*.o_proj"])
    plan = make_plan(recipe(tiny_models("llama"), tmp_path, stages=chosen)).as_json()
    assert json.loads(json.dumps(plan)) == plan
    matched = {row["pattern"]: row["matches"] for row in plan["patterns"]}
    assert matched["*.o_proj"] == 2
    assert matched["linear"] == 15  # 14 in the blocks, and the head that `ignore` leaves out


def test_a_plan_refuses_a_pattern_that_matches_nothing(
    tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    made = recipe(tiny_models("llama"), tmp_path, stages=stages(tmp_path, protect=["*.o_prj"]))
    with pytest.raises(RecipeError) as caught:
        make_plan(made)
    assert caught.value.code in ("RC14", "RC15")
    assert not (tmp_path / "out.run").exists()
