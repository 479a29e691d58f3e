"""What calibration tells about the linears of one block, group by group, in the order of the block.

Two streams of activations reach the block: x of the reference model and x~ of the model whose
earlier blocks are compressed already. For each group of linears that share an input

    H = mean x~ x~^T,   D = mean (x - x~) x~^T,   W* = W + a W D (H + r I)^-1.

Whoever iterates changes the linears of a group before asking for the next one; with `sequential`,
later groups then see the outputs of the changed ones.

While they are small, both streams go through the block once: the reference's inputs are kept, and
the compressed micro-batches wait at each group (`modeling.paused`). Larger ones, and blocks with
experts, are run again from their start for each group.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.algorithms.asymmetric import asymmetric_target, correction_strength
from compressor.algorithms.hessian import HessianAccumulator
from compressor.modeling.activations import ActivationStore
from compressor.modeling.block import Block, input_phases, inputs_of, run_observed
from compressor.modeling.families import EXPERT
from compressor.modeling.paused import PausedRuns
from compressor.modeling.walk import Walk
from compressor.stages.expert_statistics import (
    LAYER,
    NONE,
    OWN,
    SHRINK_BELOW,
    SHRUNK,
    LayerHessians,
    kind_of,
)

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

    Whoever has all targets sets `cross` to None: it is as large as H. `source` says which tokens
    H is of (`expert_statistics`); num_tokens counts those that the group itself saw.
    """

    hessian: Tensor
    cross: Tensor | None
    num_tokens: int
    source: str = OWN

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
    """Which statistics: with D or without, and group after group or all in one pass.

    final: once all groups were handed out and changed, the block is what will be stored; both
        streams may then move on to its outputs.
    """

    asymmetric: bool
    sequential: bool
    final: bool = False


