"""Eight-bit activations: one scale a row, rounded to nearest, and sums over groups.

    s = max|x| / top,  q = round(x / s)     top = 127.5 (int8, half to even) or 448 (e4m3)

as compressed-tensors rounds inputs, but always in float32: int8 goes from -128 to 127, which cuts
half a step off the largest number where it is positive. XS [groups, M] are the sums of q over
groups of columns, with which `w4a8.py` applies offsets and zero points of weights.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment,index"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOP = {torch.int8: 127.5, torch.float8_e4m3fn: 448.0}
TILE = 128  # columns that `w4a8.py` takes at once; it reads the sums of all groups of a tile


@triton.jit
def quantize_rows_kernel(
    X, Q, S, XS, K, stride_xm, groups, TOP: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr
):
    """One row; grid (M). G: group size of the sums, 0 for none; BLOCK: power of two, K or more."""
    m = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    x = tl.load(X + m * stride_xm + k, mask=k < K, other=0.0).to(tl.float32)
    top = tl.max(tl.abs(x), 0)
    scale = tl.where(top > 0.0, top / TOP, 1.0)
    q = tl.minimum(tl.maximum(x / scale, -TOP), TOP)
    if TOP == 127.5:
        q = tl.minimum((q + 12582912.0) - 12582912.0, 127.0)  # to nearest, half to even
    stored = q.to(Q.dtype.element_ty)
    tl.store(Q + m.to(tl.int64) * K + k, stored, mask=k < K)
    tl.store(S + m, scale)
    if G > 0:
        g = tl.arange(0, BLOCK // G)
        sums = tl.sum(tl.reshape(stored.to(tl.float32), (BLOCK // G, G)), 1)
        tl.store(XS + g * tl.num_programs(0) + m, sums, mask=g < groups)


def quantize_rows(
    x: Tensor, dtype: torch.dtype, *, group_size: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [M, K] -> q [M, K] in `dtype` (int8 or e4m3), scales float32 [M], sums [groups, M].

    `group_size` 0 makes no sums, -1 one sum a row; groups fill whole tiles of `TILE` columns, those
    behind the last column are zero. Raises KeyError for another dtype.
    """
    rows, columns = x.shape
    top = TOP[dtype]
    block = max(TILE, triton.next_power_of_2(columns))
    size = block if group_size == -1 else group_size
    groups = -(-(columns + -columns % TILE) // size) if size else 0
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    sums = torch.empty((groups, rows), dtype=torch.float32, device=x.device)
    interpreted = not isinstance(quantize_rows_kernel, triton.runtime.JITFunction)
    is_rounded_later = interpreted and dtype != torch.int8  # its cast to e4m3 loses carries
    kept = torch.float32 if is_rounded_later else dtype
    q = torch.empty(x.shape, dtype=kept, device=x.device)
    quantize_rows_kernel[(rows,)](
        x, q, scales, sums, columns, x.stride(0), groups,
        TOP=top,
        G=min(size, block),
        BLOCK=block,
        num_warps=8 if block > 2048 else 4,
    )  # fmt: skip
    q = q.to(dtype)
    if is_rounded_later and size:
        padded = torch.nn.functional.pad(q.float(), (0, groups * size - columns))
        sums = padded.view(rows, groups, size).sum(-1).t().contiguous()
    return q, scales, sums if size else None
