"""Uniform integer grids: which scale and zero point represent a group of weights best.

    w  ~  s * (q - z),      q = clamp(round(w / s) + z, 0, 2^bits - 1)

``s`` is one number and ``z`` one integer for every group of neighbouring columns of a row.
A symmetric grid fixes z = 2^(bits-1), so its signed range is the full [-2^(b-1), 2^(b-1) - 1]. That
range has one more level on the negative side; a negative s turns it over, so the search lets the
largest weight of a group have the extra level ("full-range symmetric"). It costs nothing in the
file, and most of what a zero point would buy at 2 and 3 bits.

Three rules keep the numbers exact from here to the packed file:

* s is rounded to the dtype in which it is stored *before* any weight is rounded with it;
* rounding is half to even, of w / s (a division, not a product with 1 / s), and z is added after
  it, so 0 always maps to the code z and back to exactly 0;
* z is an integer inside the code range, hence 0 is always representable.

``minmax_grid`` covers the whole range of a group. ``mse_grid`` trades the rare large weight for a
finer step: it tries shrunk ranges with neighbouring zero points, first far apart and then around
the best of each group, refines the best scale by least squares for fixed codes,
s = <h w, c> / <h c, c> with c = q - z, and never accepts a step that raises the error
sum_j h_j (w_j - w^_j)^2.

# O out, I in, G groups, g columns in a group, Q = 2^bits - 1
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from compressor.algorithms.finite import require_finite
from compressor.errors import RecipeError
from compressor_kernels import native
from compressor_kernels.native_rounding import group_errors, group_scales

COARSE = 9  # shrunk ranges tried first, evenly from the whole range to the narrowest
HALVINGS = 2  # then on both sides of the best, at half and at a quarter of their distance
NUM_REFINEMENTS = 3  # least-squares steps after the search; the error stops moving after 2 or 3
ROWS_AT_ONCE_ELEMENTS = 1 << 18  # weights searched together: 1 MiB fits the cache, 4 is 5x slower
ROWS_AT_ONCE_NATIVE = 1 << 21  # in C each trial reads them once


class Levels(Protocol):
    """What rounding needs to know of a grid, integers or floats."""

    @property
    def scale(self) -> Tensor:
        """[O, G] fp32, what a level is multiplied with."""

    @property
    def zero_point(self) -> Tensor:
        """[O, G] int32."""

    @property
    def group_size(self) -> int:
        """Columns that share a scale, or -1."""

    def nearest(self, scaled: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of w / s: codes uint8, levels (w^ = level * s), and which were clipped."""

    def levels(self, codes: Tensor, zero: Tensor) -> Tensor:
        """The numbers fp32 that codes stand for, before the scale."""


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Scales and zero points of one weight matrix.

    scale: [O, G] fp32, each value representable in the stored dtype, normal; negative only in
        symmetric grids.
    zero_point: [O, G] int32 in the unsigned code range; 2^(bits-1) everywhere if symmetric.
    group_size: columns that share a scale, or -1 for one group per row.
    """

    scale: Tensor
    zero_point: Tensor
    bits: int
    group_size: int
    symmetric: bool

    @property
    def num_levels(self) -> int:
        """Number of codes, 2^bits."""
        return 1 << self.bits

    def take(self, rows: slice) -> Grid:
        """The grid of some rows."""
        return replace(self, scale=self.scale[rows], zero_point=self.zero_point[rows])

    def nearest(self, scaled: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Levels`; `zero` has the shape of `scaled` or broadcasts."""
        wanted = torch.round(scaled) + zero
        code = wanted.clamp(0, self.num_levels - 1)
        return code.to(torch.uint8), code - zero, code != wanted

    def levels(self, codes: Tensor, zero: Tensor) -> Tensor:
        """See `Levels`."""
        return codes.float() - zero

    def expand(self, columns: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every weight: two [O, columns] tensors (fp32, int32)."""
        width = group_width(columns, self.group_size)
        return (
            self.scale.repeat_interleave(width, dim=1),
            self.zero_point.repeat_interleave(width, dim=1),
        )


def group_width(columns: int, group_size: int) -> int:
    """Columns in one group; raises RecipeError CK29 if groups do not tile the columns."""
    width = columns if group_size == -1 else group_size
    if width <= 0 or columns % width:
        raise RecipeError(
            f"{columns} input columns cannot be split into groups of {group_size}",
            code="CK29",
            why="every group lies inside one row and has the same number of columns",
            fix="choose a group_size that divides the number of input columns, or -1",
        )
    return width


def minmax_grid(
    w: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> Grid:
    """The grid that spans every group: no weight is clipped by more than half a step.

    w: [O, I]. Symmetric scales are absmax / (2^(b-1) - 1/2): both ends are then half a step beyond
    the outer codes -2^(b-1) and 2^(b-1) - 1. Raises NumericError NU01 for non-finite w and
    RecipeError CK29 if groups do not tile the columns.
    """
    groups = _grouped(w, group_size)
    scale, zero = _minmax(groups, bits=bits, symmetric=symmetric, scale_dtype=scale_dtype)
    return Grid(scale, zero.to(torch.int32), bits, group_size, symmetric)


def mse_grid(
    w: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype = torch.bfloat16,
    importance: Tensor | None = None,
) -> Grid:
    """The grid with the smallest weighted squared error found by search, per row and group.

    w: [O, I]; importance: [I], for example diag(H), or None for plain squared error (the better
    choice inside GPTQ). Never worse than ``minmax_grid`` in any group. Cost: about 40 trial
    roundings of w, 16 if symmetric. Raises as ``minmax_grid``.
    """
    groups = _grouped(w, group_size)
    weight = None if importance is None else _grouped(importance[None], group_size)
    at_once = ROWS_AT_ONCE_ELEMENTS if native.library() is None else ROWS_AT_ONCE_NATIVE
    rows = max(1, at_once // w.shape[1])
    search = _Search(bits, symmetric, scale_dtype)
    parts = [search.solve(part, weight) for part in torch.split(groups, rows)]
    scale = torch.cat([part[0] for part in parts])
    zero = torch.cat([part[1] for part in parts]).to(torch.int32)
    return Grid(scale, zero, bits, group_size, symmetric)


def quantize(w: Tensor, grid: Levels) -> Tensor:
    """Round weights to the nearest code of their group: [O, I] float -> [O, I] uint8."""
    groups = _grouped(w, grid.group_size)
    scaled = groups / grid.scale.unsqueeze(-1)
    return grid.nearest(scaled, grid.zero_point.unsqueeze(-1))[0].reshape(w.shape)


def dequantize(codes: Tensor, grid: Levels) -> Tensor:
    """The weights that codes stand for, level * s: [O, I] uint8 -> [O, I] fp32."""
    width = group_width(codes.shape[1], grid.group_size)
    levels = grid.levels(codes.reshape(len(codes), -1, width), grid.zero_point.unsqueeze(-1))
    return levels.mul_(grid.scale.unsqueeze(-1)).flatten(1)


def as_stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in fp32 as `dtype` stores them: rounded, normal, with their sign; 0 becomes 1."""
    info = torch.finfo(dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    size = scale.abs().clamp(info.tiny, info.max)
    return torch.copysign(size, scale).to(dtype).float()


def _grouped(w: Tensor, group_size: int) -> Tensor:
    """[O, I] -> fp32 [O, G, g], checked."""
    width = group_width(w.shape[1], group_size)
    require_finite(w, "the weights to be quantized")
    return w.float().reshape(len(w), -1, width)


def _signed_absmax(groups: Tensor) -> Tensor:
    """absmax [O, G] with the sign that gives the largest weight the extra, negative level."""
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    return torch.where(-low >= high, -low, -high)


def _minmax(
    groups: Tensor, *, bits: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and zero point (both fp32 [O, G]) that cover every group."""
    top = (1 << bits) - 1
    if symmetric:
        scale = groups.abs().amax(dim=-1) / ((1 << (bits - 1)) - 0.5)
        return as_stored(scale, scale_dtype), torch.full_like(scale, 1 << (bits - 1))
    low = groups.amin(dim=-1).clamp(max=0)
    high = groups.amax(dim=-1).clamp(min=0)
    # each end divided on its own: high - low may overflow where neither end does
    scale = as_stored(high / top - low / top, scale_dtype)
    return scale, torch.round(-low / scale).clamp(0, top)


@dataclass(frozen=True, slots=True)
class _Search:
    """Settings of one mse search; ``solve`` runs it on a slab of rows."""

    bits: int
    symmetric: bool
    scale_dtype: torch.dtype

    def solve(self, groups: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Best scale and zero point (fp32 [O, G]) for groups [O, G, g]."""
        start = _minmax(
            groups, bits=self.bits, symmetric=self.symmetric, scale_dtype=self.scale_dtype
        )
        best = _Best(groups, weight, *start, search=self)
        low, step = self._range(groups)
        narrowest = 0.35 if self.bits <= 4 else 0.8  # fine steps gain little from clipping
        distance = (1.0 - narrowest) / (COARSE - 1)
        shrink = torch.ones_like(step)
        for index in range(COARSE):
            shrink = self._try(best, 1.0 - index * distance, (low, step), shrink)
        for _ in range(HALVINGS):
            distance /= 2
            middle = shrink
            for side in (distance, -distance):
                shrink = self._try(best, middle + side, (low, step), shrink)
        for _ in range(NUM_REFINEMENTS):
            best.offer(as_stored(best.least_squares_scale(), self.scale_dtype), best.zero)
        return best.scale, best.zero

    def _range(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """The low end of every group and the step [O, G] that covers its whole range."""
        if self.symmetric:
            widest = _signed_absmax(groups)
            return widest, widest / ((1 << (self.bits - 1)) - 1)
        top = (1 << self.bits) - 1
        low = groups.amin(dim=-1).clamp(max=0)
        return low, groups.amax(dim=-1).clamp(min=0) / top - low / top

    def _try(
        self,
        best: _Best,
        shrink: Tensor | float,
        whole: tuple[Tensor, Tensor],
        kept: Tensor,
    ) -> Tensor:
        """Offer the range shrunk so far; returns `shrink` where it is now the best, else `kept`.

        An asymmetric grid is tried with its zero point one lower and higher, too.
        """
        low, step = whole
        scale = as_stored(step * shrink, self.scale_dtype)
        if self.symmetric:
            better = best.offer(scale, best.zero)
            return torch.where(better, shrink, kept)
        middle = torch.round(-low * shrink / scale)
        for shift in (0, -1, 1):
            better = best.offer(scale, (middle + shift).clamp(0, (1 << self.bits) - 1))
            kept = torch.where(better, shrink, kept)
        return kept


class _Best:
    """The best grid seen so far for every group; its error never rises."""

    def __init__(
        self, groups: Tensor, weight: Tensor | None, scale: Tensor, zero: Tensor, *, search: _Search
    ) -> None:
        self.groups, self.weight = groups, weight
        self.levels, self.symmetric = 1 << search.bits, search.symmetric
        self.scale, self.zero = scale, zero
        self.native = groups.device.type == "cpu" and native.library() is not None
        self.error = self._error(scale, zero)

    def offer(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Take the candidate [O, G] wherever it is strictly better; returns where."""
        error = self._error(scale, zero)
        better = error < self.error
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)
        self.error = torch.where(better, error, self.error)
        return better

    def least_squares_scale(self) -> Tensor:
        """The real scale that is optimal for the present codes; the old one where undefined."""
        if self.native:
            return group_scales(self.groups, self.scale, self.zero, self.levels - 1, self.weight)
        centred = self._centred(self.scale, self.zero)
        weighted = centred if self.weight is None else centred * self.weight
        square = (weighted * centred).sum(dim=-1)
        scale = (weighted * self.groups).sum(dim=-1) / square
        return torch.where((square > 0) & (scale * self.scale > 0), scale, self.scale)

    def _centred(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes less the zero point, as floats [O, G, g]."""
        rounded = torch.round(self.groups / scale.unsqueeze(-1))
        if self.symmetric:  # one zero point for all: a third of the passes over memory less
            return rounded.clamp_(-(self.levels // 2), self.levels // 2 - 1)
        zero = zero.unsqueeze(-1)
        return rounded.add_(zero).clamp_(0, self.levels - 1).sub_(zero)

    def _error(self, scale: Tensor, zero: Tensor) -> Tensor:
        if self.native:
            return group_errors(self.groups, scale, zero, self.levels - 1, self.weight)
        difference = self._centred(scale, zero).mul_(scale.unsqueeze(-1)).sub_(self.groups)
        square = difference.square_()
        return (square if self.weight is None else square.mul_(self.weight)).sum(dim=-1)
