"""Grids of small floats: which scale makes the levels of e4m3 or e2m1 fit a group of weights best.

    w  ~  s * l,      l = the level nearest to w / s  (ties to the even mantissa)

The levels are those of the OCP formats: e4m3 reaches 448 with 3 mantissa bits, e2m1 knows
0, 0.5, 1, 1.5, 2, 3, 4 and 6. Scales are searched for the smallest squared error

* e4m3 (`fp8_grid`): over one octave around absmax / 448 - a float's error depends on where the
  weights fall between powers of two - and then by least squares for fixed levels;
* NVFP4 (`nvfp4_grid`): over the neighbours of absmax / 6 among the e4m3 numbers, times one global
  scale of the tensor. That one is a power of two: level * scale then has at most 6 mantissa bits,
  so every engine computes with exactly the same weights, even in bf16;
* MXFP4 (`mxfp4_grid`): over three neighbouring powers of two (OCP Microscaling 1.0).

# O out, I in, G groups, g columns in a group
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.algorithms.finite import require_finite
from compressor.algorithms.grid import as_stored, group_width

TOP = {4: 6.0, 8: 448.0}  # largest level
CLIPPED = {4: 7.0, 8: 464.0}  # half a step beyond it
OCTAVE = 24  # candidates of an e4m3 scale
NEIGHBOURS = range(-5, 8)  # e4m3 codes around absmax / 6: from 0.65 to 1.8 times it
NUM_REFINEMENTS = 2
ELEMENTS_AT_ONCE = 1 << 18


@dataclass(frozen=True, slots=True, eq=False)
class FloatGrid:
    """Scales of one weight matrix whose codes are small floats.

    scale: [O, G] fp32, what a level is multiplied with, positive. bits: 4 (e2m1) or 8 (e4m3).
    group_size: columns that share a scale, or -1. global_scale: fp32 [1] by which stored scales are
    divided (NVFP4), else None.
    """

    scale: Tensor
    bits: int
    group_size: int
    global_scale: Tensor | None = None

    @property
    def zero_point(self) -> Tensor:
        """Zeros [O, G]: floats have their zero in the middle."""
        return torch.zeros(self.scale.shape, dtype=torch.int32, device=self.scale.device)

    def take(self, rows: slice) -> FloatGrid:
        """The grid of some rows."""
        return replace(self, scale=self.scale[rows])

    def nearest(self, scaled: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of w / s: codes uint8, levels, and which lie more than half a step outside."""
        level = round_to_level(scaled, self.bits)
        return level_codes(level, self.bits), level, scaled.abs() > CLIPPED[self.bits]

    def levels(self, codes: Tensor, zero: Tensor) -> Tensor:
        """The numbers fp32 that codes stand for."""
        if self.bits == 8:
            return codes.view(torch.float8_e4m3fn).float()
        size = (codes & 7).float()  # 0 1 2 3 4 5 6 7 -> 0 .5 1 1.5 2 3 4 6
        size = torch.where(size < 4, size / 2, torch.where(size < 6, size - 2, 2 * size - 8))
        return torch.where(codes > 7, -size, size)


def round_to_level(x: Tensor, bits: int) -> Tensor:
    """The nearest level of e2m1 or e4m3, ties to even, ends clipped; same shape and dtype."""
    clipped = x.clamp(-TOP[bits], TOP[bits])
    if bits == 8:
        return clipped.to(torch.float8_e4m3fn).to(x.dtype)
    step = torch.where(clipped.abs() < 2, 0.5, torch.where(clipped.abs() < 4, 1.0, 2.0))
    return (clipped / step).round() * step


def level_codes(levels: Tensor, bits: int) -> Tensor:
    """Codes uint8 of numbers that are levels; there is no negative zero."""
    levels = levels.float() + 0.0  # -0.0 + 0.0 = 0.0
    if bits == 8:
        return levels.to(torch.float8_e4m3fn).view(torch.uint8)
    size = levels.abs()
    index = torch.where(size < 2, 2 * size, torch.where(size < 4, size + 2, size / 2 + 4))
    return index.to(torch.uint8) | (levels < 0).to(torch.uint8) << 3


