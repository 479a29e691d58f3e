"""How much the model's distribution minds an error at the output of each block.

One forward pass keeps the inputs of all blocks for some rows, one backward pass pushes the gradient
of the log-likelihood of tokens drawn from the model itself from block to block, with one block in
memory. The second moments F = E[g g^T] [D, D] go into one unit, so a resumed run does not repeat
the pass.

Legend: R rows, T tokens, D width.
"""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import Tensor

from compressor.algorithms.learned_rounding import metric_factor
from compressor.modeling.activations import ActivationStore
from compressor.modeling.walk import Walk
from compressor.stages.context import StageContext
from compressor.stages.sensitivity import head_gradient
from compressor.stages.statistics import calibration_rows

UNIT = "output-metric"
TOKENS_PER_DIMENSION = 16  # more tokens than this change F by less than the noise of the result


def metric_factors(walk: Walk, context: StageContext) -> list[Tensor]:
    """L [D, D] of the metric at each block's output (see `algorithms.learned_rounding`)."""
    if not context.run.is_done(UNIT):
        moments = _second_moments(walk, context)
        named = {f"{i:04d}": moment for i, moment in enumerate(moments)}
        context.run.commit(UNIT, named, {})
    stored = load_file(context.run.file(UNIT))
    return [metric_factor(stored[name]) for name in sorted(stored)]


def _rows(walk: Walk, width: int) -> slice:
    length = walk.tokens.shape[1]
    wanted = -(-TOKENS_PER_DIMENSION * width // length)
    return slice(0, min(calibration_rows(walk).stop, max(8, wanted)))


def _second_moments(walk: Walk, context: StageContext) -> list[Tensor]:
    """F [D, D] in fp32 at the output of each block."""
    opened = walk.open_stream("metric")
    width = opened.read(slice(0, 1)).shape[-1]
    rows = _rows(walk, width)
    inputs = _block_inputs(walk, opened, rows)
    last = inputs.pop()
    gradient = head_gradient(walk, last.read(rows), rows, context.seed)
    last.close()
    moments: list[Tensor] = []
    for position in reversed(range(walk.num_blocks)):
        moments.append(_second_moment(walk, gradient))
        store = inputs.pop()
        if position > 0:
            gradient = _push_back(walk, position, store, gradient)
        store.close()
        event = {"unit": f"{UNIT}-{position:04d}", "index": walk.num_blocks - position}
        context.run.progress(event | {"total": walk.num_blocks})
    return moments[::-1]


@torch.no_grad()
def _block_inputs(walk: Walk, opened: ActivationStore, rows: slice) -> list[ActivationStore]:
    """Inputs [R, T, D] of every block and the last one's output; large ones lie in files."""
    first = opened.read(rows)
    opened.close()
    stores: list[ActivationStore] = []
    limit = walk.options.limit_bytes // (walk.num_blocks + 1)
    for position in range(walk.num_blocks + 1):
        file = walk.options.workdir / f"metric-{position:04d}.activations"
        stores.append(ActivationStore(tuple(first.shape), file=file, limit_bytes=limit))  # type: ignore[arg-type]
    stores[0].write(rows, first)
    del first
    for position in range(walk.num_blocks):
        block = walk.load(position)
        for part in walk.batches(rows):
            out = block.run(stores[position].read(part), walk.kwargs(part, position))
            stores[position + 1].write(part, out)
    return stores


def _push_back(walk: Walk, position: int, inputs: ActivationStore, gradient: Tensor) -> Tensor:
    """From the gradient at a block's output [R, T, D] to the one at its input."""
    block = walk.load(position)
    parts = []
    for rows in walk.batches(slice(0, len(gradient))):
        leaf = inputs.read(rows).requires_grad_()
        with torch.enable_grad():
            out = block.run(leaf, walk.kwargs(rows, position))
        (part,) = torch.autograd.grad(out, leaf, gradient[rows])
        parts.append(part)
    return torch.cat(parts)


def _second_moment(walk: Walk, gradient: Tensor) -> Tensor:
    flat = gradient.flatten(0, 1)
    if walk.mask is not None:
        flat = flat[walk.mask[: len(gradient)].flatten()]
    return flat.t() @ flat / max(1, len(flat))
