"""AWQ and SmoothQuant: scales between a source of channels and its readers, block by block.

For each pair of `modeling/smooth_pairs.py` the source's channels are divided by s and the readers'
columns multiplied by it. The statistics are those of the model as it is: the transform does not
change any activation that another pair reads, so pairs are searched independently.

16-bit checkpoints: s is a power of two, which neither the gain, the rows nor the columns feel. A
gain stored as 1 + w (Gemma) is rounded first, and s is read back from what the norm can hold.

Legend: O out, I in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compressor.algorithms.grid import dequantize, minmax_grid, quantize
from compressor.algorithms.scaling import (
    Channels,
    Choice,
    Reader,
    RoundTrip,
    power_of_two,
    search_scales,
    smoothquant_scales,
)
from compressor.artifact.formats import GROUP_SIZES
from compressor.errors import UnsupportedError, Where
from compressor.modeling.block import Block, load_block
from compressor.modeling.smooth_pairs import SmoothPair, find_pairs
from compressor.modeling.state import BlockTensors
from compressor.modeling.walk import Walk
from compressor.recipe import TransformConfig
from compressor.stages.context import StageContext, StageReport
from compressor.stages.selection import stored_dtype
from compressor.stages.statistics import calibration_rows
from compressor.stages.transform_inputs import Inputs, InputSize, collect
from compressor.stages.transform_proof import TOLERANCE, BlockWeights, Question, Witness


def scale_model(config: TransformConfig, context: StageContext) -> StageReport:
    """Scale every block; the outer tensors stay as they are.

    Raises:
        UnsupportedError: a pair that the recipe names changes what a block computes (CK26).
        NumericError: activations or scaled weights are not finite.
    """
    assert context.tokens is not None, "the recipe's order rules demand a calibrate stage"
    walk = Walk(context.state, context.tokens, context.walk_options())
    stream, witness = walk.open_stream("inputs"), Witness(context, context.state)
    scaler = BlockScaler(config, walk, exact=_exact(config, context))
    state = context.state
    pairs: dict[str, Any] = {}
    notes: list[str] = []
    for position in range(walk.num_blocks):
        source = context.state.read_block(position, walk.skeleton)
        block = load_block(walk.skeleton, position, source)
        unit = f"block-{position:04d}"
        if not context.run.is_done(unit):
            inputs = Inputs(stream, scaler.rows)
            tensors, facts = scaler.scale(source, inputs, witness.question(position, block))
            context.run.commit(unit, tensors.tensors, {**tensors.meta(), **facts})
        meta = context.run.meta(unit)
        state = state.with_block(position, context.run.file(unit), meta)
        witness.advance(position, block, state.read_block(position, walk.skeleton))
        walk.advance(stream, block, position)
        pairs |= {f"{walk.block_name(position)}.{n}": f for n, f in meta["pairs"].items()}
        notes += [n for n in meta["notes"] if n not in notes]
        context.run.progress({"unit": unit, "index": position + 1, "total": walk.num_blocks})
    stream.close()
    facts = {"pairs": pairs, "rounding_kl": witness.divergence(), "notes": notes}
    return StageReport(replace(state, trail=(*state.trail, "transform")), facts)


def _exact(config: TransformConfig, context: StageContext) -> bool:
    """Whether only powers of two are allowed."""
    if config.scales != "auto":
        return config.scales == "power_of_two"
    return stored_dtype(context.state) not in ("F32", "F64")


class BlockScaler:
    """Finds, proves, searches and applies the scales of one block after another."""

    def __init__(self, config: TransformConfig, walk: Walk, *, exact: bool) -> None:
        self.config = config
        self.walk = walk
        self.exact = exact
        self.rows = calibration_rows(walk)

    def scale(
        self, source: BlockTensors, inputs: Inputs, question: Question
    ) -> tuple[BlockTensors, dict[str, Any]]:
        """The scaled tensors of a block, and facts: its pairs, notes and the proven difference."""
        block = question.block
        pairs, notes = self._proven(source, question)
        weights, facts = BlockWeights.of(source, block), {}
        for pair, sizes in collect(self.walk, inputs, question, pairs):
            choice = self._choose(block, pair, sizes)
            s = apply_scales(weights, pair, choice.scales, source)
            facts[pair.source] = _pair_facts(pair, choice, s)
        difference = question.difference(weights)
        if difference > TOLERANCE:
            raise _unfaithful(self.walk, question, "its scaled weights", difference)
        return weights.stored(source), {"pairs": facts, "notes": notes, "difference": difference}

    def _proven(
        self, source: BlockTensors, question: Question
    ) -> tuple[list[SmoothPair], list[str]]:
        """Pairs of the wanted kinds that leave the block's output alone under random scales."""
        found = find_pairs(
            question.block, question.hidden, question.kwargs, self.walk.skeleton.model.config
        )
        found = [p for p in found if any(n in question.block.linears for n in p.readers)]
        proven: list[SmoothPair] = []
        notes: list[str] = []
        for kind in self.config.chosen_pairs:
            pairs = [p for p in found if p.kind == kind]
            if not pairs:
                notes.append(f"{self.walk.skeleton.model_type} has no {kind} pair to scale")
                continue
            difference = _random_difference(source, question, pairs)
            if difference <= TOLERANCE:
                proven += pairs
            elif self.config.pairs is not None or kind == "norm":
                raise _unfaithful(self.walk, question, f"a {kind} pair", difference)
            else:
                notes.append(
                    f"{kind} pairs of {self.walk.skeleton.model_type} are left alone: "
                    "scaling them changes what a block computes"
                )
        return proven, notes

    def _choose(self, block: Block, pair: SmoothPair, sizes: Sequence[InputSize]) -> Choice:
        total = sum(size.num_tokens for size in sizes)
        if not total:
            ones = torch.ones_like(pair.gather(sizes[0].absolute_sum))
            return Choice(ones, 0.0, False, 0.0, 0.0)
        if self.config.method == "smoothquant":
            return self._smoothquant(block, pair, sizes)
        readers = []
        for size in sizes:
            hessian = size.hessian.mul_(size.num_tokens / total)
            readers += [Reader(block.linears[n].dense(), hessian) for n in size.linears]
        columns = torch.stack([r.weight.abs().mean(0) for r in readers]).mean(0)
        absolute = torch.stack([size.absolute_sum for size in sizes]).sum(0) / total
        return search_scales(
            readers,
            Channels(pair.gather(absolute), pair.gather(columns), pair.spread),
            round_trip=self._round_trip(len(columns)),
            grid_points=self.config.grid_points,
            exact=self.exact,
        )

    def _smoothquant(self, block: Block, pair: SmoothPair, sizes: Sequence[InputSize]) -> Choice:
        linears = [n for size in sizes for n in size.linears]
        largest = torch.stack([size.absolute_max for size in sizes]).amax(0)
        columns = torch.stack([block.linears[n].dense().abs().amax(0) for n in linears]).amax(0)
        scales = smoothquant_scales(
            pair.gather(largest), pair.gather(columns), alpha=self.config.alpha
        )
        chosen = power_of_two(scales) if self.exact else scales
        return Choice(chosen, self.config.alpha, True, 0.0, 0.0)

    def _round_trip(self, columns: int) -> RoundTrip:
        config, group = self.config, fitting_group(self.config.group_size, columns)

        def round_trip(weight: Tensor) -> Tensor:
            grid = minmax_grid(
                weight,
                bits=config.bits,
                group_size=group,
                symmetric=config.symmetric,
                scale_dtype=torch.float32,
            )
            return dequantize(quantize(weight, grid), grid)

        return round_trip