def fp8_grid(
    w: Tensor, *, kind: str, scale_dtype: torch.dtype = torch.bfloat16, block: int = 0
) -> FloatGrid:
    """One scale for each row, or for each `block` x `block` square, of w [O, I].

    kind: "mse" searches, "minmax" takes absmax / 448. The scale of squares is repeated for each of
    their rows; the last square may have fewer rows. Raises NumericError NU01, RecipeError CK29.
    """
    require_finite(w, "the weights to be quantized")
    group_size = block or -1
    width = group_width(w.shape[1], group_size)
    rows = torch.split(w.float(), block or max(1, ELEMENTS_AT_ONCE // w.shape[1]))
    parts = []
    for part in rows:
        count = len(part)
        groups = part.reshape(count, -1, width)
        if block:  # all rows of the squares together: [1, G, rows * g]
            groups = groups.transpose(0, 1).reshape(1, len(groups[0]), -1)
        start = as_stored(groups.abs().amax(-1) / TOP[8], scale_dtype)
        factors = torch.logspace(-0.2, 0.8, OCTAVE, base=2.0).tolist() if kind == "mse" else []
        best = _Best(groups, start, bits=8)
        best.offer_all(as_stored(start * factor, scale_dtype) for factor in factors)
        for _ in range(NUM_REFINEMENTS * bool(factors)):
            best.offer(as_stored(best.least_squares_scale(), scale_dtype))
        parts.append(best.scale.expand(count, -1) if block else best.scale)
    return FloatGrid(torch.cat(parts).contiguous(), 8, group_size)


def nvfp4_grid(w: Tensor, *, kind: str, largest: float | None = None) -> FloatGrid:
    """Groups of 16 with e4m3 scales; `largest` is the absmax of all tensors that share the global
    scale (default w's own). Raises as `fp8_grid`."""
    groups = _grouped(w, 16)
    absmax = float(groups.abs().max()) if largest is None else largest
    global_scale = power_of_two_scale(absmax, margin=2.0)
    parts = []
    for part in _slabs(groups):
        ideal = part.abs().amax(-1) / TOP[4] * global_scale
        code = ideal.clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn).view(torch.uint8).int()
        if kind != "mse":  # not below absmax / 6, so that nothing is clipped
            code = torch.where(_e4m3(code) < ideal, code + 1, code)
        best = _Best(part, _e4m3(code) / global_scale, bits=4)
        shifts = NEIGHBOURS if kind == "mse" else ()
        best.offer_all(_e4m3(code + shift) / global_scale for shift in shifts)
        parts.append(best.scale)
    return FloatGrid(torch.cat(parts), 4, 16, torch.tensor([global_scale]))


def mxfp4_grid(w: Tensor, *, kind: str) -> FloatGrid:
    """Groups of 32 with power-of-two scales. Raises as `fp8_grid`."""
    parts = []
    for part in _slabs(_grouped(w, 32)):
        absmax = part.abs().amax(-1)
        exponent = torch.ceil(torch.log2(absmax / TOP[4]))  # nothing is clipped
        exponent = torch.where(absmax > 0, exponent, torch.zeros_like(exponent))
        best = _Best(part, _power(exponent), bits=4)
        best.offer_all(_power(exponent + shift) for shift in ((-1, 1) if kind == "mse" else ()))
        parts.append(best.scale)
    return FloatGrid(torch.cat(parts), 4, 32)


def power_of_two_scale(absmax: float, *, margin: float) -> float:
    """The global scale of NVFP4: the largest power of two with absmax * scale <= 448 * 6 / margin.

    1 for a tensor of zeros. Used for weights and, with calibrated absmax, for activations.
    """
    if absmax == 0:
        return 1.0
    exponent = torch.floor(torch.log2(torch.tensor(448.0 * 6.0 / margin / absmax)))
    return float(2.0 ** exponent.clamp(-100, 100))


def _grouped(w: Tensor, group_size: int) -> Tensor:
    width = group_width(w.shape[1], group_size)
    require_finite(w, "the weights to be quantized")
    return w.float().reshape(len(w), -1, width)


def _slabs(groups: Tensor) -> tuple[Tensor, ...]:
    return torch.split(groups, max(1, ELEMENTS_AT_ONCE // groups[0].numel()))


def _e4m3(codes: Tensor) -> Tensor:
    """Positive e4m3 numbers by code, kept between the smallest (2^-9) and 448."""
    return codes.clamp(1, 126).to(torch.uint8).view(torch.float8_e4m3fn).float()


def _power(exponent: Tensor) -> Tensor:
    return torch.ldexp(torch.ones_like(exponent), exponent.clamp(-126, 127).to(torch.int32))


class _Best:
    """The best scales [O, G] seen so far for groups [O, G, g]; their error never rises."""

    def __init__(self, groups: Tensor, scale: Tensor, *, bits: int) -> None:
        self.groups, self.scale, self.bits = groups, scale, bits
        self.error = self._error(scale)

    def offer_all(self, scales: Iterable[Tensor]) -> None:
        """Offer every candidate."""
        for scale in scales:
            self.offer(scale)

    def offer(self, scale: Tensor) -> None:
        """Take the candidate [O, G] wherever it is strictly better."""
        error = self._error(scale)
        better = error < self.error
        self.scale = torch.where(better, scale, self.scale)
        self.error = torch.where(better, error, self.error)

    def least_squares_scale(self) -> Tensor:
        """<w, l> / <l, l> for the present levels; the old scale where undefined."""
        levels = round_to_level(self.groups / self.scale.unsqueeze(-1), self.bits)
        square = levels.square().sum(-1)
        scale = (levels * self.groups).sum(-1) / square
        return torch.where((square > 0) & (scale > 0), scale, self.scale)

    def _error(self, scale: Tensor) -> Tensor:
        levels = round_to_level(self.groups / scale.unsqueeze(-1), self.bits)
        return levels.mul_(scale.unsqueeze(-1)).sub_(self.groups).square_().sum(-1)
