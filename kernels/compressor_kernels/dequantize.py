"""The dense weight of a packed one: for many rows it is written once and multiplied by cuBLAS."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment,index"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressor_kernels.layout import PlanarWeight
from compressor_kernels.specialize import constants, wants_asm
from compressor_kernels.tiles import (
    centre_by,
    load_packed,
    load_scale,
    load_words,
    load_zero,
    unpack,
)
from compressor_kernels.tuning import tiles


@triton.jit
def dequantize_kernel(
    Words, S, Z, Factor, Out, N, K, k_tiles,
    PC: tl.constexpr, PLANES: tl.constexpr, W: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
    ZERO: tl.constexpr, ZERO_OFFSET: tl.constexpr, SCALE: tl.constexpr, HAS_FACTOR: tl.constexpr,
    ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, PLAN: tl.constexpr, IT: tl.constexpr,
):  # fmt: skip
    """Out[n, k] = s * (q - z) of one tile, computed in float32; grid (N/128, K/BK)."""
    BN: tl.constexpr = 128
    GROUPS: tl.constexpr = PLANES * PC // G if G > 0 else 1
    EACH: tl.constexpr = PLANES // GROUPS
    pid_n = tl.program_id(0)
    tile = (pid_n * k_tiles + tl.program_id(1)).to(tl.int64)
    rb = tl.arange(0, BN)
    rq = tl.arange(0, PC)
    words = load_words(Words + tile * (W * BN * PC) + rb[:, None] * PC + rq[None, :], BN * PC, W)
    numbers = unpack(words, ASM, CONSTRAINTS, PLAN, True, False, IT)
    rn = pid_n * BN + rb
    at = tile * (GROUPS * BN) + rb if G > 0 else rn
    packed = load_packed(S + tile * BN + rb, SCALE)
    for plane in tl.static_range(PLANES):
        group = at + plane // EACH * BN
        value = numbers[plane * R].to(tl.float32)
        for r in tl.static_range(1, R):
            value += numbers[plane * R + r].to(tl.float32)
        value = centre_by(value, load_zero(Z + group, ZERO_OFFSET, ZERO), ZERO)
        value *= load_scale(S + group, packed, plane // EACH, SCALE, False)[:, None]
        if HAS_FACTOR:
            value *= tl.load(Factor)
        k = tl.program_id(1) * (PLANES * PC) + plane * PC + rq
        mask = (rn[:, None] < N) & (k[None, :] < K)
        out = Out + rn[:, None].to(tl.int64) * K + k[None, :]
        tl.store(out, value.to(Out.dtype.element_ty), mask=mask)


def dequantize_planar(weight: PlanarWeight, dtype: torch.dtype) -> Tensor:
    """Dense [N, K] of a planar weight in `dtype`."""
    interpreted = not isinstance(dequantize_kernel, triton.runtime.JITFunction)
    device = weight.words.device
    out = torch.empty(weight.shape, dtype=torch.float32 if interpreted else dtype, device=device)
    n_tiles, k_tiles = tiles(weight.shape, weight.block_k)
    fixed = constants(weight.spec, "bf16", form="group", asm=wants_asm(device))
    dequantize_kernel[(n_tiles, k_tiles)](
        weight.words, weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        weight.scales if weight.factor is None else weight.factor,
        out, *weight.shape, k_tiles,
        IT=interpreted,
        **{name: fixed[name] for name in dequantize_kernel.arg_names if name in fixed},
    )  # fmt: skip
    return out.to(dtype)
