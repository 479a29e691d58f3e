"""Quantize the linears of one block: statistics, asymmetric target, grid, rounding.

For each group of linears that share an input, with H and W* of `statistics.py`,

    Q = GPTQ(W*, H);    pruned weights stay zero: W* is re-solved on the support first.

The group's linears are stacked along the outputs: same H, one factorisation, rows are independent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compressor.algorithms.float_grid import FloatGrid
from compressor.algorithms.gptq import gptq
from compressor.algorithms.grid import Grid, quantize
from compressor.algorithms.reconstruct import reconstruct
from compressor.artifact.formats import LayerFormat
from compressor.modeling.block import Block
from compressor.modeling.families import format_unit
from compressor.modeling.linears import StoredLinear
from compressor.modeling.walk import Walk
from compressor.recipe import QuantizeConfig
from compressor.stages.grids import check_scales, make_grid
from compressor.stages.group_sums import GroupStatistics
from compressor.stages.statistics import BlockStatistics, Collection, Streams

Formats = dict[str, LayerFormat]


def round_to_nearest(block: Block, formats: Formats, config: QuantizeConfig) -> dict[str, Any]:
    """Data-free: each weight to the nearest point of its grid."""
    facts = {}
    shared = _largest_of_units(block, formats)
    for name, fmt in formats.items():
        linear = block.linears[name]
        weight = linear.dense()
        grid = make_grid(weight, fmt, config.grid, largest=shared[name])
        raised = check_scales(grid, fmt, name)
        linear.set_rounded(quantize(weight, grid), grid, fmt)
        facts[name] = {"bits": fmt.bits, "group_size": fmt.group_size, "method": "rtn"} | raised
    return facts


def _largest_of_units(block: Block, formats: Formats) -> dict[str, float | None]:
    """The absmax over the linears that engines fuse: they share NVFP4's global scale."""
    found: dict[str, float] = {}
    units = {name: format_unit(name) for name, fmt in formats.items() if fmt.global_scales}
    for name, unit in units.items():
        found[unit] = max(found.get(unit, 0.0), float(block.linears[name].dense().abs().max()))
    return {name: found[units[name]] if name in units else None for name in formats}


class BlockSolver:
    """Quantizes the blocks of one walk with GPTQ; knows the streams and the calibration rows."""

    def __init__(self, walk: Walk, streams: Streams, config: QuantizeConfig, rows: slice) -> None:
        final = not config.learns  # learning changes the block once more
        collection = Collection(config.asymmetric_target, config.true_sequential, final=final)
        self.statistics = BlockStatistics(walk, streams, rows, collection)
        self.config = config

    def solve(
        self, position: int, original: Block, block: Block, formats: Formats
    ) -> dict[str, Any]:
        """Quantize `block` in place; returns facts for each linear.

        Raises:
            NumericError: non-finite statistics (NU01).
        """
        facts: dict[str, Any] = {}
        for group, statistics in self.statistics.groups(position, original, block, formats):
            facts.update(self._solve_group(block, group, formats, statistics))
        return facts

    def _solve_group(
        self, block: Block, group: list[str], formats: Formats, statistics: GroupStatistics
    ) -> dict[str, Any]:
        by_format: dict[LayerFormat, list[str]] = {}
        for name in group:
            by_format.setdefault(formats[name], []).append(name)
        jobs = {f: self._job(block, n, f, statistics) for f, n in by_format.items()}
        statistics.forget_drift()  # all targets are known
        facts: dict[str, Any] = {}
        for fmt, names in by_format.items():
            job, strength = jobs.pop(fmt)
            found = round_stack([block.linears[n] for n in names], job)
            found |= {"num_tokens": statistics.num_tokens, "strength": strength}
            found |= {"statistics": statistics.source}
            facts |= {n: found | {"error": 0.0, "stacked_on": names[0]} for n in names}
            facts[names[0]] = found
        return facts

    def _job(
        self, block: Block, names: list[str], fmt: LayerFormat, statistics: GroupStatistics
    ) -> tuple[Rounding, float]:
        """What to round for linears that are stacked, and the strength of the correction."""
        parts = [block.linears[n].dense() for n in names]
        weight = torch.cat(parts) if len(parts) > 1 else parts[0]
        del parts
        mask = weight != 0 if any(n in block.masked for n in names) else None
        target, strength = statistics.target(weight, names)
        if mask is not None:
            target = reconstruct(target, statistics.hessian, mask, start=weight)
        settings = (self.config.grid, self.config.dampening, names[0])
        return Rounding(target, statistics.hessian, fmt, mask, *settings), strength


@dataclass(frozen=True, slots=True, eq=False)
class Rounding:
    """What GPTQ is to round: target [O, I] with H [I, I], into a format; mask True = keep."""

    target: Tensor
    hessian: Tensor
    format: LayerFormat
    mask: Tensor | None = None
    grid: str = "mse"
    dampening: float = 0.01
    name: str = ""  # of the first linear, for messages


def round_stack(linears: list[StoredLinear], job: Rounding) -> dict[str, Any]:
    """Round linears stacked along their outputs; each then computes with its codes. Gives facts."""
    fmt, heights = job.format, [linear.shape[0] for linear in linears]
    grid = _stack_grid(job, heights)
    raised = check_scales(grid, fmt, job.name)
    result = gptq(job.target, job.hessian, grid=grid, dampening=job.dampening, mask=job.mask)
    start = 0
    for linear in linears:
        rows = slice(start, start + linear.shape[0])
        linear.set_rounded(result.codes[rows], grid.take(rows), fmt)
        start = rows.stop
    return {
        "bits": fmt.bits,
        "group_size": fmt.group_size,
        "method": "gptq",
        "error": result.error,
        "num_dead": result.num_dead,
        "num_saturated": result.num_saturated,
        "dampening": result.factor.dampening_used,
        "factor": result.factor.reason,
    } | raised


def _stack_grid(job: Rounding, heights: list[int]) -> Grid | FloatGrid:
    """The grid of stacked linears; square blocks begin anew with each of them."""
    weight = job.target if job.mask is None else job.target * job.mask
    if not job.format.block:
        return make_grid(weight, job.format, job.grid)
    parts = [make_grid(part, job.format, job.grid) for part in torch.split(weight, heights)]
    return replace(parts[0], scale=torch.cat([part.scale for part in parts]))
