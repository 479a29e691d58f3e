"""Mend a shallower model: the last linear of each kept block learns what is missing behind it.

    out = h + W a           a  inputs of the linear that writes the block's result (down_proj)
    y                       the residual stream of the whole model just before the next kept block
    W' = W + C (H + r I)^-1 with C = mean (y - out) a^T, H = mean a a^T

so that W' a predicts, as far as a linear map of `a` can, what the removed blocks would have added
and by how much the shallower model has drifted before. One pass over both models, in order: every
block sees what the mended ones before it give. The idea of folding a linear map into the weights
before the gap is that of ReplaceMe (Shopkhoev et al. 2025, arXiv 2505.02819); nothing is added to
the model. The ridge r is the one that predicts every fourth row best when learned from the others;
if none helps there, the linear stays as it is.

Legend: I inputs of the linear, D width of the residual stream, E squared norm of y - out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from compressor.algorithms.gptq import cholesky_factor, times_inverse
from compressor.algorithms.products import add_products, by_feature
from compressor.algorithms.reconstruct import reconstruct
from compressor.modeling.activations import ActivationStore
from compressor.modeling.block import Block, block_tensors, load_block, run_observed
from compressor.modeling.state import ModelState
from compressor.modeling.walk import Walk
from compressor.stages.context import StageContext
from compressor.stages.statistics import calibration_rows

RIDGES = (0.001, 0.01, 0.1, 1.0, 10.0)  # of the mean of diag H
TESTED = 4  # one row in four chooses the ridge


class Rows(Protocol):
    """Something that gives activations [B, T, D] of some rows."""

    def read(self, rows: slice) -> Tensor: ...


def repair_depth(
    context: StageContext, after: ModelState, kept: list[int], *, tag: str = ""
) -> tuple[ModelState, dict[str, Any]]:
    """The shallower state `after` mended, and by linear how much of what was missing came back.

    kept: the indices of its blocks in the state before; tag: prefix of unit names. Blocks whose
    result no dense linear adds to the residual stream (Gemma's norms behind the MLP, experts,
    quantized ones) stay as they are.
    """
    assert context.tokens is not None, "checked by the caller"
    whole, short = (Walk(s, context.tokens, context.walk_options()) for s in (context.state, after))
    wanted, seen = whole.open_stream("repair-whole"), short.open_stream("repair-short")
    passed = 0
    facts: dict[str, Any] = {}
    for position, end in enumerate([*kept[1:], whole.num_blocks]):
        for number in range(passed, end):
            whole.advance(wanted, whole.load(number), number)
        passed, unit = end, f"{tag}block-{position:04d}"
        if not context.run.is_done(unit):
            source = after.read_block(position, short.skeleton)
            block = load_block(short.skeleton, position, source)
            found = mend(short, block, position, (wanted, seen))
            stored = block_tensors(block, source)
            context.run.commit(unit, stored.tensors, {**stored.meta(), "facts": found})
        meta = context.run.meta(unit)
        after = after.with_block(position, context.run.file(unit), meta)
        facts |= {f"{short.block_name(position)}.{n}": f for n, f in meta["facts"].items()}
        stored = after.read_block(position, short.skeleton)
        short.advance(seen, load_block(short.skeleton, position, stored), position)
        context.run.progress({"unit": unit, "index": position + 1, "total": len(kept)})
    wanted.close()
    seen.close()
    return after, facts


@torch.no_grad()
def mend(
    walk: Walk, block: Block, position: int, streams: tuple[Rows, ActivationStore]
) -> dict[str, Any]:
    """Change the block's last linear in place; facts by its name, empty if there is none.

    streams: what the block should give, and what goes into it.
    """
    wanted, seen = streams
    name = _last_linear(walk, block, position, seen)
    if name is None:
        return {}
    linear = block.linears[name]
    known, tested = (_Sums.of(linear.shape, walk.device) for _ in range(2))
    for rows in walk.batches(calibration_rows(walk)):
        out, inputs = run_observed(block, [name], seen.read(rows), walk.kwargs(rows, position))
        gap = wanted.read(rows) - out
        a = inputs[name].reshape(*gap.shape[:-1], -1)  # some blocks flatten their tokens
        for row in range(rows.start, rows.stop):
            mask = slice(None) if walk.mask is None else walk.mask[row]
            part = tested if row % TESTED == TESTED - 1 else known
            part.add(a[row - rows.start][mask].float(), gap[row - rows.start][mask].float())
    left_by = {r: tested.left(known.change(r)) for r in RIDGES}
    ridge = min(RIDGES, key=lambda r: left_by[r])
    if left_by[ridge] >= tested.energy:
        return {}
    known.join(tested)
    weight = linear.dense()
    target = weight + known.change(ridge)
    if name in block.masked:
        target = reconstruct(target, known.hessian, weight != 0)
    linear.set_dense(target)
    left = known.left(linear.dense() - weight) / known.count
    return {name: {"missing": known.energy / known.count, "left": left, "ridge": ridge}}


@dataclass(slots=True)
class _Sums:
    """Sums over tokens: a a^T [I, I], (y - out) a^T [O, I], E, and how many tokens."""

    hessian: Tensor
    missing: Tensor
    energy: float = 0.0
    count: int = 0

    @staticmethod
    def of(shape: tuple[int, int], device: torch.device) -> _Sums:
        hessian = torch.zeros(shape[1], shape[1], device=device)
        return _Sums(hessian, torch.zeros(shape, device=device))

    def add(self, a: Tensor, gap: Tensor) -> None:
        features = by_feature(a)
        add_products(self.hessian, features, features)
        add_products(self.missing, by_feature(gap), features)
        self.energy += float(gap.square().sum())
        self.count += len(a)

    def join(self, other: _Sums) -> None:
        self.hessian += other.hessian
        self.missing += other.missing
        self.energy += other.energy
        self.count += other.count

    def change(self, ridge: float) -> Tensor:
        """What to add to the weight [O, I]."""
        root, _ = cholesky_factor(self.hessian, dampening=ridge)
        return times_inverse(self.missing, root)

    def left(self, change: Tensor) -> float:
        """E after the change, over these tokens."""
        gained = 2 * float((change * self.missing).sum())
        return self.energy - gained + float((change @ self.hessian * change).sum())


def _last_linear(walk: Walk, block: Block, position: int, seen: ActivationStore) -> str | None:
    """The dense linear whose output is added to the residual stream last, as it is."""
    rows = slice(0, 1)
    hidden, kwargs = seen.read(rows), walk.kwargs(rows, position)
    names = [n for n, m in block.linears.items() if m.shape[0] == hidden.shape[-1]]
    if not names or block.linears[names[-1]].format is not None:
        return None
    linear = block.linears[names[-1]]
    out, inputs = run_observed(block, [names[-1]], hidden, kwargs)
    if names[-1] not in inputs or inputs[names[-1]].shape[:-1] != hidden.shape[:-1]:
        return None  # an expert sees only some tokens
    stored, added = linear.stored, inputs[names[-1]] @ linear.dense().T
    linear.stored = torch.zeros_like(stored)
    without = block.run(hidden, kwargs)
    linear.stored = stored
    close = torch.allclose(out - without, added, rtol=1e-3, atol=1e-4 * float(out.abs().max()))
    return names[-1] if close else None
