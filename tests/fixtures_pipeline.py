"""Whole runs over tiny checkpoints: a recipe as a dict, and one call to run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compressor.pipeline import RunOptions, RunResult, run
from compressor.recipe import Recipe, parse_recipe

WORDS = "def read write path value index total model token layer rain plain jumps over fox"


def text_file(path: Path, *, start: int = 0, count: int = 12) -> Path:
    """Documents that differ, each long enough for a row of 32 tokens."""
    rows, known = [], WORDS.split()
    for i in range(start, start + count):
        words = [known[(i * 7 + j * (i + 3)) % len(known)] for j in range(60)]
        rows.append(json.dumps({"text": f"{i} " + " ".join(words)}))
    path.write_text("\n".join(rows) + "\n")
    return path


def data(path: Path, rows: int) -> dict[str, Any]:
    """A recipe's data section."""
    return {"source": str(path), "num_samples": rows, "seq_len": 32}


def stages(folder: Path, **quantize: Any) -> list[dict[str, Any]]:
    """calibrate -> quantize -> pack -> verify -> evaluate."""
    first = text_file(folder / "calibration.jsonl")
    second = text_file(folder / "evaluation.jsonl", start=100, count=6)
    settings = {"kind": "quantize", "scheme": "W4A16", "group_size": 32, "grid": "minmax"}
    return [
        {"kind": "calibrate", "data": data(first, 8)},
        {**settings, **quantize},
        {"kind": "pack", "kernels_archs": []},
        {"kind": "verify", "tokens": 8},
        {"kind": "evaluate", "data": data(second, 4)},
    ]


def recipe(model: Path, folder: Path, **changes: Any) -> Recipe:
    """A recipe over `model` with its output in `folder`; `changes` replace top-level keys."""
    body = {
        "name": "tiny",
        "model": {"path": str(model)},
        "output": str(folder / "out"),
        "samples": 0,
        "stages": changes.pop("stages", None) or stages(folder),
    }
    return parse_recipe(json.dumps({**body, **changes}), file="tiny.yaml")


def execute(made: Recipe, **options: Any) -> RunResult:
    """Run it."""
    return run(made, RunOptions(command="compress run tiny.yaml", **options))
