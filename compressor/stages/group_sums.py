"""What is summed over calibration tokens for linears that share an input, and what becomes of it.

    H = mean x~ x~^T,   D = mean (x - x~) x~^T,   W* = W + a W D (H + r I)^-1

with x~ the input in the model that is being compressed and x that of the reference.

# t tokens, O out, I in
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from compressor.algorithms.asymmetric import asymmetric_target, correction_strength, target_of_drift
from compressor.algorithms.hessian import HessianAccumulator, OutputAccumulator
from compressor.algorithms.side_by_side import at_once, side_by_side
from compressor.modeling.block import Block
from compressor.stages.expert_statistics import NONE, OWN, SHRINK_BELOW, SHRUNK

NARROW = 1024  # columns; sums of wider inputs are large, and fill all threads by themselves

# inputs [t, I], what was watched by linear [t, I or O], and which tokens are real [t] (None: all)
Batch = tuple[Tensor, dict[str, Tensor], Tensor | None]


@dataclass(slots=True, eq=False)
class GroupStatistics:
    """H [I, I] of one shared input and, if the target is asymmetric, D; means over tokens.

    Where the group has fewer outputs than inputs, `drift` holds W D [O, I] by linear instead of D.
    Whoever has all targets calls `forget_drift`: D is as large as H. `source` says which tokens
    H is of (`expert_statistics`); num_tokens counts those that the group itself saw.
    """

    hessian: Tensor
    cross: Tensor | None
    num_tokens: int
    source: str = OWN
    drift: dict[str, Tensor] | None = None

    def target(self, weight: Tensor, names: list[str]) -> tuple[Tensor, float]:
        """W* of W [O, I], those of the stacked linears `names`; the strength (0: no correction)."""
        if self.cross is None and self.drift is None:
            return weight, 0.0
        strength, ridge = correction_strength(self.num_tokens, weight.shape[1])
        if strength == 0.0:
            return weight, 0.0
        how = {"strength": strength, "ridge": ridge}
        if self.drift is not None:
            drift = torch.cat([self.drift[n] for n in names])
            return target_of_drift(weight, self.hessian, drift, **how), strength
        assert self.cross is not None
        return asymmetric_target(weight, self.hessian, self.cross, **how), strength

    def forget_drift(self) -> None:
        """Free what only targets need."""
        self.cross, self.drift = None, None


@dataclass(frozen=True, slots=True)
class Watched:
    """Linears whose inputs, and linears whose outputs a correction needs of the reference."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of all of them."""
        return self.inputs + self.outputs

    @classmethod
    def together(cls, groups: Iterable[Watched]) -> Watched:
        """What several groups need, in one pass."""
        parts = list(groups)
        inputs = (name for part in parts for name in part.inputs)
        return cls(tuple(inputs), tuple(name for part in parts for name in part.outputs))


class GroupSums:
    """H of a group, and D or W D for its correction, batch by batch."""

    def __init__(
        self, original: Block, columns: int, watched: Watched, device: torch.device
    ) -> None:
        """Start at zero.

        Args:
            original: the block of the reference; what is watched are its linears.
            columns: I, inputs of the group in the block that is being compressed.
            watched: what `add` will get of the reference.
            device: where to sum.
        """
        self.watched, self._original = watched, original
        self._columns = columns
        heights = {n: original.linears[n].shape[0] for n in watched.outputs}
        cross = bool(watched.inputs)
        self.total = HessianAccumulator(columns, with_cross=cross, device=device)
        self._products = {
            n: OutputAccumulator(h, columns, device=device) for n, h in heights.items()
        }

    def add(self, x: Tensor, there: Mapping[str, Tensor], mask: Tensor | None) -> None:
        """Count inputs [t, I] and what was watched [t, I or O]; mask [t] True = real token."""
        inputs = [there[name] for name in self.watched.inputs]
        features = self.total.add(x, inputs[0] if inputs else None, mask)
        for name, product in self._products.items():
            product.add(there[name], features, mask)

    def merge(self, other: GroupSums) -> None:
        """Count what another one has counted, too."""
        self.total.merge(other.total)
        for name, product in self._products.items():
            product.merge(other._products[name])

    def finish(self) -> GroupStatistics:
        """Means of the sums, which are used up."""
        if not self._products:
            return _statistics(self.total, self._columns)
        num_tokens = self.total.num_tokens
        hessian, _ = self.total.finish()
        drift = {
            name: product.drift(self._original.linears[name].dense(), hessian)
            for name, product in self._products.items()
        }
        return GroupStatistics(hessian, None, num_tokens, drift=drift)


def num_lanes(columns: int, device: torch.device) -> int:
    """How many sums of a group with so many inputs to keep: one, or one for each thread."""
    return at_once(device) if columns <= NARROW else 1


def summed(lanes: Sequence[GroupSums], batches: Sequence[Batch]) -> GroupSums:
    """All batches in the first of `lanes`, which count equal shares of the tokens side by side."""
    total = sum(len(x) for x, _, _ in batches)

    def count(lane: int) -> None:
        start, stop = (total * n // len(lanes) for n in (lane, lane + 1))
        for x, seen, mask in batches:
            part = slice(max(start, 0), max(stop, 0))
            if part.start < min(part.stop, len(x)):
                of_mask = None if mask is None else mask[part]
                lanes[lane].add(x[part], {n: y[part] for n, y in seen.items()}, of_mask)
            start, stop = start - len(x), stop - len(x)

    if len(lanes) == 1:
        count(0)
    else:
        deque(side_by_side(partial(count, lane) for lane in range(len(lanes))), maxlen=0)
    first, *others = lanes
    for other in others:
        first.merge(other)
    return first


def _statistics(total: HessianAccumulator, columns: int) -> GroupStatistics:
    """Means of the sums; a group that saw no token is rounded as if all inputs were alike."""
    if total.num_tokens == 0:
        hessian, _ = total.finish()
        hessian.diagonal().fill_(1.0)
        return GroupStatistics(hessian, None, 0, NONE)
    num_tokens = total.num_tokens
    hessian, drift = total.finish()
    if drift is not None and correction_strength(num_tokens, columns)[0] == 0.0:
        return GroupStatistics(hessian, None, num_tokens)  # too few tokens for a correction
    if drift is None and num_tokens < SHRINK_BELOW * columns:
        return GroupStatistics(_shrink(hessian, num_tokens), None, num_tokens, SHRUNK)
    return GroupStatistics(hessian, drift, num_tokens)


def _shrink(hessian: Tensor, num_tokens: int) -> Tensor:
    """Pull a Hessian of few tokens towards its diagonal: (1 - a) H + a diag(H), a = d / (d + n)."""
    share = hessian.shape[0] / (hessian.shape[0] + num_tokens)
    diagonal = hessian.diagonal().clone()
    hessian.mul_(1 - share).diagonal().add_(share * diagonal)
    return hessian
