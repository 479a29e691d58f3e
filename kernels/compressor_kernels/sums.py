"""Sums of x over groups of columns, which `raw` products and zero points need.

    XS[0, g, m] = sum over k in group g of offset(k) x[m, k]     XS[1, g, m] = sum of x[m, k]

offset(k) is what the unpacked number of column k is too large by: 2^(m-t) + 2^(bits-1), which
depends on the plane (`words.py`), so on k mod BK. `norm.py` makes the same sums with the
RMSNorm before.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment,index"

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressor_kernels.words import LAYOUTS, Floats, Kind, columns_a_plane, numbers


@triton.jit
def group_sums_kernel(
    X, XS, Offsets, M, K, stride_xm, SIZE, PC, PLANES: tl.constexpr, BLOCK: tl.constexpr
):
    """XS[:, g, m] over SIZE columns each; grid (groups, M)."""
    g = tl.program_id(0)
    m = tl.program_id(1)
    weighted = tl.zeros((BLOCK,), dtype=tl.float32)
    plain = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, SIZE, BLOCK):
        inside = start + tl.arange(0, BLOCK)
        k = g * SIZE + inside
        x = tl.load(X + m * stride_xm + k, mask=(inside < SIZE) & (k < K), other=0.0)
        plain += x.to(tl.float32)
        weighted += x.to(tl.float32) * tl.load(Offsets + (k // PC) % PLANES)
    tl.store(XS + g * M + m, tl.sum(weighted, 0))
    tl.store(XS + (tl.num_programs(0) + g) * M + m, tl.sum(plain, 0))


@cache
def plane_offsets(kind: Kind, floats: Floats, device: torch.device) -> Tensor:
    """Float32 [planes]: what the numbers of a plane are too large by, together."""
    made = numbers(kind, floats)
    each = len(made) // LAYOUTS[kind].num_planes
    offsets = [-number.add for number in made]
    return torch.tensor(offsets, device=device).view(-1, each).sum(1)


def group_sums(x: Tensor, kind: Kind, *, group_size: int, whole: int) -> Tensor:
    """Float32 [2, groups, M] of x [M, K]; `whole`: columns of a group if there is one a row."""
    rows, columns = x.shape
    size = whole if group_size == -1 else group_size
    pc, planes = columns_a_plane(kind, group_size), LAYOUTS[kind].num_planes
    padded = -(-columns // (pc * planes)) * pc * planes
    sums = torch.empty((2, -(-padded // size), rows), dtype=torch.float32, device=x.device)
    floats: Floats = "bf16" if x.dtype == torch.bfloat16 else "fp16"
    group_sums_kernel[sums.shape[1:]](
        x, sums, plane_offsets(kind, floats, x.device), rows, columns, x.stride(0), size, pc,
        PLANES=planes,
        BLOCK=min(1024, triton.next_power_of_2(size)),
    )  # fmt: skip
    return sums
