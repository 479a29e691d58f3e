"""Which weights to keep: scores, exact counts, the SparseGPT sweep and the splitting of ALPS.

    magnitude   |w_ij|
    Wanda       |w_ij| sqrt(H_jj)        (Sun et al. 2023, arXiv 2306.11695)
    RIA         (|w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|) H_jj^(1/4)
                                         (Zhang et al. 2024, "Plug-and-Play", ICLR)
    SparseGPT   w_ij^2 / U_jj^2          (Frantar & Alistarh 2023, arXiv 2301.00774)

with H = E[x x^T] and H^-1 = U^T U. ``sparsegpt_mask`` walks through the columns like GPTQ does,
deciding a few columns at a time from the *updated* weights and passing the error of what it removes
on to the columns that follow. ``alps_mask`` asks for mask and weights together (Meng et al. 2024,
arXiv 2406.07831), by ADMM on W = D, D with the asked number of zeros:

    min  tr((W - W*) H (W - W*)^T)     W <- (W* H - V + rho D) (H + rho I)^-1
    s.t. W = D                         D <- largest of W + V / rho,    V <- V + rho (W - D)

for rising rho, in units where diag H = 1, so "largest" is Wanda's score of weights that already
make up for each other. After least squares on the kept weights its error is 13 % (2:4) to 27 %
(half of the weights) below that of a SparseGPT mask (benchmarks/NOTES.md).

A mask is True where a weight is kept. Counts are exact: weights are sorted, not compared with a
threshold, and among equals the lower column goes first. A pattern "n:m" keeps n of every m
neighbouring columns of a row ("2:4" is what sparse tensor cores read).

# O out, I in, rho price of W != D, V multipliers [O, I]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from compressor.algorithms.finite import require_finite
from compressor.algorithms.gptq import cholesky_factor, inverse_cholesky, times_inverse
from compressor.errors import RecipeError

# 20 prices up to 5, three turns each: 2 to 3 % less error for 2.5 times the time
PRICES = tuple(0.1 * 30 ** (step / 11) for step in range(12))
TURNS = 2


def magnitude(w: Tensor) -> Tensor:
    """|w|, [O, I] in fp32."""
    return w.float().abs()


def wanda(w: Tensor, diag_h: Tensor) -> Tensor:
    """|w_ij| sqrt(H_jj), [O, I], from the diagonal [I] of the Hessian."""
    return magnitude(w) * diag_h.float().clamp(min=0).sqrt()


def ria(w: Tensor, diag_h: Tensor) -> Tensor:
    """A weight's share of its row and of its column, times H_jj^(1/4); [O, I]."""
    size = magnitude(w)
    share = sum(size / size.sum(axis, keepdim=True).clamp(min=1e-30) for axis in (0, 1))
    return share * diag_h.float().clamp(min=0).sqrt().sqrt()


def parse_pattern(pattern: str) -> tuple[int, int]:
    """(n, m) of "n:m" = n kept of every m; raises RecipeError for anything but 0 < n < m."""
    kept, _, width = pattern.partition(":")
    if kept.isdecimal() and width.isdecimal() and 0 < int(kept) < int(width):
        return int(kept), int(width)
    raise RecipeError(
        f"'{pattern}' is not a sparsity pattern",
        code="RC08",
        fix='write n:m, for example "2:4": two weights kept of every four',
    )


def unstructured_mask(
    scores: Tensor, *, sparsity: float, per: Literal["row", "layer"] = "row"
) -> Tensor:
    """Keep the highest scores [O, I]; exactly floor(sparsity * size) go, per row or in all."""
    pool = scores if per == "row" else scores.reshape(1, -1)
    return _without_lowest(pool, _count(sparsity, pool.shape[1])).reshape(scores.shape)


def n_of_m_mask(scores: Tensor, *, n: int, m: int) -> Tensor:
    """Keep exactly the n highest of every m neighbouring scores of a row; scores [O, I]."""
    if scores.shape[1] % m:
        raise RecipeError(
            f"{scores.shape[1]} columns cannot be split into groups of {m}",
            code="CK29",
            why=f"a pattern of {n}:{m} needs whole groups in every row",
            fix="leave this layer out, or use an unstructured sparsity",
        )
    return _without_lowest(scores.reshape(-1, m), m - n).reshape(scores.shape)


