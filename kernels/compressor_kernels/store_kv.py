"""store_kv: write keys and values of new tokens into the paged pool, quantized on the way.

    pool   int16 [slots, heads, E / planes] words as in `words.py` (PC = E / planes), or x's dtype
    scales float32 [slots, heads]: max|x| / top of one token and head

    kind int8: q = round(x / s) + 128, top 127     int4: q = round(x / s) + 8, top 7
    kind e4m3: x / s rounded to nearest, half to even, top 448

Letters: T tokens, E head size.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment,index"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressor_kernels.words import LAYOUTS, Kind

KV_TOP: dict[Kind, float] = {"int8": 127.0, "int4": 7.0, "e4m3": 448.0}


@dataclass(frozen=True, slots=True)
class KVPool:
    """Keys or values of every slot of one layer; `kind` None keeps the numbers as they are."""

    data: Tensor
    scales: Tensor | None
    kind: Kind | None

    @staticmethod
    def empty(
        size: tuple[int, int, int], kind: Kind | None, *, dtype: torch.dtype, device: torch.device
    ) -> KVPool:
        """A zeroed pool of (slots, heads, E). Raises ValueError for an E the kind cannot split."""
        if kind is None:
            return KVPool(torch.zeros(size, dtype=dtype, device=device), None, None)
        planes = LAYOUTS[kind].num_planes
        if kind not in KV_TOP or size[2] % (16 * planes):
            raise ValueError(f"{kind} needs head sizes in multiples of {16 * planes}: {size[2]}")
        words = (size[0], size[1], size[2] // planes)
        data = torch.zeros(words, dtype=torch.int16, device=device)
        return KVPool(data, torch.ones(size[:2], dtype=torch.float32, device=device), kind)

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)


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
    planes = 1 if pool.kind is None else LAYOUTS[pool.kind].num_planes
    if x.shape[1] != pool.data.shape[1] or x.shape[2] != pool.data.shape[2] * planes:
        raise ValueError(f"x is {tuple(x.shape)}, the pool {tuple(pool.data.shape)} words")
    if pool.kind is None or pool.scales is None:
        pool.data.index_copy_(0, slots, x.to(pool.data.dtype))
        return
    x = x if x.stride(2) == 1 else x.contiguous()
    if x.shape[0]:
        store_kv_kernel[x.shape[:2]](
            x, slots, pool.data, pool.scales, x.stride(0), x.stride(1), x.shape[1],
            E=x.shape[2],
            PLANES=planes,
            KIND=pool.kind,
            TOP=KV_TOP[pool.kind],
        )  # fmt: skip
