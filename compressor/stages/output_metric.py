"""How much the model's distribution minds an error at the output of each block.

One forward pass keeps the inputs of all blocks for some rows, one backward pass pushes the gradient
of the log-likelihood of tokens drawn from the model itself from block to block, with one block in
memory. The second moments F = E[g g^T] [D, D] go into one unit, so a resumed run does not repeat
the pass.

Legend: R rows, T tokens, D width.
"""

from __future__ import annotations

from safetensors.torch import load_file
from torch import Tensor

from compressor.algorithms.learned_rounding import metric_factor
from compressor.modeling.walk import Walk
from compressor.stages.backward import block_inputs, head_gradient, push_back
from compressor.stages.context import StageContext
from compressor.stages.statistics import calibration_rows

UNIT = "output-metric"
TOKENS_PER_DIMENSION = 16  # more tokens than this change F by less than the noise of the result


def metric_factors(walk: Walk, context: StageContext) -> list[Tensor]:
    """L [D, D] of the metric at each block's output (see `algorithms.learned_rounding`)."""
    if not context.run.is_done(UNIT):
        moments = _second_moments(walk, context)
        named = {f"{i:04d}": moment.cpu() for i, moment in enumerate(moments)}
        context.run.commit(UNIT, named, {})
    stored = load_file(context.run.file(UNIT))
    return [metric_factor(stored[name]).to(walk.device) for name in sorted(stored)]


def _rows(walk: Walk) -> slice:
    length = walk.tokens.shape[1]
    width = walk.skeleton.model.config.get_text_config().hidden_size
    wanted = -(-TOKENS_PER_DIMENSION * width // length)
    return slice(0, min(calibration_rows(walk).stop, max(8, wanted)))


def _second_moments(walk: Walk, context: StageContext) -> list[Tensor]:
    """F [D, D] in fp32 at the output of each block."""
    rows = _rows(walk)
    inputs = block_inputs(walk, rows, "metric")
    gradient = head_gradient(walk, inputs.pop(), rows, context.seed)
    moments: list[Tensor] = []
    for position in reversed(range(walk.num_blocks)):
        moments.append(_second_moment(walk, gradient))
        at = (inputs.pop(), gradient)
        if position > 0:
            gradient = push_back(walk, walk.load(position), position, at)
        else:
            at[0].close()
        event = {"unit": f"{UNIT}-{position:04d}", "index": walk.num_blocks - position}
        context.run.progress(event | {"total": walk.num_blocks})
    return moments[::-1]


def _second_moment(walk: Walk, gradient: Tensor) -> Tensor:
    flat = walk.real_tokens(slice(0, len(gradient)), gradient)
    return flat.t() @ flat / max(1, len(flat))
