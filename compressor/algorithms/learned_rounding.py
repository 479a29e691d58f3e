"""Learned rounding: let gradients decide which weights round up, and how long each step is.

    x = w / (s a) + v,      w^ = s a * nearest level(x)

``w`` are the original weights and ``s`` a searched grid; ``v`` [O, I] starts at 0 and ``a`` [O, G]
at 1, so the first w^ is round-to-nearest. Rounding passes gradients straight through; a clipped
weight gets none for ``v``. The idea is SignRound's (Cheng et al. 2023, "Optimize Weight Rounding
via Signed Gradient Descent"); here Adam takes the steps, which needs half as many of them for the
same result, and the loss measures a block's output in the metric of the model's own uncertainty.

That metric: if a block's output moves by e, the divergence of the final distribution is to second
order KL ~ 1/2 e^T F e with the Fisher matrix F = E[g g^T], g the gradient of log p(y) for tokens y
drawn from the model. Some models have F concentrated on few directions; errors there are learned
by heart and the rest is left to chance, so a power p < 1 evens it out, and it is mixed with I:

    M = (1 - m) F^p / mean(diag F^p) + m I = L L^T,      loss = mean (e L)^2.

The state that is kept is the best one on held-out data; the start is one of the candidates.

# O out, I in, G groups, D width of the block's output
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.algorithms import products
from compressor.algorithms.finite import require_finite
from compressor.algorithms.float_grid import FloatGrid
from compressor.algorithms.grid import Grid, as_stored, group_width
from compressor_kernels import native
from compressor_kernels.native_rounding import learned_gradients, learned_values

POWER = 0.7  # p; with 1 the reference model lost 7 % more, with 0.5 babyllama 1 % more
IDENTITY_SHARE = 0.1  # m; 0.3 and 0.05 were within 2 % of it, 1.0 (plain squares) 12 % worse
BETAS = (0.9, 0.95)
FACTOR_RANGE = (0.5, 1.5)
OFFSET_LIMIT = 1.0


class _Rounding(torch.autograd.Function):
    """w^ = s * nearest level(x) with straight-through gradients, written out.

    With g the gradient of w^ and c = 0 where x was clipped, 1 elsewhere,

        dx = c s g,      ds = sum over the group of  g level + dx dx/ds.

    Autograd finds the same in twice as many passes over memory, and the weights are most of what a
    step touches.
    """

    @staticmethod
    def forward(ctx, offset: Tensor, scale: Tensor, weight: LearnedWeight) -> Tensor:  # type: ignore[no-untyped-def]
        spread = scale.unsqueeze(-1)
        position = weight.position(offset, spread)
        _, levels, clipped = weight.grid.nearest(position, weight.grid.zero_point.unsqueeze(-1))
        ctx.weight = weight
        ctx.save_for_backward(scale, levels, clipped)
        return (levels * spread).flatten(1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[no-untyped-def]
        scale, levels, clipped = ctx.saved_tensors
        weight: LearnedWeight = ctx.weight
        grouped = gradient.reshape(levels.shape)
        moved = (grouped * scale.unsqueeze(-1)).masked_fill_(clipped, 0)
        moved = moved if weight.kept is None else moved.mul_(weight.kept)
        step = None
        if ctx.needs_input_grad[1]:
            step = (grouped * levels).sum(-1) + weight.drift(moved, scale)
        return weight.distances(moved), step, None


class _RoundingInC(torch.autograd.Function):
    """`_Rounding` on a uniform grid, in one pass over memory each way."""

    @staticmethod
    def forward(ctx, offset: Tensor, scale: Tensor, weight: LearnedWeight) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.groups, ctx.grid = weight.groups, weight.uniform(scale)
        ctx.save_for_backward(offset)
        return learned_values(ctx.groups, offset, ctx.grid).flatten(1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        (offset,) = ctx.saved_tensors
        grouped = gradient.reshape(offset.shape)
        moved, step = learned_gradients(ctx.groups, offset, ctx.grid, grouped)
        return moved, step, None


class LearnedWeight:
    """A weight [O, I] whose rounding onto a grid is learned; mask True = keep.

    The factors stay 1 where scales are powers of two or lie under a global scale.
    """

    def __init__(
        self,
        weight: Tensor,
        grid: Grid | FloatGrid,
        *,
        scale_dtype: torch.dtype,
        mask: Tensor | None = None,
    ) -> None:
        """Start at round-to-nearest of fp32 `weight` on `grid`."""
        self.grid, self.scale_dtype = grid, scale_dtype
        self.width = group_width(weight.shape[1], grid.group_size)
        self.kept = None if mask is None else self._grouped(mask.to(weight.dtype))
        self.groups = self._grouped(weight if mask is None else weight * mask)
        self.offset = torch.zeros_like(self.groups).requires_grad_()
        self.factor = torch.ones_like(grid.scale).requires_grad_(isinstance(grid, Grid))

    def value(self) -> Tensor:
        """w^ [O, I] as it would be stored now; differentiable in `offset` and `factor`."""
        function = _RoundingInC if self.is_plain() else _Rounding
        value: Tensor = function.apply(self.offset, self.scale(), self)  # type: ignore[no-untyped-call]
        return value

    def is_plain(self) -> bool:
        """Whether x = w / (s a) + v on a uniform grid, without a mask, where C can compute it."""
        on_cpu = self.groups.device.type == "cpu" and native.library() is not None
        return on_cpu and isinstance(self.grid, Grid) and self.kept is None

    def uniform(self, scale: Tensor) -> tuple[Tensor, Tensor, int]:
        """The uniform grid with these scales [O, G]: scale, zero, largest code."""
        return scale.detach(), self.grid.zero_point.float(), (1 << self.grid.bits) - 1

    @torch.no_grad()
    def rounded(self) -> tuple[Tensor, Grid | FloatGrid]:
        """Codes uint8 [O, I] and the grid with the learned scales."""
        scale = self.scale()
        position = self.position(self.offset, scale.unsqueeze(-1))
        codes = self.grid.nearest(position, self.grid.zero_point.unsqueeze(-1))[0].flatten(1)
        return codes, replace(self.grid, scale=scale)

    def clamp(self) -> None:
        """Keep offsets and factors in their ranges."""
        with torch.no_grad():
            self.offset.clamp_(-OFFSET_LIMIT, OFFSET_LIMIT)
            self.factor.clamp_(*FACTOR_RANGE)

    def scale(self) -> Tensor:
        """Scales [O, G] as they are stored; their rounding passes gradients straight through."""
        if not isinstance(self.grid, Grid):
            return self.grid.scale
        smooth = self.grid.scale * self.factor
        stored = as_stored(smooth.detach(), self.scale_dtype).to(smooth.dtype)
        return stored + (smooth - smooth.detach())

    def position(self, offset: Tensor, scale: Tensor) -> Tensor:
        """x [O, G, g] for offsets [O, G, g] and scales [O, G, 1]."""
        return self._masked(torch.div(self.groups, scale).add_(offset))

    def drift(self, moved: Tensor, scale: Tensor) -> Tensor:
        """How x as a function of the scale carries its gradient [O, G, g] to scales [O, G]."""
        return (moved * self.groups).sum(-1).div_(scale * scale).neg_()

    def distances(self, moved: Tensor) -> Tensor:
        """The gradient of offsets for that of x, both [O, G, g]."""
        return moved

    def _masked(self, position: Tensor) -> Tensor:
        return position if self.kept is None else position.mul_(self.kept)

    def _grouped(self, values: Tensor) -> Tensor:
        return values.reshape(len(values), -1, self.width)


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast to learn; rates fall linearly to 0.

    Args:
        steps: number of steps.
        rate: of offsets, in steps of the grid. factor_rate: of scale factors.
        judge_every: steps between two looks at the held-out loss in the second half; at the high
            rates of the first half no state is the best one.
    """

    steps: int
    rate: float
    factor_rate: float
    judge_every: int = 25

    def judges(self, done: int) -> bool:
        """Whether to look at the held-out loss after so many steps."""
        return done == self.steps or (2 * done > self.steps and done % self.judge_every == 0)


