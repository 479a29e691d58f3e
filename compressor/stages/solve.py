"""Quantize the linears of one block: statistics, asymmetric target, grid, rounding.

Two streams of activations reach the block: x of the model as it was before the stage, and x~ of the
model whose earlier blocks are quantized already. For each group of linears that share an input

    H = mean x~ x~^T,   D = mean (x - x~) x~^T,   W* = W + a W D (H + r I)^-1,   Q = GPTQ(W*, H)

The group's linears are stacked along the outputs: same H, one factorisation, rows are independent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.algorithms.asymmetric import asymmetric_target, correction_strength
from compressor.algorithms.gptq import gptq
from compressor.algorithms.grid import Grid, minmax_grid, mse_grid, quantize
from compressor.algorithms.hessian import HessianAccumulator
from compressor.artifact.formats import SCALE_DTYPES, LayerFormat
from compressor.modeling.activations import ActivationStore
from compressor.modeling.block import Block, input_phases, inputs_of
from compressor.modeling.families import EXPERT
from compressor.modeling.walk import Walk
from compressor.recipe import QuantizeConfig

Formats = dict[str, LayerFormat]
HELD_OUT_SHARE = 8  # one row in eight measures candidates and calibrates nothing


@dataclass(frozen=True, slots=True)
class Streams:
    """Inputs of the block in the model before the stage and in the compressed one."""

    reference: ActivationStore
    compressed: ActivationStore


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """H, and D if the target is asymmetric, of one shared input; both [I, I] means over tokens."""

    hessian: Tensor
    cross: Tensor | None
    num_tokens: int


def make_grid(weight: Tensor, fmt: LayerFormat, kind: str) -> Grid:
    """Scales and zero points [O, G], already rounded to the stored dtype."""
    build = mse_grid if kind == "mse" else minmax_grid
    return build(
        weight,
        bits=fmt.bits,
        group_size=fmt.group_size,
        symmetric=fmt.symmetric,
        scale_dtype=SCALE_DTYPES[fmt.scale_dtype],
    )


def round_to_nearest(block: Block, formats: Formats, config: QuantizeConfig) -> dict[str, Any]:
    """Data-free: each weight to the nearest point of its grid."""
    facts = {}
    for name, fmt in formats.items():
        linear = block.linears[name]
        weight = linear.dense()
        grid = make_grid(weight, fmt, config.grid)
        codes = quantize(weight, grid)
        linear.set_codes(codes, grid.scale, grid.zero_point, fmt)
        facts[name] = {"bits": fmt.bits, "group_size": fmt.group_size, "method": "rtn"}
    return facts


class BlockSolver:
    """Quantizes the blocks of one walk with GPTQ; knows the streams and the calibration rows."""

    def __init__(self, walk: Walk, streams: Streams, config: QuantizeConfig, rows: slice) -> None:
        self.walk = walk
        self.streams = streams
        self.config = config
        self.rows = rows

    def solve(
        self, position: int, original: Block, block: Block, formats: Formats
    ) -> dict[str, Any]:
        """Quantize `block` in place; returns facts for each linear.

        Raises:
            NumericError: non-finite statistics (NU01).
        """
        facts: dict[str, Any] = {}
        first = next(self.walk.batches(self.rows))
        hidden = self.streams.compressed.read(first)
        phases = input_phases(block, hidden, self.walk.kwargs(first, position))
        wanted = [[[n for n in g if n in formats] for g in phase] for phase in phases]
        plan = [[g for g in phase if g] for phase in wanted]
        plan = [phase for phase in plan if phase]
        if not self.config.true_sequential:
            plan = [[g for phase in plan for g in phase]]
        for phase in plan:
            for group, statistics in self._collect(position, original, block, phase):
                facts.update(self._solve_group(block, group, formats, statistics))
        return facts

    def _collect(
        self, position: int, original: Block, block: Block, phase: list[list[str]]
    ) -> Iterator[tuple[list[str], GroupStatistics]]:
        heads = [group[0] for group in phase]
        cross = self.config.asymmetric_target and not EXPERT.match(heads[0])
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

    def _solve_group(
        self, block: Block, group: list[str], formats: Formats, statistics: GroupStatistics
    ) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        by_format: dict[LayerFormat, list[str]] = {}
        for name in group:
            by_format.setdefault(formats[name], []).append(name)
        for fmt, names in by_format.items():
            facts.update(self._solve_stack(block, names, fmt, statistics))
        return facts

    def _solve_stack(
        self, block: Block, names: list[str], fmt: LayerFormat, statistics: GroupStatistics
    ) -> dict[str, Any]:
        weight = torch.cat([block.linears[n].dense() for n in names])
        mask = weight != 0 if any(n in block.masked for n in names) else None
        target, strength = self._target(weight, statistics)
        grid = make_grid(target if mask is None else target * mask, fmt, self.config.grid)
        result = gptq(
            target, statistics.hessian, grid=grid, dampening=self.config.dampening, mask=mask
        )
        facts = {
            "bits": fmt.bits,
            "group_size": fmt.group_size,
            "method": "gptq",
            "num_tokens": statistics.num_tokens,
            "error": result.error,
            "num_dead": result.num_dead,
            "num_saturated": result.num_saturated,
            "dampening": result.factor.dampening_used,
            "factor": result.factor.reason,
            "strength": strength,
        }
        start = 0
        for name in names:
            rows = slice(start, start + block.linears[name].shape[0])
            parts = result.codes[rows], grid.scale[rows], grid.zero_point[rows]
            block.linears[name].set_codes(*parts, fmt)
            start = rows.stop
        rest = {**facts, "error": 0.0, "stacked_on": names[0]}
        return {name: facts if name == names[0] else rest for name in names}

    def _target(self, weight: Tensor, statistics: GroupStatistics) -> tuple[Tensor, float]:
        if statistics.cross is None:
            return weight, 0.0
        strength, ridge = correction_strength(statistics.num_tokens, weight.shape[1])
        if strength == 0.0:
            return weight, 0.0
        target = asymmetric_target(
            weight, statistics.hessian, statistics.cross, strength=strength, ridge=ridge
        )
        return target, strength


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).float()


def _statistics(total: HessianAccumulator, cross: bool, columns: int) -> GroupStatistics:
    """Means of the sums; a group that saw no token is rounded as if all inputs were alike."""
    if total.num_tokens == 0:
        return GroupStatistics(torch.eye(columns), None, 0)
    hessian = total.hessian()
    if total.num_tokens < 4 * columns and not cross:
        hessian = _shrink(hessian, total.num_tokens)
    return GroupStatistics(hessian, total.cross() if cross else None, total.num_tokens)


def _shrink(hessian: Tensor, num_tokens: int) -> Tensor:
    """Pull a Hessian of few tokens towards its diagonal: (1 - a) H + a diag(H), a = d / (d + n)."""
    share = hessian.shape[0] / (hessian.shape[0] + num_tokens)
    return (1 - share) * hessian + share * torch.diag(hessian.diagonal())


def calibration_rows(walk: Walk) -> slice:
    """Rows for statistics; the others measure. At least one row of each if there are two."""
    count = walk.tokens.shape[0]
    held_out = min(count - 1, max(1, count // HELD_OUT_SHARE))
    return slice(0, count - held_out)
