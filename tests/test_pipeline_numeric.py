"""Numbers that go wrong in a run: what the user is told, what is kept, what is only counted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.numeric import NUMERIC, Numeric, multiplied
from tests.fixtures_pipeline import data, execute, recipe, stages


def copied(model: Path, folder: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(model, folder / "model"))


def journal(run: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Meta of every finished unit by stage and unit."""
    file = run / "journal.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    bodies = [json.loads(line) for line in lines]
    return {(b["stage"], b["unit"]): b["meta"] for b in bodies}


@pytest.mark.parametrize("case", NUMERIC, ids=lambda c: c.row.name)
def test_numeric_fault(case: Numeric, tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    model = copied(tiny_models("llama"), tmp_path)
    case.row.build(model)
    made = recipe(model, tmp_path, stages=stages(tmp_path, **case.settings))
    with pytest.raises(case.row.error) as caught:
        execute(made)
    assert caught.value.code == case.row.code
    assert caught.value.fix
    for piece in case.row.tells:
        assert piece in str(caught.value) + caught.value.fix, piece
    assert not (tmp_path / "out").exists()
    assert {u for _, u in journal(tmp_path / "out.run")} >= set(case.kept)


def quantized(model: Path, folder: Path, **settings: Any) -> tuple[list[str], dict[str, Any]]:
    """Notes of the report, and facts of the linears of block 0."""
    execute(recipe(model, folder, stages=stages(folder, **settings)[:4]))
    text = (folder / "out" / "report.json").read_text()
    units = journal(folder / "out.run")
    return json.loads(text)["notes"], units["01-quantize", "block-0000"]["facts"]


def test_nu04_dead_input_columns_are_counted_and_noted(
    tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    model = copied(tiny_models("llama"), tmp_path)
    multiplied("model.layers.0.input_layernorm.weight", 0.0)(model)
    notes, facts = quantized(model, tmp_path)
    assert facts["self_attn.q_proj"]["num_dead"] == 64
    assert any("always zero" in n for n in notes)


def test_nu02_a_hessian_of_rank_one_is_damped_and_still_verifies(
    tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    made = stages(tmp_path)
    line = json.dumps({"text": "a" * 80}) + "\n"
    (tmp_path / "same.jsonl").write_text(line * 8)
    made[0]["data"] = data(tmp_path / "same.jsonl", 8)
    result = execute(recipe(tiny_models("llama"), tmp_path, stages=made[:4]))
    facts = journal(tmp_path / "out.run")["01-quantize", "block-0000"]["facts"]
    assert all(f["dampening"] > 0 for f in facts.values())
    notes = json.loads((result.output / "report.json").read_text())["notes"]
    assert any("only 1 of 8 rows differ" in n for n in notes)


def test_nu05_scales_that_are_too_small_for_float16_are_counted(
    tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    model = copied(tiny_models("llama"), tmp_path)
    multiplied("model.layers.0.mlp.up_proj.weight", 1e-5)(model)
    notes, facts = quantized(model, tmp_path, method="rtn", scale_dtype="float16")
    assert facts["mlp.up_proj"]["num_scales_raised"] > 0
    assert any("scales were raised" in n for n in notes)


def test_nu11_the_same_seed_gives_the_same_bytes(
    tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    from benchmarks.kill import compare, digests

    made = stages(tmp_path)
    folders = [tmp_path / n / "out" for n in ("a", "b")]
    for folder in folders:
        execute(recipe(tiny_models("llama"), tmp_path, stages=made[:3], output=str(folder)))
    assert compare(*(digests(f) for f in folders)) == []
