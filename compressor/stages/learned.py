"""Learn the rounding of one block: from the original weights towards the original outputs.

    inputs    what the compressed model's earlier blocks give
    targets   what the original model's block gives on the original inputs
    loss      squared error of the block's output in the metric of the output distribution

Only rows that statistics may use are trained on; the held-out rows choose the best state and judge
it against the block as the effort below (GPTQ on the asymmetric target) leaves it. The better of
the two is kept, so this effort is never worse on the rows that decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.algorithms import products
from compressor.algorithms.input_rounding import round_inputs
from compressor.algorithms.learned_rounding import (
    LearnedWeight,
    Schedule,
    learn,
    squared_error,
)
from compressor.artifact.formats import SCALE_DTYPES, LayerFormat
from compressor.modeling.block import Block, load_block
from compressor.modeling.linears import StoredLinear
from compressor.modeling.state import BlockTensors
from compressor.modeling.walk import Walk
from compressor.recipe import QuantizeConfig
from compressor.stages.blockwise import Sweep
from compressor.stages.context import StageContext
from compressor.stages.grids import check_scales, make_grid
from compressor.stages.output_metric import metric_factors
from compressor.stages.solve import Formats
from compressor.stages.statistics import Streams

TRIMMED = 1e-3  # share of largest errors left out of the loss, at TRIMMED_BITS or less
TRIMMED_BITS = 3


class RoundedLinear(nn.Module):
    """A linear layer whose weight is being rounded; inputs are rounded as its format says."""

    def __init__(self, linear: StoredLinear, fmt: LayerFormat, *, grid: str, masked: bool) -> None:
        super().__init__()
        weight = linear.dense()
        mask = weight != 0 if masked else None
        dtype = SCALE_DTYPES.get(fmt.scale_dtype, torch.float32)
        found = make_grid(weight, fmt, grid)
        self.learned = LearnedWeight(weight, found, scale_dtype=dtype, mask=mask)
        self.format, self.bias = fmt, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O] in the dtype of x."""
        if self.format.activations != "none":
            x = x + (round_inputs(x.detach(), self.format.activations, None) - x.detach())
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return products.linear(x, self.learned.value().to(x.dtype), bias)


def block_learner(config: QuantizeConfig, context: StageContext, sweep: Sweep) -> BlockLearner:
    """The learner of one sweep's blocks; measures the metric first, unless a unit has it."""
    metric = metric_factors(sweep.walk, context)
    return BlockLearner(sweep.walk, sweep.streams, config, metric, sweep.rows, context.seed)


@dataclass(frozen=True, slots=True, eq=False)
class BlockLearner:
    """Learns the blocks of one walk.

    metric: L [D, D] for each block. rows: those to train on; all others judge.
    """

    walk: Walk
    streams: Streams
    config: QuantizeConfig
    metric: list[Tensor]
    rows: slice
    seed: int

    def improve(
        self, position: int, original: Block, source: BlockTensors, solved: tuple[Block, Formats]
    ) -> dict[str, Any]:
        """Learn block `position`; put the result into `solved` if held-out rows say it is better.

        The reference stream moves on to the original block's outputs, which are the targets.

        Args:
            position: of the block.
            original: the reference block.
            source: stored tensors of the block before quantization.
            solved: the block as GPTQ left it, and the formats of its linears.

        Returns:
            Facts for the report: held-out losses and steps.
        """
        block, formats = solved
        pupil = load_block(self.walk.skeleton, position, source)
        linears = self._replace(pupil, formats)
        self.walk.advance(self.streams.reference, original, position)
        task = _Task(self, position)
        learning = self.config.learning_settings
        schedule = Schedule(self.config.learning_steps, learning.rate, learning.scale_rate)
        found = learn(
            [linear.learned for linear in linears.values()],
            lambda step: task.loss(pupil, step),
            lambda: task.judge(pupil),
            schedule,
        )
        rival = task.judge(block)
        better = found.after < rival
        if better:
            _take_over(block, linears)
        return {
            "method": "learned" if better else "gptq",
            "held_out": {"start": found.before, "learned": found.after, "gptq": rival},
            "best_step": found.best_step,
        }

    def _replace(self, pupil: Block, formats: Formats) -> dict[str, RoundedLinear]:
        made = {}
        for name, fmt in formats.items():
            masked = name in pupil.masked
            made[name] = RoundedLinear(
                pupil.linears[name], fmt, grid=self.config.grid, masked=masked
            )
            pupil.module.set_submodule(name, made[name])
            del pupil.linears[name]
        return made


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """The loss of one block on rows of both streams."""

    learner: BlockLearner
    position: int

    def loss(self, block: Block, step: int) -> Tensor:
        """Training loss of one step, on a batch that its number decides."""
        with torch.enable_grad():
            return self._error(block, self._batch(step), trimmed=self._trimmed())

    @torch.no_grad()
    def judge(self, block: Block) -> float:
        """Mean loss on the held-out rows, all elements counted."""
        held_out = slice(self.learner.rows.stop, len(self.learner.walk.tokens))
        total, count = 0.0, 0
        for rows in self.learner.walk.batches(held_out):
            size = rows.stop - rows.start
            total, count = total + float(self._error(block, rows)) * size, count + size
        return total / max(1, count)

    def _batch(self, step: int) -> slice:
        """Neighbouring rows; every row comes once before any comes again."""
        count, size = (
            self.learner.rows.stop,
            self.learner.config.learning_settings.batch_size,
        )
        places = max(1, count // size)
        generator = torch.Generator().manual_seed(self.learner.seed + step // places)
        start = int(torch.randperm(places, generator=generator)[step % places]) * size
        return slice(start, min(start + size, count))

    def _error(self, block: Block, rows: slice, *, trimmed: float = 0.0) -> Tensor:
        walk, learner = self.learner.walk, self.learner
        out = block.run(learner.streams.compressed.read(rows), walk.kwargs(rows, self.position))
        error = walk.real_tokens(rows, out - learner.streams.reference.read(rows))
        return squared_error(error, learner.metric[self.position], trimmed=trimmed)

    def _trimmed(self) -> float:
        bits = self.learner.config.preset.bits
        return TRIMMED if bits <= TRIMMED_BITS else 0.0


def _take_over(block: Block, linears: dict[str, RoundedLinear]) -> None:
    for name, linear in linears.items():
        codes, grid = linear.learned.rounded()
        check_scales(grid, linear.format, name)
        block.linears[name].set_rounded(codes, grid, linear.format)
