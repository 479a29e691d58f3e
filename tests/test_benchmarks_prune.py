"""The pruning benchmark: cells, their recipes, and what the table says of the goals."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.prune_budget import METHODS, _stages
from benchmarks.prune_cases import (
    HALF,
    PEERS,
    SCRATCH,
    SHAPES,
    Cell,
    Training,
    cells,
    prune_stage,
    recipe_of,
)
from benchmarks.prune_tables import goals
from benchmarks.subjects import Subject
from compressor.recipe import parse_recipe

CONFIG = {"num_hidden_layers": 9, "intermediate_size": 768}
TRAINING = Training(Path("text.jsonl"), "rows", 20, 16, 192, 3e-4, 1e-3, 3e-3)


def row(shape: str, method: str, damage: float, **changes: Any) -> dict[str, Any]:
    documents = [damage, damage]
    numbers = {"damage": damage, "kl_mean": damage, "perplexity_ratio": 1 + damage, "seed": 0}
    return {"shape": shape, "method": method, "documents": documents, **numbers, **changes}


def test_no_two_cells_share_a_folder():
    labels = [cell.label for cell in cells(list(SHAPES), 3)]
    assert len(labels) == len(set(labels))


def test_half_depth_removes_at_least_half_of_the_blocks():
    assert prune_stage(Cell(HALF, "pruned"), CONFIG)["depth"] == 4
    assert prune_stage(Cell("25 % depth", "pruned"), CONFIG)["depth"] == 7
    assert prune_stage(Cell("25 % MLP", "pruned"), CONFIG)["width"] == {"mlp": 576}


@pytest.mark.parametrize("cell", [c for c in cells(list(SHAPES), 1) if c.method not in PEERS])
def test_every_cell_is_a_recipe(tmp_path: Path, cell: Cell):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    student = tmp_path if cell.method.startswith("from scratch") else None
    text = recipe_of(cell, tmp_path, tmp_path / "out", data={}, training=TRAINING, student=student)
    kinds = [stage.kind for stage in parse_recipe(text, file="cell").stages]
    assert ("prune" in kinds) == (student is None)


def test_students_that_lost_little_learn_slowly(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for shape, rate in (("2:4", 3e-4), (HALF, 1e-3)):
        cell, out = Cell(shape, "distilled"), tmp_path / "out"
        text = recipe_of(cell, tmp_path, out, data={}, training=TRAINING, student=None)
        (stage,) = (s for s in json.loads(text)["stages"] if s["kind"] == "distill")
        assert stage["learning_rate"] == rate
        assert stage["data"]["packing"] == "rows"


@pytest.mark.parametrize("method", METHODS)
def test_shape_and_bits_keep_to_one_size(tmp_path: Path, method: str):
    files = tmp_path, Path("calibration.jsonl"), Path("evaluation.jsonl")
    subject = Subject("babyllama-tok361", *files, (32,), (32,))
    parts = _stages(subject, method, 5000, Namespace(work=tmp_path, steps=6))
    ends = {"kind": "calibrate"}, {"kind": "pack"}
    body = {"name": "x", "model": {"path": "m"}, "output": "o"}
    text = json.dumps(body | {"stages": [ends[0], *parts, ends[1]]})
    kinds = [stage.kind for stage in parse_recipe(text, file="cell").stages]
    assert ("prune" in kinds) == method.startswith("shape")
    assert ("distill" in kinds) == method.endswith("distilled")
    limits = [p.get("budget", p.get("target", {})).get("size") for p in parts]
    assert {size for size in limits if size} == {"5000B"}


def test_goals_are_told_as_they_were_measured():
    rows = [row("2:4", "repaired", 0.3), row("2:4", "llm-compressor SparseGPT", 0.6)]
    rows += [row(HALF, "pruned", 10.0), row(HALF, "distilled", 1.0), row(HALF, SCRATCH, 3.0)]
    against, recovered, scratch = goals(rows)
    assert "50 % less damage" in against
    assert "reached" in against
    assert "90.0 % of the perplexity gap" in recovered
    assert "2.000 distilled, 4.000 from scratch" in scratch


def test_a_goal_that_was_missed_says_so():
    rows = [row("2:4", "repaired", 0.5), row("2:4", "llm-compressor SparseGPT", 0.6)]
    assert "missed" in goals(rows)[0]
