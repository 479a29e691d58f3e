"""Numeric faults NU01-NU12: builders that change a sound checkpoint, and settings of the stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from compressor.errors import NumericError, RecipeError
from tests.faults.row import Row

BLOCK = "model.layers.1"
BUDGET: dict[str, Any] = {"scores": "output_fisher", "engines": ["ours"]}


@dataclass(frozen=True)
class Numeric:
    """A row, the quantize stage's settings, and the units that are finished before it strikes."""

    row: Row
    settings: dict[str, Any] = field(default_factory=dict)
    kept: tuple[str, ...] = ()


def multiplied(name: str, factor: float, *more: str) -> Callable[[Path], None]:
    """Multiply one or more tensors of a checkpoint."""

    def build(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        tensors = {n: t.clone() for n, t in tensors.items()}
        for each in (name, *more):
            tensors[each] *= factor
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return build


def untouched(model: Path) -> None:
    """The checkpoint is sound; the settings are not."""


NUMERIC = (
    Numeric(
        Row("NU01 the residual overflows",
            multiplied(f"{BLOCK}.mlp.down_proj.weight", 1e25, f"{BLOCK}.mlp.up_proj.weight"),
            NumericError, "NU01", (BLOCK, "row 0")),
        kept=("tokens", "block-0000"),
    ),
    Numeric(
        Row("NU01 attention becomes NaN", multiplied(f"{BLOCK}.self_attn.q_proj.weight", 1e38),
            NumericError, "NU01", (BLOCK,)),
        kept=("tokens", "block-0000"),
    ),
    Numeric(
        Row("NU05 scale overflows float16", multiplied(f"{BLOCK}.mlp.up_proj.weight", 1e8),
            NumericError, "NU05", ("mlp.", "float16", "scale_dtype")),
        {"scale_dtype": "float16", "method": "rtn"}, kept=("tokens", "block-0000", "block-0001"),
    ),
    Numeric(
        Row("NU05 scale overflows float16 in GPTQ",
            multiplied(f"{BLOCK}.mlp.up_proj.weight", 1e8),
            NumericError, "NU05", ("float16",)),
        {"scale_dtype": "float16"}, kept=("tokens", "block-0000", "block-0001"),
    ),
    Numeric(
        Row("NU12 budget below every mixture", untouched, RecipeError, "NU12",
            ("smallest", "bits")),
        {**BUDGET, "budget": {"average_bits": 4.6}, "candidates": ["W4A16", "W8A16"]},
    ),
    Numeric(
        Row("NU12 size below what stays dense", untouched, RecipeError, "NU12", ("dense",)),
        {**BUDGET, "budget": {"size": "1KiB"}, "candidates": ["W4A16", "W8A16"]},
    ),
)  # fmt: skip
