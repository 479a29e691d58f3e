"""How large the channels are that pairs of a block scale, and what rounding their readers costs.

Legend: I in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.algorithms.hessian import HessianAccumulator
from compressor.modeling.activations import ActivationStore
from compressor.modeling.block import input_phases, inputs_of
from compressor.modeling.families import EXPERT
from compressor.modeling.smooth_pairs import SmoothPair
from compressor.modeling.walk import Walk
from compressor.stages.transform_proof import Question


@dataclass(frozen=True, slots=True)
class Inputs:
    """Inputs of the present block, and which of the rows calibrate."""

    stream: ActivationStore
    rows: slice


@dataclass(slots=True, eq=False)
class InputSize:
    """What calibration tells about one input shared by `linears`.

    absolute_sum, absolute_max: [I] over tokens. hessian: mean x x^T [I, I].
    """

    linears: tuple[str, ...]
    absolute_sum: Tensor
    absolute_max: Tensor
    hessian: Tensor
    num_tokens: int


class _Accumulator:
    """Running sums of an `InputSize`."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.second = HessianAccumulator(columns, with_cross=False, device=device)
        self.absolute_sum = torch.zeros(columns, device=device)
        self.absolute_max = torch.zeros_like(self.absolute_sum)

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        rows = rows if mask is None or len(mask) != len(rows) else rows[mask]
        self.second.add(rows)
        if len(rows):
            self.absolute_sum += rows.abs().sum(0)
            self.absolute_max = torch.maximum(self.absolute_max, rows.abs().amax(0))

    def finish(self, linears: Sequence[str]) -> InputSize:
        count = self.second.num_tokens
        hessian, _ = self.second.finish()
        return InputSize(tuple(linears), self.absolute_sum, self.absolute_max, hessian, count)


def collect(
    walk: Walk, inputs: Inputs, question: Question, pairs: Sequence[SmoothPair]
) -> Iterator[tuple[SmoothPair, list[InputSize]]]:
    """Each pair with the statistics of its readers' inputs, as soon as all of them are known."""
    block, position, one = question.block, question.position, slice(0, 1)
    wanted = {n: p for p in pairs for n in p.readers if n in block.linears}
    missing = {id(p): sum(1 for n in p.readers if n in block.linears) for p in pairs}
    gathered: dict[int, list[InputSize]] = {id(p): [] for p in pairs}
    phases = input_phases(block, inputs.stream.read(one), walk.kwargs(one, position))
    if not any(map(EXPERT.match, block.linears)):  # one pass; experts' matrices come in two
        phases = [[group for phase in phases for group in phase]]
    for phase in phases:
        groups = [[n for n in g if n in wanted] for g in phase]
        groups = [g for g in groups if g]
        sums = {g[0]: _Accumulator(block.linears[g[0]].shape[1], walk.device) for g in groups}
        for part in walk.batches(inputs.rows) if sums else ():
            seen = inputs_of(block, [*sums], inputs.stream.read(part), walk.kwargs(part, position))
            mask = None if walk.mask is None else walk.mask[part].flatten()
            for name, x in seen.items():
                sums[name].add(x, mask)
        for group in groups:
            pair = wanted[group[0]]
            gathered[id(pair)].append(sums.pop(group[0]).finish(group))
            missing[id(pair)] -= len(group)
            if not missing[id(pair)]:
                yield pair, gathered.pop(id(pair))
