"""Quantization-aware training: learn from codes that are there, straight through their rounding.

Gradients pass the rounding as if it were not there (Bengio et al. 2013, "Estimating or Propagating
Gradients Through Stochastic Neurons"). Positions are numbers of steps, not of weights:

    x = l0 + d v,      w^ = s a * nearest level(x)

with l0 the present level and d the distance of levels around it. A scale that grows does not move
x, so a code changes only when its own v says so, and a takes the gradient that frozen codes give.
`learned_rounding.py` has the other kind, which starts at the original weights.

# O out, I in, G groups
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.algorithms.float_grid import FloatGrid
from compressor.algorithms.grid import Grid, group_width
from compressor.algorithms.learned_rounding import LearnedWeight

HALVINGS = 12  # a weight further from its code than 2^11 half steps starts in the middle


class LatentWeight(LearnedWeight):
    """A weight [O, I] that starts exactly at codes and goes on learning from them; see above."""

    def __init__(
        self,
        codes: Tensor,
        grid: Grid | FloatGrid,
        *,
        scale_dtype: torch.dtype,
        near: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Start at codes uint8 [O, I], inside their cells as close to fp32 `near` as they allow."""
        width = group_width(codes.shape[1], grid.group_size)
        zero = grid.zero_point.unsqueeze(-1)
        levels = grid.levels(codes.reshape(len(codes), -1, width), zero)
        super().__init__(levels.flatten(1), grid, scale_dtype=scale_dtype, mask=mask)
        self.distance = _level_distance(levels, grid.bits) if isinstance(grid, FloatGrid) else None
        if near is not None:
            self._start_near(self._grouped(near) / grid.scale.unsqueeze(-1))

    def is_plain(self) -> bool:
        """x is made of levels."""
        return False

    def position(self, offset: Tensor, scale: Tensor) -> Tensor:
        """x [O, G, g]; no scale moves it."""
        return self._masked(self.groups + self.distances(offset))

    def drift(self, moved: Tensor, scale: Tensor) -> Tensor:
        """No scale moves x."""
        return torch.zeros_like(scale)

    def distances(self, moved: Tensor) -> Tensor:
        """Offsets are counted in distances of levels."""
        return moved if self.distance is None else moved * self.distance

    @torch.no_grad()
    def _start_near(self, target: Tensor) -> None:
        """Set offsets towards positions [O, G, g]; halve those that would leave their cell.

        Halving instead of cutting at the border: the codes that a solver moved away from their
        weight on purpose would all lie on it, and flip back at the first step.
        """
        offset = target - self.groups
        offset = offset if self.distance is None else offset / self.distance
        zero, held = self.grid.zero_point.unsqueeze(-1), self._masked(self.groups.clone())
        for _ in range(HALVINGS):
            self.offset.copy_(offset)
            position = self.position(self.offset, self.grid.scale.unsqueeze(-1))
            _, levels, clipped = self.grid.nearest(position, zero)
            offset = torch.where(clipped | (levels != held), offset / 2, offset)
        self.offset.copy_(torch.where(offset == self.offset, offset, 0.0))


def _level_distance(levels: Tensor, bits: int) -> Tensor:
    """From each level of e4m3 (8 bits) or e2m1 (4) to the next one away from zero."""
    mantissa, lowest = (3, -6) if bits == 8 else (1, 0)
    exponent = torch.frexp(levels).exponent - 1  # of zero: -1
    exponent = torch.where(levels == 0, lowest, exponent.clamp(min=lowest))
    return torch.ldexp(torch.ones_like(levels), exponent - mantissa)
