"""store_kv: write keys and values of new tokens into the paged pool, quantized on the way.

Formats and specification are in `kv_pool.py`; one program takes one token and head.

Letters: T tokens, E head size, PC words of a head.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment,index"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from compressor_kernels.kv_pool import KV_TOP, KVPool, check_tokens, store


@triton.jit
def e4m3_bits(x):
    """The byte of the e4m3 number nearest to x, half to even; |x| <= 448."""
    magnitude = tl.abs(x)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = ((magnitude * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)
    code = tl.where(magnitude < 0.015625, small, normal)
    return code | tl.where(x < 0.0, 128, 0)


@triton.jit
def code_of(x, scale, KIND: tl.constexpr, TOP: tl.constexpr):
    """Codes of x / scale."""
    ratio = tl.minimum(tl.maximum(x / scale, -TOP), TOP)
    if KIND == "e4m3":
        return e4m3_bits(ratio)
    else:
        return ((ratio + 12582912.0) - 12582912.0).to(tl.int32) + (8 if KIND == "int4" else 128)


@triton.jit
def store_kv_kernel(
    X, Slots, Pool, Scales, stride_xt, stride_xh, heads,
    E: tl.constexpr, PLANES: tl.constexpr, KIND: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """One token and head; grid (T, heads). X [T, heads, E] with any token and head strides."""
    PC: tl.constexpr = E // PLANES
    token = tl.program_id(0)
    head = tl.program_id(1)
    j = tl.arange(0, PC)
    x_ptr = X + token.to(tl.int64) * stride_xt + head * stride_xh + j
    slot = tl.load(Slots + token).to(tl.int64) * heads + head
    top = tl.max(tl.abs(tl.load(x_ptr).to(tl.float32)), 0)
    for p in tl.static_range(1, PLANES):
        top = tl.maximum(top, tl.max(tl.abs(tl.load(x_ptr + p * PC).to(tl.float32)), 0))
    scale = tl.where(top > 0.0, top / TOP, 1.0)
    words = tl.zeros((PC,), dtype=tl.int32)
    for p in tl.static_range(PLANES):
        code = code_of(tl.load(x_ptr + p * PC).to(tl.float32), scale, KIND, TOP)
        words = words | (code << (16 // PLANES * p))
    tl.store(Pool + slot * PC + j, words.to(tl.int16))
    tl.store(Scales + slot, scale)


def store_kv(x: Tensor, slots: Tensor, pool: KVPool) -> None:
    """Write x [T, heads, E] to `slots` int64 [T] of the pool.

    Raises ValueError when heads or E are not the pool's.
    """
    if pool.kind is None or pool.scales is None:
        store(x, slots, pool)
        return
    check_tokens(x, pool)
    x = x if x.stride(2) == 1 else x.contiguous()
    if x.shape[0]:
        store_kv_kernel[x.shape[:2]](
            x, slots, pool.data, pool.scales, x.stride(0), x.stride(1), x.shape[1],
            E=x.shape[2],
            PLANES=pool.planes,
            KIND=pool.kind,
            TOP=KV_TOP[pool.kind],
        )  # fmt: skip
