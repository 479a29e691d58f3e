"""The grid of a linear in a given format, with scales that the file can hold."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.algorithms.grid import Grid, minmax_grid, mse_grid
from compressor.artifact.formats import SCALE_DTYPES, LayerFormat
from compressor.errors import NumericError, Where


def make_grid(weight: Tensor, fmt: LayerFormat, kind: str) -> Grid:
    """Scales and zero points [O, G], already rounded to the stored dtype."""
    build = mse_grid if kind == "mse" else minmax_grid
    return build(
        weight,
        bits=fmt.bits,
        group_size=fmt.group_size,
        symmetric=fmt.symmetric,
        scale_dtype=SCALE_DTYPES[fmt.scale_dtype],
    )


def check_scales(grid: Grid, fmt: LayerFormat, name: str) -> dict[str, int]:
    """Refuse scales that overflow the stored dtype; count those it could not make small enough.

    Raises:
        NumericError: a scale is as large as the dtype allows, so weights are cut off (NU05).
    """
    limits = torch.finfo(SCALE_DTYPES[fmt.scale_dtype])
    if bool((grid.scale >= limits.max).any()):
        raise NumericError(
            f"a scale does not fit into {fmt.scale_dtype}: the weights are too large",
            code="NU05",
            where=Where(tensor=f"{name}.weight"),
            why="Units finished before this one are kept.",
            fix="set scale_dtype to bfloat16 or float32",
        )
    raised = int((grid.scale <= limits.tiny).sum())
    return {"num_scales_raised": raised} if raised else {}
