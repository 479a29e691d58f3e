"""What calibration tells about the linears of one block, group by group, in the order of the block.

Two streams of activations reach the block: x of the reference model and x~ of the model whose
earlier blocks are compressed already. For each group of linears that share an input

    H = mean x~ x~^T,   D = mean (x - x~) x~^T,   W* = W + a W D (H + r I)^-1.

Whoever iterates changes the linears of a group before asking for the next one; with `sequential`,
later groups then see the outputs of the changed ones.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.algorithms.asymmetric import asymmetric_target, correction_strength
from compressor.algorithms.hessian import HessianAccumulator
from compressor.modeling.activations import ActivationStore
from compressor.modeling.block import Block, input_phases, inputs_of
from compressor.modeling.families import EXPERT
from compressor.modeling.walk import Walk

HELD_OUT_SHARE = 8  # one row in eight measures candidates and calibrates nothing


@dataclass(frozen=True, slots=True)
class Streams:
    """Inputs of the block in the model before the stage and in the compressed one."""

    reference: ActivationStore
    compressed: ActivationStore

    def close(self) -> None:
        """Remove their files, if there are any."""
        self.reference.close()
        self.compressed.close()


@dataclass(slots=True, eq=False)
class GroupStatistics:
    """H, and D if the target is asymmetric, of one shared input; both [I, I] means over tokens.

    Whoever has all targets sets `cross` to None: it is as large as H.
    """

    hessian: Tensor
    cross: Tensor | None
    num_tokens: int

    def target(self, weight: Tensor) -> tuple[Tensor, float]:
        """W* [O, I] for W [O, I], and the strength of the correction (0 without D)."""
        if self.cross is None:
            return weight, 0.0
        strength, ridge = correction_strength(self.num_tokens, weight.shape[1])
        if strength == 0.0:
            return weight, 0.0
        corrected = asymmetric_target(
            weight, self.hessian, self.cross, strength=strength, ridge=ridge
        )
        return corrected, strength


@dataclass(frozen=True, slots=True)
class Collection:
    """Which statistics: with D or without, and group after group or all in one pass."""

    asymmetric: bool
    sequential: bool


class BlockStatistics:
    """Collects statistics for the blocks of one walk; knows the streams and calibration rows."""

    def __init__(self, walk: Walk, streams: Streams, rows: slice, collection: Collection) -> None:
        self.walk = walk
        self.streams = streams
        self.rows = rows
        self.collection = collection

    def groups(
        self, position: int, original: Block, block: Block, wanted: Container[str]
    ) -> Iterator[tuple[list[str], GroupStatistics]]:
        """Groups of wanted linears with the same input, and their statistics.

        Raises:
            NumericError: non-finite statistics (NU01).
        """
        first = next(self.walk.batches(self.rows))
        hidden = self.streams.compressed.read(first)
        phases = input_phases(block, hidden, self.walk.kwargs(first, position))
        kept = [[[n for n in g if n in wanted] for g in phase] for phase in phases]
        plan = [[g for g in phase if g] for phase in kept]
        plan = [phase for phase in plan if phase]
        if not self.collection.sequential:
            plan = [[g for phase in plan for g in phase]]
        for phase in plan:
            yield from self._collect(position, original, block, phase)

    def _collect(
        self, position: int, original: Block, block: Block, phase: list[list[str]]
    ) -> Iterator[tuple[list[str], GroupStatistics]]:
        heads = [group[0] for group in phase]
        cross = self.collection.asymmetric and not EXPERT.match(heads[0])
        sums = {
            n: HessianAccumulator(block.linears[n].shape[1], with_cross=cross, device="cpu")
            for n in heads
        }
        for rows in self.walk.batches(self.rows):
            kwargs = self.walk.kwargs(rows, position)
            here = inputs_of(block, heads, self.streams.compressed.read(rows), kwargs)
            there = (
                inputs_of(original, heads, self.streams.reference.read(rows), kwargs)
                if cross
                else {}
            )
            for name, x in here.items():
                sums[name].add(_flat(x), _flat(there[name]) if cross else None, self._mask(rows, x))
        for group in phase:
            total = sums.pop(group[0])
            yield group, _statistics(total, cross, block.linears[group[0]].shape[1])

    def _mask(self, rows: slice, x: Tensor) -> Tensor | None:
        if self.walk.mask is None or x.ndim != 3:
            return None
        return self.walk.mask[rows].flatten()


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).float()


def _statistics(total: HessianAccumulator, cross: bool, columns: int) -> GroupStatistics:
    """Means of the sums; a group that saw no token is rounded as if all inputs were alike."""
    if total.num_tokens == 0:
        return GroupStatistics(torch.eye(columns), None, 0)
    num_tokens = total.num_tokens
    hessian, drift = total.finish()
    if drift is not None and correction_strength(num_tokens, columns)[0] == 0.0:
        drift = None  # too few tokens to learn a correction from
    if num_tokens < 4 * columns and not cross:
        hessian = _shrink(hessian, num_tokens)
    return GroupStatistics(hessian, drift, num_tokens)


def _shrink(hessian: Tensor, num_tokens: int) -> Tensor:
    """Pull a Hessian of few tokens towards its diagonal: (1 - a) H + a diag(H), a = d / (d + n)."""
    share = hessian.shape[0] / (hessian.shape[0] + num_tokens)
    diagonal = hessian.diagonal().clone()
    hessian.mul_(1 - share).diagonal().add_(share * diagonal)
    return hessian


def calibration_rows(walk: Walk) -> slice:
    """Rows for statistics; the others measure. At least one row of each if there are two."""
    count = walk.tokens.shape[0]
    held_out = min(count - 1, max(1, count // HELD_OUT_SHARE))
    return slice(0, count - held_out)
