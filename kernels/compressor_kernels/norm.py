"""RMSNorm that also sums its output over groups, for the products that follow it.

    y = x / sqrt(mean(x^2) + eps) * weight      XS as in `sums.py`

One reading of x serves the norm, and all of q, k, v or gate and up share the sums.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment,index"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressor_kernels.specialize import FLOATS
from compressor_kernels.sums import plane_offsets
from compressor_kernels.tuning import GemmSpec
from compressor_kernels.words import LAYOUTS, columns_a_plane


@triton.jit
def rms_norm_kernel(
    X, Weight, Y, XS, Offsets, K, stride_xm, eps, groups, PC,
    PLANES: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row; grid (M). G: group size of the sums, 0 for none. BLOCK: power of two, K or more."""
    m = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    x = tl.load(X + m * stride_xm + k, mask=k < K, other=0.0).to(tl.float32)
    w = tl.load(Weight + k, mask=k < K, other=0.0).to(tl.float32)
    y = x * (1.0 / tl.sqrt(tl.sum(x * x, 0) / K + eps)) * w
    y = y.to(Y.dtype.element_ty)
    tl.store(Y + m.to(tl.int64) * K + k, y, mask=k < K)
    if G > 0:
        seen = y.to(tl.float32)
        g = tl.arange(0, BLOCK // G)
        weighted = seen * tl.load(Offsets + (k // PC) % PLANES)
        at = XS + g * tl.num_programs(0) + m
        tl.store(at, tl.sum(tl.reshape(weighted, (BLOCK // G, G)), 1), mask=g < groups)
        at += groups * tl.num_programs(0)
        tl.store(at, tl.sum(tl.reshape(seen, (BLOCK // G, G)), 1), mask=g < groups)


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, sums_for: GemmSpec | None = None
) -> tuple[Tensor, Tensor | None]:
    """Normed x [M, K] in x.dtype and, for a weight with groups, its sums float32 [2, groups, M].

    Raises ValueError for shapes that do not fit, and for sums over whole rows.
    """
    rows, columns = x.shape
    if tuple(weight.shape) != (columns,):
        raise ValueError(f"weight must be [{columns}], got {tuple(weight.shape)}")
    group = 0 if sums_for is None else sums_for.group_size
    if group < 0 or (sums_for is not None and sums_for.shape[1] != columns):
        raise ValueError(f"sums need groups of a weight with {columns} columns: {sums_for}")
    interpreted = not isinstance(rms_norm_kernel, triton.runtime.JITFunction)
    y = torch.empty(x.shape, dtype=torch.float32 if interpreted else x.dtype, device=x.device)
    block = triton.next_power_of_2(columns)
    sums, offsets, pc, planes, groups = None, x, 1, 1, 0
    if sums_for is not None:
        offsets = plane_offsets(sums_for.kind, FLOATS[x.dtype], x.device)
        pc, planes = columns_a_plane(sums_for.kind, group), LAYOUTS[sums_for.kind].num_planes
        groups = -(-columns // sums_for.block_k) * (sums_for.block_k // group)
        block = max(block, triton.next_power_of_2(groups * group))
        sums = torch.empty((2, groups, rows), dtype=torch.float32, device=x.device)
    rms_norm_kernel[(rows,)](
        x, weight, y, y if sums is None else sums, offsets, columns, x.stride(0), eps, groups, pc,
        PLANES=planes,
        G=group,
        BLOCK=block,
        num_warps=8 if block > 2048 else 4,
    )  # fmt: skip
    return y.to(x.dtype), sums
