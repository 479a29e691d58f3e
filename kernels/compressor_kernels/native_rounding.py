"""The inner loops of quantization in C (`round.c`): GPTQ's columns, the search for grids, and the
rounding of learned weights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor_kernels.native import LONG, POINTER, needed

MOST_COLUMNS = 128  # of one call


class _RoundingStruct(ctypes.Structure):
    """`Rounding` of round.c."""

    _fields_ = (
        *((name, POINTER) for name in ("weights", "before", "root", "scale", "zero", "group")),
        *((name, POINTER) for name in ("keep", "misses", "codes", "clipped")),
        ("rows", LONG),
        ("columns", LONG),
        ("top", ctypes.c_float),
    )


class _GroupsStruct(ctypes.Structure):
    """`Groups` of round.c."""

    _fields_ = (
        *((name, POINTER) for name in ("groups", "scale", "zero", "weight", "found")),
        *((name, LONG) for name in ("count", "size", "period")),
        ("top", ctypes.c_float),
    )


class _LearnedStruct(ctypes.Structure):
    """`Learned` of round.c."""

    _fields_ = (
        *((name, POINTER) for name in ("weights", "offset", "scale", "zero")),
        *((name, POINTER) for name in ("gradient", "found", "step")),
        *((name, LONG) for name in ("count", "size")),
        ("top", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True, eq=False)
class UniformLevels:
    """Uniform grids: scale and zero fp32 [G, O], group int64 [B] of each column, codes 0..top."""

    scale: Tensor
    zero: Tensor
    group: Tensor
    top: int


def round_columns(
    weights: Tensor, before: Tensor, root: Tensor, levels: UniformLevels, keep: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Round columns [B, O] in their order, B at most `MOST_COLUMNS`.

    Args:
        weights: fp32 [B, O], replaced by the errors w - w^.
        before: fp32 [B, O], what errors of earlier blocks add to what is rounded.
        root: fp32 [B, B]; column j is rounded as w_j + before_j + sum_{i<j} error_i root_ij.
        levels: the grid.
        keep: bool [B, O]; False forces the zero point.

    Returns what was rounded less w^ [B, O], codes uint8 [B, O], and clipped codes int32 [O].
    Raises RuntimeError where nothing can be compiled, ValueError for other dtypes or shapes.
    """
    columns, rows = weights.shape
    floats = (weights, before, root, levels.scale, levels.zero)
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in floats):
        raise ValueError("columns are rounded in contiguous float32 tensors")
    if before.shape != weights.shape or root.shape != (columns, columns) or columns > MOST_COLUMNS:
        raise ValueError(f"{before.shape} and {root.shape} do not belong to {weights.shape}")
    misses, codes = torch.empty_like(weights), torch.empty_like(weights, dtype=torch.uint8)
    clipped = torch.zeros(rows, dtype=torch.int32)
    keep = None if keep is None else keep.contiguous()
    tensors = (*floats, levels.group, keep, misses, codes, clipped)
    pointers = (None if t is None else t.data_ptr() for t in tensors)
    struct = _RoundingStruct(*pointers, rows, columns, float(levels.top))
    needed().round_columns(ctypes.byref(struct))
    return misses, codes, clipped


def group_errors(
    groups: Tensor, scale: Tensor, zero: Tensor, top: int, weight: Tensor | None = None
) -> Tensor:
    """Squared error [O, G] of rounding groups [O, G, g] to codes 0..top of scale, zero [O, G].

    weight: [1, G, g], of each squared difference. All fp32. Raises as `round_columns`.
    """
    return _of_groups(needed().group_errors, (groups, scale, zero), top, weight)


def group_scales(
    groups: Tensor, scale: Tensor, zero: Tensor, top: int, weight: Tensor | None = None
) -> Tensor:
    """The scale [O, G] of least squared error for the codes that `group_errors` rounds to.

    Where all codes are zero, or it would change its sign, the old one. Raises as `round_columns`.
    """
    return _of_groups(needed().group_scales, (groups, scale, zero), top, weight)


def _of_groups(
    function: Callable[[object], None],
    grid: tuple[Tensor, Tensor, Tensor],
    top: int,
    weight: Tensor | None,
) -> Tensor:
    tensors = grid if weight is None else (*grid, weight)
    groups, scale = grid[:2]
    if any(t.dtype != torch.float32 for t in tensors) or scale.shape != groups.shape[:2]:
        raise ValueError(f"groups {groups.shape} and scales {scale.shape} must be float32 and fit")
    groups, scale, zero, *more = (t.contiguous() for t in tensors)
    found = torch.empty_like(scale)
    pointers = (t.data_ptr() for t in (groups, scale, zero))
    weights = more[0].data_ptr() if more else None
    sizes = (scale.numel(), groups.shape[2], groups.shape[1])
    function(ctypes.byref(_GroupsStruct(*pointers, weights, found.data_ptr(), *sizes, float(top))))
    return found


def learned_values(weights: Tensor, offset: Tensor, grid: tuple[Tensor, Tensor, int]) -> Tensor:
    """w^ = s level(w / s + v) for weights w and offsets v [O, G, g].

    grid: scale and zero [O, G], and the largest code. All fp32. Raises as `round_columns`.
    """
    found = torch.empty_like(weights)
    tensors = (weights, offset, grid[0], grid[1], None, found, None)
    needed().learned_values(ctypes.byref(_learned_struct(tensors, grid[2])))
    return found


def learned_gradients(
    weights: Tensor, offset: Tensor, grid: tuple[Tensor, Tensor, int], gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Straight-through gradients of `offset` [O, G, g] and scale [O, G] for that of w^ [O, G, g].

    A clipped weight moves no offset. Arguments and errors as `learned_values`.
    """
    found, step = torch.empty_like(weights), torch.empty_like(grid[0])
    tensors = (weights, offset, grid[0], grid[1], gradient.contiguous(), found, step)
    needed().learned_gradients(ctypes.byref(_learned_struct(tensors, grid[2])))
    return found, step


def _learned_struct(tensors: tuple[Tensor | None, ...], top: int) -> _LearnedStruct:
    """Tensors in the order of the fields; they must outlive the call."""
    weights, offset, scale, zero = (t for t in tensors[:4] if t is not None)
    known = [t for t in tensors if t is not None]
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in known):
        raise ValueError("learned weights are rounded in contiguous float32 tensors")
    groups = weights.shape[:2]
    if offset.shape != weights.shape or scale.shape != groups or zero.shape != groups:
        raise ValueError(f"{offset.shape}, {scale.shape}, {zero.shape} do not fit {weights.shape}")
    pointers = (None if t is None else t.data_ptr() for t in tensors)
    return _LearnedStruct(*pointers, scale.numel(), weights.shape[2], float(top))
