"""Does a changed block still compute the same? Shown on tokens, block by block.

    difference of a block = ||f'(x) - f(x)|| / ||f(x) - x||       (for a rotation, f'(x R) R^T)

by token; the 90th percentile counts: what is wrong with a structure shows on nearly all tokens,
while a router that flips between two equal experts shows on a few. The proof is made with fp32
weights, so it judges the algebra. What the checkpoint's dtype rounds off is measured afterwards, as
KL of the stored model, and reported.

Legend: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.algorithms.divergence import kl_tokens
from compressor.data import TokenRows
from compressor.errors import NumericError, Where
from compressor.modeling.block import Block, load_block
from compressor.modeling.skeleton import Skeleton
from compressor.modeling.state import BlockTensors, ModelState
from compressor.modeling.walk import Walk
from compressor.stages.context import StageContext

TOLERANCE = 1e-4
PERCENTILE = 0.9
ROWS, LENGTH = 4, 64

Turn = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class BlockWeights:
    """An fp32 copy of a dense block's tensors, where the block computes.

    Matrices are [O, I] however they lie on disk.
    """

    tensors: dict[str, Tensor]
    transposed: frozenset[str]

    @staticmethod
    def of(source: BlockTensors, block: Block) -> BlockWeights:
        """Copy the tensors that were read for `block`."""
        transposed = frozenset(n for n, linear in block.linears.items() if linear.transposed)
        device = next(linear.stored.device for linear in block.linears.values())
        copies = {n: t.to(device, torch.float32, copy=True) for n, t in source.tensors.items()}
        return BlockWeights(copies, transposed)

    def matrix(self, name: str) -> Tensor:
        """The weight of a linear or router, [O, I]: a view, writing to it writes to the copy."""
        weight = self.tensors[f"{name}.weight"]
        return weight.t() if name in self.transposed else weight

    def bias(self, name: str) -> Tensor | None:
        """The bias of a module, if it has one."""
        return self.tensors.get(f"{name}.bias")

    def stored(self, source: BlockTensors) -> BlockTensors:
        """The tensors in the dtypes they were read in.

        Raises:
            NumericError: a value is too large for its dtype (NU05).
        """
        cast = {n: stored_as(t, source.tensors[n], n) for n, t in self.tensors.items()}
        return BlockTensors(cast, {}, source.masked)


def stored_as(value: Tensor, like: Tensor, name: str) -> Tensor:
    """`value` in the dtype of `like`, checked to be finite, on the CPU."""
    out = value.to(like.dtype).contiguous().cpu()
    if not bool(torch.isfinite(out).all()):
        raise NumericError(
            f"a transformed weight does not fit into {like.dtype}",
            code="NU05",
            where=Where(tensor=name),
            why="Units finished before this one are kept.",
            fix="use smaller scales (smoothquant: a smaller alpha), or a bfloat16 checkpoint",
        )
    return out


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A block as it was, some inputs [B, T, D] and the other arguments of its call."""

    skeleton: Skeleton
    position: int
    block: Block
    hidden: Tensor
    kwargs: dict[str, Any]

    @torch.no_grad()
    def difference(self, weights: BlockWeights, turn: Turn | None = None) -> float:
        """How far the block with other weights is from this one; `turn` is x -> x R."""
        want = self.block.run(self.hidden, self.kwargs)
        update = (want - self.hidden).norm(dim=-1)
        source = BlockTensors(weights.tensors, {}, self.block.masked)
        changed = load_block(self.skeleton, self.position, source)
        inputs = self.hidden if turn is None else turn(self.hidden)
        got = changed.run(inputs, self.kwargs)
        wrong = (got - (want if turn is None else turn(want))).norm(dim=-1)
        return percentile(wrong / update.clamp(min=1e-12))


def percentile(differences: Tensor) -> float:
    """The 90th percentile of differences by token; infinite if one is not a number."""
    if not bool(torch.isfinite(differences).all()):
        return float("inf")
    return float(torch.quantile(differences.flatten().float(), PERCENTILE))


def witness_rows(context: StageContext) -> TokenRows:
    """A few calibration rows, or random tokens before any calibration."""
    if context.tokens is not None:
        rows, mask = context.tokens.tokens[:ROWS, :LENGTH], context.tokens.mask[:ROWS, :LENGTH]
        return TokenRows(rows, mask, context.tokens.digest)
    generator = torch.Generator().manual_seed(context.seed)
    size = int(context.state.config["vocab_size"])
    tokens = torch.randint(0, size, (ROWS, LENGTH // 2), generator=generator)
    return TokenRows(tokens, torch.ones_like(tokens, dtype=torch.bool), "random")


class Witness:
    """A few rows on their way through the model before and after the transform."""

    def __init__(self, context: StageContext, after: ModelState) -> None:
        """Embed the rows in both; `after` has the outer tensors of the new model."""
        rows, options = witness_rows(context), context.walk_options()
        self.before, self.after = Walk(context.state, rows, options), Walk(after, rows, options)
        self._seen = self.before.open_stream("witness-before")
        self._stored = self.after.open_stream("witness-after")

    def question(self, position: int, block: Block) -> Question:
        """What the present inputs ask of block `position`."""
        rows = next(iter(self.before.batches()))
        hidden, kwargs = self._seen.read(rows), self.before.kwargs(rows, position)
        return Question(self.before.skeleton, position, block, hidden, kwargs)

    def advance(self, position: int, block: Block, stored: BlockTensors) -> None:
        """Go on through the block as it was and as it is stored now."""
        self.before.advance(self._seen, block, position)
        changed = load_block(self.after.skeleton, position, stored)
        self.after.advance(self._stored, changed, position)

    def divergence(self) -> float:
        """Mean KL(before || after) in nats a token: what rounding to the stored dtype costs."""
        rows = next(iter(self.before.batches()))
        kl = kl_tokens(self.before.logits(self._seen, rows), self.after.logits(self._stored, rows))
        self._seen.close()
        self._stored.close()
        return float(kl.double().mean())
