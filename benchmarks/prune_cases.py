"""The cells of the pruning benchmark: a shape, what is done to it, and the recipe that does it.

shapes     which part of the model goes: weights (masks), blocks (depth), MLP channels (width)
methods    of masks: other tools and ours, as published and repaired; of all: distilled
students   the same shape from random weights, with the same tokens: next-token loss, or distilled

"50 % depth" removes at least half of the blocks, "25 %" the nearest count; widths are exact.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Stage = dict[str, Any]
MASKS: dict[str, Stage] = {"50 % unstructured": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
DEPTHS, WIDTHS = {"25 % depth": 0.25, "50 % depth": 0.5}, {"25 % MLP": 0.25, "50 % MLP": 0.5}
SHAPES = (*MASKS, *DEPTHS, *WIDTHS)
LIGHT = (*MASKS, "25 % MLP")  # little is lost, and fast training would lose more

PUBLISHED = {"reconstruct": False}
MASK_METHODS: dict[str, Stage] = {
    "magnitude": {"method": "magnitude", **PUBLISHED},
    "Wanda": {"method": "wanda", **PUBLISHED},
    "SparseGPT": {"method": "sparsegpt", **PUBLISHED},
    "Wanda, repaired": {"method": "wanda"},
    "RIA, repaired": {"method": "ria"},
    "SparseGPT, repaired": {"method": "sparsegpt"},
    "repaired": {"method": "alps"},
    "repaired, zeros shared out": {"method": "alps", "allocation": "measured"},
}
PEERS = {"llm-compressor Wanda": "llmc-wanda", "llm-compressor SparseGPT": "llmc-sparsegpt"}
OURS, PEER = ("repaired", "repaired, zeros shared out"), "llm-compressor SparseGPT"
COMPARED = (OURS[0], PEER)
HALF = "50 % depth"
DISTILLED = "distilled"
SCRATCH, SCRATCH_DISTILLED = "from scratch, next-token loss", "from scratch, distilled"
TRAINED = (DISTILLED, SCRATCH, SCRATCH_DISTILLED)


@dataclass(frozen=True, slots=True)
class Cell:
    """One result: a shape, a method, and which calibration rows."""

    shape: str
    method: str
    seed: int = 0

    @property
    def label(self) -> str:
        """Name of its folder."""
        text = f"{self.shape}-{self.method}-seed{self.seed}".lower().replace("%", "pct")
        return re.sub(r"[^a-z0-9]+", "-", text)


@dataclass(frozen=True, slots=True)
class Training:
    """Text and tokens of distillation, and the rates for students by how much they have lost."""

    text: Path
    packing: str
    steps: int
    batch_size: int
    seq_len: int
    light_rate: float
    rate: float
    scratch_rate: float

    @property
    def tokens(self) -> int:
        """Tokens seen, repetitions included."""
        return self.steps * self.batch_size * self.seq_len


def cells(shapes: list[str], seeds: int) -> list[Cell]:
    """All cells, what the goals need first; several seeds only for those that are compared."""
    quick: list[Cell] = []
    for shape in shapes:
        for method in [*_masks(shape), *PEERS] if shape in MASKS else ["pruned", "repaired"]:
            count = seeds if shape in MASKS and method in (*OURS, PEER) else 1
            quick += [Cell(shape, method, seed) for seed in range(count)]
    trained = [Cell(shape, DISTILLED) for shape in shapes]
    trained += [Cell(shape, SCRATCH) for shape in shapes if shape not in MASKS]
    trained += [Cell(shape, SCRATCH_DISTILLED) for shape in shapes if shape == HALF]
    found = sorted(quick + trained, key=lambda c: (c.seed, c.method not in COMPARED))
    return sorted(found, key=lambda c: c.shape != HALF and c.method not in COMPARED)


def _masks(shape: str) -> list[str]:
    """Our methods; a pattern has the same zeros everywhere, so none can be shared out."""
    shared = "pattern" not in MASKS[shape]
    return [m for m, keys in MASK_METHODS.items() if shared or "allocation" not in keys]


def prune_stage(cell: Cell, config: dict[str, Any]) -> Stage:
    """The prune stage of a cell, for a model with this configuration."""
    if cell.shape in MASKS:
        method = MASK_METHODS["repaired" if cell.method == DISTILLED else cell.method]
        return {"kind": "prune", **MASKS[cell.shape], **method}
    changes = PUBLISHED if cell.method == "pruned" else {}
    if cell.shape in WIDTHS:
        kept = round((1 - WIDTHS[cell.shape]) * config["intermediate_size"])
        return {"kind": "prune", "width": {"mlp": kept}, **changes}
    total, share = config["num_hidden_layers"], 1 - DEPTHS[cell.shape]
    count = math.floor(share * total) if share == 0.5 else round(share * total)
    return {"kind": "prune", "depth": count, **changes}


def recipe_of(
    cell: Cell, model: Path, out: Path, *, data: Stage, training: Training, student: Path | None
) -> str:
    """The recipe of a cell as JSON; `student` is a folder of random weights for `SCRATCH`."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    stages: list[Stage] = [{"kind": "calibrate", "data": data}]
    if student is None:
        stages.append(prune_stage(cell, config))
    if cell.method in TRAINED:
        stages.append(_distill_stage(cell, training, student))
    stages += [{"kind": "pack", "kernels_archs": []}, {"kind": "verify"}]
    recipe = {"name": "cell", "model": {"path": str(model)}, "output": str(out), "samples": 0}
    return json.dumps({**recipe, "stages": stages})


def _distill_stage(cell: Cell, training: Training, student: Path | None) -> Stage:
    rows = {"num_samples": training.steps * training.batch_size, "seq_len": training.seq_len}
    text = {"source": str(training.text), "packing": training.packing, **rows}
    text["min_fraction"] = 0.01
    stage: Stage = {"kind": "distill", "data": text, "steps": training.steps}
    rate = training.light_rate if cell.shape in LIGHT else training.rate
    stage |= {"batch_size": training.batch_size, "learning_rate": rate}
    stage |= {"warmup_steps": training.steps // 10, "checkpoint_steps": max(1, training.steps // 4)}
    if student is not None:
        stage |= {"learning_rate": training.scratch_rate, "student": {"path": str(student)}}
        stage |= {"ce_weight": 1.0 if cell.method == SCRATCH else 0.0}
    return stage
