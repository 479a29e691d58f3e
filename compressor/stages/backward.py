"""A gradient walks back from the head to the first block, with one block in memory.

    inputs = block_inputs(walk, rows, name)              # one forward pass; the last is the output
    gradient = head_gradient(walk, inputs.pop(), rows, seed)
    for position in reversed(range(walk.num_blocks)):
        gradient = push_back(walk, walk.load(position), position, (inputs.pop(), gradient))

Legend: R rows, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.modeling.activations import ActivationStore
from compressor.modeling.block import Block
from compressor.modeling.walk import Walk


@torch.no_grad()
def block_inputs(walk: Walk, rows: slice, name: str) -> list[ActivationStore]:
    """Inputs [R, T, D] of every block and the last one's output, for the first rows of the walk.

    Large ones lie in files that begin with `name`.
    """
    opened = walk.open_stream(name)
    first = opened.read(rows)
    opened.close()
    count, length, width = first.shape
    limit = walk.options.limit_bytes // (walk.num_blocks + 1)
    stores: list[ActivationStore] = []
    for position in range(walk.num_blocks + 1):
        file = f"{name}-{position:04d}"
        stores.append(walk.open_store((count, length, width), file, limit_bytes=limit))
    stores[0].write(rows, first)
    del first
    for position in range(walk.num_blocks):
        block = walk.load(position)
        for part in walk.batches(rows):
            out = block.run(stores[position].read(part), walk.kwargs(part, position))
            stores[position + 1].write(part, out)
    return stores


def head_gradient(walk: Walk, outputs: ActivationStore, rows: slice, seed: int) -> Tensor:
    """Gradient [R, T, D] of the log-likelihood of tokens drawn from the model's own output.

    The outputs of the last block are closed: nobody needs them again.
    """
    generator = torch.Generator(walk.device).manual_seed(seed)
    gradients = []
    for part in walk.batches(rows):
        leaf = outputs.read(part).requires_grad_()
        logp = torch.log_softmax(walk.skeleton.leave(leaf, walk.tokens[part]).float(), -1)
        flat = logp.detach().exp().flatten(0, 1)
        drawn = torch.multinomial(flat, 1, generator=generator).view(*logp.shape[:2], 1)
        (gradient,) = torch.autograd.grad(logp.gather(-1, drawn).sum(), leaf)
        gradients.append(gradient)
    outputs.close()
    return torch.cat(gradients)


def push_back(
    walk: Walk, block: Block, position: int, at: tuple[ActivationStore, Tensor]
) -> Tensor:
    """From a block's inputs and the gradient [R, T, D] at its output to the one at its input."""
    inputs, gradient = at
    parts = []
    for rows in walk.batches(slice(0, len(gradient))):
        leaf = inputs.read(rows).requires_grad_()
        with torch.enable_grad():
            out = block.run(leaf, walk.kwargs(rows, position))
        (part,) = torch.autograd.grad(out, leaf, gradient[rows])
        parts.append(part)
    inputs.close()
    return torch.cat(parts)