@dataclass(frozen=True, slots=True)
class Learned:
    """Held-out loss before and at the best step, and which step that was (0 = the start)."""

    before: float
    after: float
    best_step: int


def learn(
    weights: list[LearnedWeight],
    loss: Callable[[int], Tensor],
    judge: Callable[[], float],
    schedule: Schedule,
) -> Learned:
    """Learn the rounding of several weights together; they are left in their best state.

    Args:
        weights: what is learned.
        loss: the training loss of step i (0-based), a scalar with a graph.
        judge: the held-out loss of the present state.
        schedule: steps and rates.
    """
    offsets, factors = [w.offset for w in weights], _trained(w.factor for w in weights)
    groups = [{"params": offsets, "rate": schedule.rate}]
    groups += [{"params": factors, "rate": schedule.factor_rate}] if factors else []
    optimizer = torch.optim.Adam(groups, lr=schedule.rate, betas=BETAS)
    before = best = judge()
    kept, best_step = _copy(offsets + factors), 0
    for step in range(schedule.steps):
        optimizer.zero_grad(set_to_none=True)
        value = loss(step)
        require_finite(value.detach(), "the loss of learned rounding")
        value.backward()  # type: ignore[no-untyped-call]
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * (1 - step / schedule.steps)
        optimizer.step()
        for weight in weights:
            weight.clamp()
        if schedule.judges(step + 1):
            found = judge()
            if found < best:
                best, best_step, kept = found, step + 1, _copy(offsets + factors)
    with torch.no_grad():
        for parameter, value in zip(offsets + factors, kept, strict=True):
            parameter.copy_(value)
    return Learned(before, best, best_step)


def _trained(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p for p in parameters if p.requires_grad]


def _copy(parameters: list[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def metric_factor(
    second_moment: Tensor, *, power: float = POWER, identity_share: float = IDENTITY_SHARE
) -> Tensor:
    """L fp32 [D, D] with M = L L^T of the module's docstring.

    second_moment: F = E[g g^T], fp32 or fp64 [D, D]; all zero gives the identity. Raises
    NumericError NU01 if it is not finite.
    """
    require_finite(second_moment, "the gradients at a block's output")
    if not second_moment.any():
        return torch.eye(len(second_moment), device=second_moment.device)
    values, vectors = torch.linalg.eigh((second_moment + second_moment.t()).double() / 2)
    values = values.clamp_(min=0).pow_(power)  # their mean is that of the diagonal of F^p
    mixed = (1 - identity_share) * values / values.mean() + identity_share
    factor: Tensor = vectors * mixed.sqrt()
    return factor.float()


def squared_error(error: Tensor, factor: Tensor, *, trimmed: float = 0.0) -> Tensor:
    """Mean of (e L)^2 for e [n, D]; without the share `trimmed` of largest elements.

    A few tokens (the first ones of a sequence) can be so far off that they alone would decide.
    """
    square = products.linear(error, factor.T).square()
    count = math.ceil(trimmed * square.numel())
    if count == 0:
        return square.mean()
    limit = square.detach().flatten().topk(count).values[-1]
    kept = square < limit
    return (square * kept).sum() / kept.sum().clamp(min=1)