@dataclass(frozen=True, slots=True)
class _Pair:
    """A block and what it was before the stage."""

    position: int
    original: Block
    block: Block


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
        first = slice(0, 1)
        hidden = self.streams.compressed.read(first)
        phases = input_phases(block, hidden, self.walk.kwargs(first, position))
        kept = [[[n for n in g if n in wanted] for g in phase] for phase in phases]
        plan = [[g for g in phase if g] for phase in kept]
        plan = [phase for phase in plan if phase]
        pair = _Pair(position, original, block)
        if self._may_wait(block, plan):
            yield from self._collect_waiting(pair, [g for phase in plan for g in phase])
            return
        if not self.collection.sequential:
            plan = [[g for phase in plan for g in phase]]
        for phase in plan:
            yield from self._collect(pair, phase)

    def _may_wait(self, block: Block, plan: list[list[list[str]]]) -> bool:
        """Whether one pass is possible (order known beforehand) and small enough.

        A waiting token holds about seven rows of the block's width and the widest input; the
        reference's token all inputs; masks that differ by row [T, T] come on top.
        """
        heads = [group[0] for phase in plan for group in phase]
        if not heads or not self.collection.sequential or any(map(EXPERT.match, block.linears)):
            return False
        widths = [block.linears[n].shape[1] for n in heads]
        count, length = self.walk.tokens.shape
        floats = 7 * self.streams.compressed.width + max(widths)
        floats += sum(widths) if self.collection.asymmetric else 0
        floats += length if self.walk.has_row_masks else 0
        return 4 * count * length * floats <= self.walk.options.pause_bytes

    def _collect_waiting(
        self, pair: _Pair, groups: list[list[str]]
    ) -> Iterator[tuple[list[str], GroupStatistics]]:
        """One pass of each stream through the block."""
        heads = [group[0] for group in groups]
        there = self._reference_inputs(pair, [n for n in heads if self._wants_cross(pair, n)])
        forwards = [self._forward(pair, rows) for rows in self.walk.batches()]
        with PausedRuns(pair.block, heads, forwards) as runs:
            for group in groups:
                head, columns = group[0], pair.block.linears[group[0]].shape[1]
                total = HessianAccumulator(columns, with_cross=head in there)
                batches = zip(self.walk.batches(), runs.inputs(head), strict=True)
                for index, (rows, x) in enumerate(batches):
                    if rows.start < self.rows.stop:
                        y = there[head][index] if head in there else None
                        total.add(*self._counted(rows, x, y))
                there.pop(head, None)
                yield group, _statistics(total, columns)
            if self.collection.final:
                outputs = runs.outputs()
                self.walk.take_outputs(self.streams.compressed, outputs, pair.position)

    def _forward(self, pair: _Pair, rows: slice) -> Callable[[], Tensor]:
        kwargs = self.walk.kwargs(rows, pair.position)
        return lambda: pair.block.run(self.streams.compressed.read(rows), kwargs)

    def _reference_inputs(self, pair: _Pair, heads: list[str]) -> dict[str, list[Tensor | None]]:
        """Inputs of `heads`, those that D is wanted of, in the reference, batch by batch.

        Batches that only hold measuring rows keep nothing. If `final`, the stream moves on.
        """
        found: dict[str, list[Tensor | None]] = {n: [] for n in heads}
        if not heads:
            return {}
        stream, position = self.streams.reference, pair.position

        def outputs() -> Iterator[Tensor]:
            for rows in self.walk.batches():
                kwargs = self.walk.kwargs(rows, position)
                out, seen = run_observed(pair.original, heads, stream.read(rows), kwargs)
                for name, x in seen.items():
                    found[name].append(x if rows.start < self.rows.stop else None)
                yield out

        if self.collection.final:
            self.walk.take_outputs(stream, outputs(), position)
        else:
            deque(outputs(), maxlen=0)
        return found

    def _wants_cross(self, pair: _Pair, name: str) -> bool:
        """Whether there can be enough tokens to correct the target; D is as much work as H."""
        tokens = self.rows.stop * self.walk.tokens.shape[1]
        columns = pair.block.linears[name].shape[1]
        return self.collection.asymmetric and correction_strength(tokens, columns)[0] > 0.0

    def _counted(
        self, rows: slice, x: Tensor, there: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of a batch of all rows the calibration tokens: x~ [t, I], x [t, I] and the mask [t]."""
        count, length = rows.stop - rows.start, self.walk.tokens.shape[1]
        part = slice(rows.start, min(rows.stop, self.rows.stop))
        kept = (part.stop - part.start) * (x.shape[:-1].numel() // count)
        mask = None if self.walk.mask is None else self.walk.mask[part].flatten()
        if mask is not None and kept != len(mask):
            raise ValueError(f"a linear sees {kept} inputs for {count} rows of {length} tokens")
        return _flat(x)[:kept], None if there is None else _flat(there)[:kept], mask

    def _collect(
        self, pair: _Pair, phase: list[list[str]]
    ) -> Iterator[tuple[list[str], GroupStatistics]]:
        """Run the calibration rows from the block's start to a phase of groups."""
        position, block = pair.position, pair.block
        heads = [group[0] for group in phase]
        expert = EXPERT.match(heads[0]) is not None
        cross = [] if expert else [n for n in heads if self._wants_cross(pair, n)]
        sums = {
            n: HessianAccumulator(block.linears[n].shape[1], with_cross=n in cross) for n in heads
        }
        for rows in self.walk.batches(self.rows):
            kwargs = self.walk.kwargs(rows, position)
            here = inputs_of(block, heads, self.streams.compressed.read(rows), kwargs)
            there = (
                inputs_of(pair.original, cross, self.streams.reference.read(rows), kwargs)
                if cross
                else {}
            )
            for name, x in here.items():
                y = _flat(there[name]) if name in there else None
                sums[name].add(_flat(x), y, self._mask(rows, x))
        layers = self._layers(pair, sums)
        for group in phase:
            total, columns = sums.pop(group[0]), block.linears[group[0]].shape[1]
            layer = layers.get(group[0])
            if layer is None:
                yield group, _statistics(total, columns)
            else:
                yield group, GroupStatistics(layer, None, total.num_tokens, LAYER)

    def _mask(self, rows: slice, x: Tensor) -> Tensor | None:
        if self.walk.mask is None or x.ndim != 3:
            return None
        return self.walk.mask[rows].flatten()

    def _layers(self, pair: _Pair, sums: dict[str, HessianAccumulator]) -> LayerHessians:
        """Statistics of whole layers for experts that saw too few tokens themselves."""
        few = [n for n, s in sums.items() if EXPERT.match(n)]
        few = [n for n in few if kind_of(sums[n].num_tokens, sums[n].columns) == LAYER]
        layers = LayerHessians(pair.block, few)
        for rows in self.walk.batches(self.rows) if few else ():
            kwargs = self.walk.kwargs(rows, pair.position)
            layers.add(self.streams.compressed.read(rows), kwargs)
        return layers


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).float()


def _statistics(total: HessianAccumulator, columns: int) -> GroupStatistics:
    """Means of the sums; a group that saw no token is rounded as if all inputs were alike."""
    if total.num_tokens == 0:
        return GroupStatistics(torch.eye(columns), None, 0, NONE)
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


def calibration_rows(walk: Walk) -> slice:
    """Rows for statistics; the others measure. At least one row of each if there are two."""
    count = walk.tokens.shape[0]
    held_out = min(count - 1, max(1, count // HELD_OUT_SHARE))
    return slice(0, count - held_out)
