"""The grid of a linear in a given format, with scales that the file can hold."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.algorithms.float_grid import FloatGrid, fp8_grid, mxfp4_grid, nvfp4_grid
from compressor.algorithms.grid import Grid, minmax_grid, mse_grid
from compressor.artifact.formats import SCALE_DTYPES, LayerFormat
from compressor.errors import NumericError, Where


def make_grid(
    weight: Tensor, fmt: LayerFormat, kind: str, *, largest: float | None = None
) -> Grid | FloatGrid:
    """Scales and zero points [O, G], already rounded to the stored dtype.

    Args:
        weight: [O, I].
        fmt: how it will be stored.
        kind: "mse" or "minmax".
        largest: absmax of all weights that share NVFP4's global scale; default those of `weight`.
    """
    if fmt.number == "float" and fmt.bits == 8:
        dtype = SCALE_DTYPES[fmt.scale_dtype]
        return fp8_grid(weight, kind=kind, scale_dtype=dtype, block=fmt.block)
    if fmt.number == "float":
        if fmt.stored == "nvfp4-pack-quantized":
            return nvfp4_grid(weight, kind=kind, largest=largest)
        return mxfp4_grid(weight, kind=kind)
    build = mse_grid if kind == "mse" else minmax_grid
    return build(
        weight,
        bits=fmt.bits,
        group_size=fmt.group_size,
        symmetric=fmt.symmetric,
        scale_dtype=SCALE_DTYPES[fmt.scale_dtype],
    )


def check_scales(grid: Grid | FloatGrid, fmt: LayerFormat, name: str) -> dict[str, int]:
    """Refuse scales that overflow the stored dtype; count those it could not make small enough.

    Raises:
        NumericError: a scale is as large as the dtype allows, so weights are cut off (NU05).
    """
    if fmt.scale_dtype not in SCALE_DTYPES:  # under a global scale, or any power of two: they fit
        return {}
    limits = torch.finfo(SCALE_DTYPES[fmt.scale_dtype])
    if bool((grid.scale.abs() >= limits.max).any()):
        raise NumericError(
            f"a scale does not fit into {fmt.scale_dtype}: the weights are too large",
            code="NU05",
            where=Where(tensor=f"{name}.weight"),
            why="Units finished before this one are kept.",
            fix="set scale_dtype to bfloat16 or float32",
        )
    raised = int((grid.scale.abs() <= limits.tiny).sum())
    return {"num_scales_raised": raised} if raised else {}
