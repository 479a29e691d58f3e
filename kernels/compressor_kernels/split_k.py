"""The ordered sum of split-K partial results, and the epilogue that comes with it."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment,index"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
HALF_TILE = 64  # rows of gate, then rows of up, in a gated weight


@triton.jit
def silu_up(gate, up):
    """silu(gate) * up in float32."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def ordered_sum(Partial, at, mask, stride, SPLIT_K: tl.constexpr):
    """Sum over splits in ascending order."""
    total = tl.load(Partial + at, mask=mask, other=0.0).to(tl.float32)
    for split in range(1, SPLIT_K):
        total += tl.load(Partial + stride * split + at, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def reduce_kernel(
    Partial, Bias, Residual, Y, size, N, stride, SPLIT_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Y[i] = act(sum of Partial[:, i] + bias) + residual; Y has N columns, 2N before the gate."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    row = i // N
    column = i % N
    if GATED:
        column = column // 64 * 128 + column % 64
        at = row * (2 * N) + column
    else:
        at = i
    total = ordered_sum(Partial, at, mask, stride, SPLIT_K)
    if HAS_BIAS:
        total += tl.load(Bias + column, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        up = ordered_sum(Partial, at + 64, mask, stride, SPLIT_K)
        if HAS_BIAS:
            up += tl.load(Bias + column + 64, mask=mask, other=0.0).to(tl.float32)
        total = silu_up(total, up)
    if HAS_RESIDUAL:
        total += tl.load(Residual + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(Y + i, total.to(Y.dtype.element_ty), mask=mask)


def reduce_partial(
    partial: Tensor, y: Tensor, bias: Tensor | None, residual: Tensor | None, *, gated: bool
) -> None:
    """y [M, N] from partial [SPLIT_K, M, N] (2N columns when gated)."""
    reduce_kernel[(-(-y.numel() // BLOCK),)](
        partial,
        y if bias is None else bias,
        y if residual is None else residual,
        y,
        y.numel(),
        y.shape[1],
        partial.stride(0),
        SPLIT_K=partial.shape[0],
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        GATED=gated,
        BLOCK=BLOCK,
    )