def fitting_group(group_size: int, columns: int) -> int:
    """The group size itself, or the largest smaller one that tiles the columns, or -1."""
    if group_size == -1:
        return -1
    fits = [g for g in GROUP_SIZES if 0 < g <= group_size and columns % g == 0]
    return max(fits, default=-1)


def _pair_facts(pair: SmoothPair, choice: Choice, scales: Tensor) -> dict[str, Any]:
    return {
        "kind": pair.kind,
        "readers": len(pair.readers),
        "exponent": choice.exponent,
        "with_weights": choice.with_weights,
        "error_before": choice.error_before,
        "error": choice.error,
        "largest_scale": float(scales.max()),
        "smallest_scale": float(scales.min()),
    }


def apply_scales(
    weights: BlockWeights, pair: SmoothPair, scales: Tensor, source: BlockTensors | None = None
) -> Tensor:
    """Divide the source's channels by s and multiply the readers' columns; gives the s applied.

    Args:
        weights: changed in place.
        pair: whom to scale.
        scales: [channels] positive.
        source: the block as stored; a norm's new gain is then rounded to its dtype, and s follows.
    """
    if pair.kind == "norm":
        scales = _scale_norm(weights, pair, scales, source)
    else:
        assert pair.rows is not None, "a source linear knows its rows"
        matrix, bias = weights.matrix(pair.source), weights.bias(pair.source)
        matrix[pair.rows] = matrix[pair.rows] / scales[:, None]
        if bias is not None:
            bias[pair.rows] = bias[pair.rows] / scales
    columns = pair.spread(scales)
    for reader in pair.readers:
        weights.matrix(reader).mul_(columns)
    return scales


def _scale_norm(
    weights: BlockWeights, pair: SmoothPair, scales: Tensor, source: BlockTensors | None
) -> Tensor:
    name = f"{pair.source}.weight"
    gain = weights.tensors[name] + pair.offset
    stored = gain / scales - pair.offset
    if source is not None:
        stored = stored.to(source.tensors[name].dtype).float()
    dead = (gain == 0) | (stored + pair.offset == 0)
    stored = torch.where(dead, weights.tensors[name], stored)
    ones = torch.ones_like(scales)
    applied = torch.where(dead, ones, gain / torch.where(dead, ones, stored + pair.offset))
    weights.tensors[name] = stored
    bias = weights.bias(pair.source)
    if bias is not None:
        bias.div_(applied)
    return applied


def _random_difference(
    source: BlockTensors, question: Question, pairs: Sequence[SmoothPair]
) -> float:
    """How far the block's output moves under random scales between 1/2 and 2."""
    weights = BlockWeights.of(source, question.block)
    generator = torch.Generator().manual_seed(question.position)
    for pair in pairs:
        columns = question.block.linears[_linear(question.block, pair)].shape[1]
        channels = len(pair.gather(torch.ones(columns)))
        scales = torch.exp2(2 * torch.rand(channels, generator=generator) - 1)
        apply_scales(weights, pair, scales.to(question.hidden.device))
    return question.difference(weights)


def _linear(block: Block, pair: SmoothPair) -> str:
    return next(n for n in pair.readers if n in block.linears)


def _unfaithful(walk: Walk, question: Question, what: str, by: float) -> UnsupportedError:
    return UnsupportedError(
        f"{walk.skeleton.model_type}: {what} would change the output of "
        f"{walk.block_name(question.position)} (by {by:.1e} of what the block adds)",
        code="CK26",
        where=Where(key=walk.block_name(question.position)),
        why="Something besides the linears found reads the channels. Nothing was changed.",
        fix="leave the transform stage out, or name other `pairs`",
    )