def sparsegpt_mask(
    w: Tensor,
    hessian: Tensor,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    dampening: float = 0.01,
    columns_per_block: int = 128,
) -> tuple[Tensor, Tensor]:
    """Mask [O, I] and repaired weights [O, I] (fp32, zero where the mask is False).

    Give either a sparsity, decided block by block over all rows together (so rows may differ; the
    layer's count is exactly floor(sparsity * O * I)), or a pattern "n:m", decided every m columns.
    Raises NumericError NU01 for non-finite input and RecipeError for a pattern that does not fit.
    """
    require_finite(w, "the weights to be pruned")
    if (sparsity is None) == (pattern is None):
        raise ValueError("give either sparsity or pattern")
    plan = _Unstructured(sparsity or 0.0) if pattern is None else _Pattern(*parse_pattern(pattern))
    dead = hessian.diagonal() <= 0
    live = w.float().masked_fill(dead, 0)  # no input, no loss: these weights go first
    upper, _ = inverse_cholesky(torch.diag(dead.float()) + hessian, dampening=dampening)
    mask, swept = _prune_sweep(live, upper, plan, max(1, columns_per_block))
    return mask, torch.where(dead & mask, w.float(), swept)


def alps_mask(
    w: Tensor, hessian: Tensor, *, choose: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Mask [O, I] and weights [O, I] (fp32, zero where the mask is False) by ADMM.

    choose: scores [O, I] to a mask. Costs len(PRICES) factorisations of H and 2 TURNS triangular
    solves with each. Raises NumericError NU01 for non-finite input.
    """
    require_finite(w, "the weights to be pruned")
    dead = hessian.diagonal() <= 0  # no input, no loss: these weights go first
    unit = hessian.diagonal().float().masked_fill(dead, 1).sqrt()
    scaled = (hessian.float() / unit[:, None] / unit).fill_diagonal_(1)
    target = w.float().masked_fill(dead, 0) * unit
    wanted, kept, multipliers = target @ scaled, target, torch.zeros_like(target)
    mask = choose(target.abs())
    for price in PRICES:
        root, _ = cholesky_factor(scaled, dampening=price)
        for _ in range(TURNS):
            free = times_inverse(wanted - multipliers + price * kept, root)
            kept = free + multipliers / price
            mask = choose(kept.abs())
            kept = kept * mask
            multipliers = multipliers + price * (free - kept)
    return mask, torch.where(dead & mask, w.float(), kept / unit)


class _Unstructured:
    """Decides whole blocks: the count removed so far follows sparsity * elements seen."""

    def __init__(self, sparsity: float) -> None:
        self.sparsity, self.seen, self.removed = sparsity, 0, 0

    def spans(self, columns_per_block: int) -> tuple[int, int]:
        """Columns repaired together, columns decided together."""
        return columns_per_block, columns_per_block

    def decide(self, scores: Tensor) -> Tensor:
        """Mask of the next columns."""
        self.seen += scores.numel()
        count = _count(self.sparsity, self.seen) - self.removed
        self.removed += count
        return _without_lowest(scores.reshape(1, -1), count).reshape(scores.shape)


class _Pattern:
    """Decides n of every m columns, m columns at a time."""

    def __init__(self, n: int, m: int) -> None:
        self.n, self.m = n, m

    def spans(self, columns_per_block: int) -> tuple[int, int]:
        """Columns repaired together (whole groups), columns decided together."""
        return max(1, columns_per_block // self.m) * self.m, self.m

    def decide(self, scores: Tensor) -> Tensor:
        """Mask of the next columns."""
        return n_of_m_mask(scores, n=self.n, m=self.m)


def _prune_sweep(
    w: Tensor, upper: Tensor, plan: _Unstructured | _Pattern, columns_per_block: int
) -> tuple[Tensor, Tensor]:
    """Decide, remove, repair: within a block at once, beyond it when the block is done."""
    block, span = plan.spans(columns_per_block)
    diagonal = upper.diagonal()
    mask = torch.empty_like(w, dtype=torch.bool)
    for begin in range(0, w.shape[1], block):
        end = min(begin + block, w.shape[1])
        errors = torch.zeros_like(w[:, begin:end])
        for column in range(begin, end):
            if (column - begin) % span == 0:
                now = slice(column, min(column + span, end))
                mask[:, now] = plan.decide((w[:, now] / diagonal[now]).square())
            error = w[:, column] * ~mask[:, column] / diagonal[column]
            errors[:, column - begin] = error
            w[:, column + 1 : end] -= torch.outer(error, upper[column, column + 1 : end])
        w[:, end:] -= errors @ upper[begin:end, end:]
    return mask, w * mask


def _count(sparsity: float, size: int) -> int:
    """floor(sparsity * size), where 0.7 * 10 counts as 7 in spite of binary fractions."""
    if not 0 <= sparsity < 1:
        raise RecipeError(
            f"a sparsity of {sparsity} is not in [0, 1)",
            code="RC08",
            fix="give the fraction of weights to remove, for example 0.5",
        )
    return int(sparsity * size + 1e-6)


def _without_lowest(scores: Tensor, count: int) -> Tensor:
    """True except at the ``count`` lowest scores of each row; ties: the lower index goes first."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    lowest = torch.argsort(scores, dim=1, stable=True)[:, :count]
    return mask.scatter_(1, lowest, False)
