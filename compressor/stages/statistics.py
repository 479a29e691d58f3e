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

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from compressor.algorithms.asymmetric import correction_strength
from compressor.algorithms.hessian import HessianAccumulator
from compressor.algorithms.side_by_side import side_by_side
from compressor.modeling.activations import ActivationStore
from compressor.modeling.block import Block, Observed, input_phases, inputs_of
from compressor.modeling.families import EXPERT
from compressor.modeling.paused import PausedRuns
from compressor.modeling.walk import Walk
from compressor.stages.expert_statistics import LAYER, LayerHessians, kind_of
from compressor.stages.group_sums import (
    Batch,
    GroupStatistics,
    GroupSums,
    Watched,
    num_lanes,
    summed,
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


@dataclass(frozen=True, slots=True)
class Collection:
    """Which statistics: with D or without, and group after group or all in one pass.

    final: once all groups were handed out and changed, the block is what will be stored; the
        compressed stream may then move on to its outputs.
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

    def columns(self, name: str) -> int:
        """Inputs of a linear of the block."""
        return self.block.linears[name].shape[1]


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
        watched = {group[0]: self._watched(pair, group) for group in groups}
        there = self._reference(pair, Watched.together(watched.values()))
        forwards = [self._forward(pair, rows) for rows in self.walk.batches()]
        with PausedRuns(pair.block, heads, forwards, device=self.walk.device) as runs:
            before: list[str] = []  # what passes run through up to the next stop
            for group in groups:
                lanes = self._lanes(pair, group, watched[group[0]])
                seen = {name: there.pop(name) for name in watched[group[0]].names}
                with pair.block.holding(before):
                    here = runs.inputs(group[0])
                before = group
                yield group, summed(lanes, self._batches(seen, here)).finish()
            if self.collection.final:
                with pair.block.holding(before):
                    finished = runs.outputs()
                    self.walk.take_outputs(self.streams.compressed, finished, pair.position)

    def _lanes(self, pair: _Pair, group: list[str], watched: Watched) -> list[GroupSums]:
        count = num_lanes(pair.columns(group[0]), self.walk.device)
        return [self._sums(pair, group, watched) for _ in range(count)]

    def _batches(self, there: dict[str, list[Tensor]], here: list[Tensor]) -> list[Batch]:
        """The micro-batches with calibration rows, without their measuring rows."""
        found: list[Batch] = []
        counted = (rows for rows in self.walk.batches() if rows.start < self.rows.stop)
        for index, rows in enumerate(counted):
            seen = {name: self._counted(rows, y[index]) for name, y in there.items()}
            x = here[index]
            found.append((self._counted(rows, x), seen, self._counted_mask(rows, x)))
        return found

    def _sums(self, pair: _Pair, group: list[str], watched: Watched) -> GroupSums:
        return GroupSums(pair.original, pair.columns(group[0]), watched, self.walk.device)

    def _forward(self, pair: _Pair, rows: slice) -> Callable[[], Tensor]:
        kwargs = self.walk.kwargs(rows, pair.position)
        return lambda: pair.block.run(self.streams.compressed.read(rows), kwargs)

    def _reference(self, pair: _Pair, watched: Watched) -> dict[str, list[Tensor]]:
        """What corrections need of the reference, by linear, batch by batch.

        Batches that only hold measuring rows keep nothing. The stream moves on: all was seen.
        """
        found: dict[str, list[Tensor]] = {name: [] for name in watched.names}
        if not found:
            return {}
        stream, position = self.streams.reference, pair.position

        def passed(observed: Observed) -> Iterator[Tensor]:
            passes = (
                partial(observed.run, stream.read(rows), self.walk.kwargs(rows, position))
                for rows in self.walk.batches()
            )
            done = side_by_side(passes, device=self.walk.device)
            for rows, (out, seen) in zip(self.walk.batches(), done, strict=True):
                for name, x in seen.items() if rows.start < self.rows.stop else ():
                    found[name].append(x)
                yield out

        all_watched = Observed(pair.original, watched.inputs, watched.outputs)
        with pair.original.holding(), all_watched as observed:
            self.walk.take_outputs(stream, passed(observed), position)
        return found

    def _watched(self, pair: _Pair, group: list[str]) -> Watched:
        """What of the reference the correction of a group needs: nothing, inputs or outputs.

        W D costs less than D if O < I, and comes of the outputs if the reference has this W.
        """
        if not self._wants_cross(pair, group[0]):
            return Watched((), ())
        here, there = pair.block.linears, pair.original.linears
        rows, columns = sum(here[n].shape[0] for n in group), pair.columns(group[0])
        if rows < columns and all(torch.equal(here[n].dense(), there[n].dense()) for n in group):
            return Watched((), tuple(group))
        return Watched((group[0],), ())

    def _wants_cross(self, pair: _Pair, name: str) -> bool:
        """Whether there can be enough tokens to correct the target; D is as much work as H."""
        tokens = self.rows.stop * self.walk.tokens.shape[1]
        strength, _ = correction_strength(tokens, pair.columns(name))
        return self.collection.asymmetric and strength > 0.0

    def _counted(self, rows: slice, x: Tensor) -> Tensor:
        """Of a batch [B, T, ...] of any rows those of calibration rows, [t, I]."""
        count = min(rows.stop, self.rows.stop) - rows.start
        return _flat(x)[: count * (x.shape[:-1].numel() // (rows.stop - rows.start))]

    def _counted_mask(self, rows: slice, x: Tensor) -> Tensor | None:
        """Which of the counted tokens are real; None if all are."""
        if self.walk.mask is None:
            return None
        if x.shape[:-1].numel() != self.walk.mask[rows].numel():
            raise ValueError(f"a linear sees {x.shape[:-1]} inputs for rows of padded tokens")
        return self.walk.mask[rows.start : min(rows.stop, self.rows.stop)].flatten()

    def _collect(
        self, pair: _Pair, phase: list[list[str]]
    ) -> Iterator[tuple[list[str], GroupStatistics]]:
        """Run the calibration rows from the block's start to a phase of groups."""
        position, block = pair.position, pair.block
        expert = EXPERT.match(phase[0][0]) is not None
        nothing = Watched((), ())
        sums = {
            g[0]: self._sums(pair, g, nothing if expert else self._watched(pair, g)) for g in phase
        }
        watched = Watched.together(s.watched for s in sums.values())
        for rows in self.walk.batches(self.rows):
            kwargs = self.walk.kwargs(rows, position)
            here = inputs_of(block, list(sums), self.streams.compressed.read(rows), kwargs)
            there = self._reference_batch(pair, rows, watched)
            for name, x in here.items():
                sums[name].add(_flat(x), there, self._mask(rows, x))
        layers = self._layers(pair, {name: s.total for name, s in sums.items()})
        for group in phase:
            of_group, layer = sums.pop(group[0]), layers.get(group[0])
            if layer is None:
                yield group, of_group.finish()
            else:
                yield group, GroupStatistics(layer, None, of_group.total.num_tokens, LAYER)

    def _reference_batch(self, pair: _Pair, rows: slice, watched: Watched) -> dict[str, Tensor]:
        """What corrections need of the reference for some rows, by linear."""
        if not watched.names:
            return {}
        hidden, kwargs = self.streams.reference.read(rows), self.walk.kwargs(rows, pair.position)
        if not watched.outputs:  # the pass may end at the last input
            seen = inputs_of(pair.original, list(watched.inputs), hidden, kwargs)
        else:
            with Observed(pair.original, watched.inputs, watched.outputs) as observed:
                _, seen = observed.run(hidden, kwargs)
        return {name: _flat(x) for name, x in seen.items()}

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


def calibration_rows(walk: Walk) -> slice:
    """Rows for statistics; the others measure. At least one row of each if there are two."""
    count = walk.tokens.shape[0]
    held_out = min(count - 1, max(1, count // HELD_OUT_SHARE))
    return slice(0, count - held_out)
