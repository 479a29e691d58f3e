"""Pieces that the matrix kernels share: unpacking, loading, scaling. Formulas are in `words.py`.

In the interpreter (IT) everything is float32: its bf16 arithmetic is wrong (Triton 3.6 to 3.9).
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment,index"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unpack_assembly(
    words, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, FP16: tl.constexpr, COUNT: tl.constexpr
):
    """Words -> COUNT tensors of 16-bit floats by PTX; two words a register."""
    if FP16:
        return tl.inline_asm_elementwise(
            asm=ASM,
            constraints=CONSTRAINTS,
            args=words,
            dtype=(tl.float16,) * COUNT,
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            asm=ASM,
            constraints=CONSTRAINTS,
            args=words,
            dtype=(tl.bfloat16,) * COUNT,
            is_pure=True,
            pack=2,
        )


@triton.jit
def masked_shift(word, shift: tl.constexpr, mask: tl.constexpr):
    """(word >> shift) & mask, to the left for a negative shift."""
    if shift >= 0:
        return (word >> shift) & mask
    else:
        return (word << (0 - shift)) & mask


@triton.jit
def unpack_plain(
    words,
    i: tl.constexpr,
    PLAN: tl.constexpr,
    CENTRED: tl.constexpr,
    FP16: tl.constexpr,
    IT: tl.constexpr,
):
    """Number i of the plan without inline assembly."""
    at: tl.constexpr = i * 12
    bits = masked_shift(words[PLAN[at]], PLAN[at + 1], PLAN[at + 2])
    if PLAN[at + 5] != 0:
        bits = bits | masked_shift(words[PLAN[at + 3]], PLAN[at + 4], PLAN[at + 5])
    if PLAN[at + 8] != 0:
        bits = bits | masked_shift(words[PLAN[at + 6]], PLAN[at + 7], PLAN[at + 8])
    bits = bits | PLAN[at + 9]
    if IT and not FP16:
        number = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif IT:
        number = bits.to(tl.float16, bitcast=True).to(tl.float32)
    elif FP16:
        number = bits.to(tl.float16, bitcast=True)
    else:
        number = bits.to(tl.bfloat16, bitcast=True)
    if CENTRED and PLAN[at + 10] != 1.0:
        number = number * PLAN[at + 10]
    if CENTRED and PLAN[at + 11] != 0.0:
        number = number + PLAN[at + 11]
    return number


@triton.jit
def unpack(
    words,
    ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    PLAN: tl.constexpr,
    CENTRED: tl.constexpr,
    FP16: tl.constexpr,
    IT: tl.constexpr,
):
    """Tuple of W word tensors -> tuple of 16-bit float tensors (float32 in the interpreter)."""
    COUNT: tl.constexpr = len(PLAN) // 12
    if ASM != "":
        return unpack_assembly(words, ASM, CONSTRAINTS, FP16, COUNT)
    else:
        out = ()
        for i in tl.static_range(COUNT):
            out += (unpack_plain(words, i, PLAN, CENTRED, FP16, IT),)
        return out


@triton.jit
def load_words(w_ptr, STEP: tl.constexpr, W: tl.constexpr):
    """Tuple of the W words tensors of a tile; streamed once, so they leave the cache first."""
    out = ()
    for i in tl.static_range(W):
        out += (tl.load(w_ptr + i * STEP, eviction_policy="evict_first"),)
    return out


@triton.jit
def load_x(x_ptr, k, m_mask, K, EVEN_K: tl.constexpr, IT: tl.constexpr):
    """One plane of x^T [PC, BM]."""
    if EVEN_K:
        x = tl.load(x_ptr, mask=m_mask, other=0.0)
    else:
        x = tl.load(x_ptr, mask=m_mask & (k < K), other=0.0)
    if IT:
        x = x.to(tl.float32)
    return x


@triton.jit
def byte_scale(packed, g: tl.constexpr, SCALE: tl.constexpr, SHIFTED: tl.constexpr):
    """Byte g of four one-byte scales: 2^(e-127), or 2^(e-16) (1 + m/8).

    SHIFTED: the latter times 2^110 in bf16, for numbers that still lack a factor of 2^126.
    """
    byte = (packed >> (8 * g)) & 0xFF
    if SCALE == "e8m0":
        return (byte << 23).to(tl.float32, bitcast=True)
    elif SHIFTED:
        return ((byte << 4) + (221 << 7)).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return ((byte << 20) + (111 << 23)).to(tl.float32, bitcast=True)


@triton.jit
def load_scale(s_ptr, packed, g: tl.constexpr, SCALE: tl.constexpr, SHIFTED: tl.constexpr):
    """Scales of group g of a tile."""
    if SCALE == "float":
        return tl.load(s_ptr).to(tl.float32)
    else:
        return byte_scale(packed, g, SCALE, SHIFTED)


@triton.jit
def load_packed(s_ptr, SCALE: tl.constexpr):
    """The four one-byte scales of each row of a tile, in one word; nothing for other scales."""
    if SCALE == "float":
        return 0
    else:
        return tl.load(s_ptr)


@triton.jit
def centre_by(number, z, ZERO: tl.constexpr):
    """number - z, row by row; exact for integer zero points."""
    if ZERO == "each":
        return number - z[:, None].to(number.dtype)
    else:
        return number


@triton.jit
def plane_number(
    numbers, plane: tl.constexpr, s, z, R: tl.constexpr, ZERO: tl.constexpr, SCALED: tl.constexpr
):
    """One plane of scaled weights s * (number - z), rounded to the numbers' type."""
    number = numbers[plane * R]
    for r in tl.static_range(1, R):
        number += numbers[plane * R + r]
    number = centre_by(number, z, ZERO)
    if SCALED:
        number = number * s[:, None].to(number.dtype)
    return number


@triton.jit
def planes_product(
    acc,
    numbers,
    x_ptr,
    k,
    m_mask,
    K,
    s,
    z,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    PC: tl.constexpr,
    R: tl.constexpr,
    FORM: tl.constexpr,
    ZERO: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN_K: tl.constexpr,
    IT: tl.constexpr,
):
    """acc + the products of COUNT planes from plane FIRST on with their columns of x."""
    for j in tl.static_range(COUNT):
        x = load_x(x_ptr + (FIRST + j) * PC, k + (FIRST + j) * PC, m_mask, K, EVEN_K, IT)
        if FORM == "element":
            w = plane_number(numbers, FIRST + j, s, z, R, ZERO, SCALED)
            acc = tl.dot(w, x, acc)
        else:
            for r in tl.static_range(R):
                number = numbers[(FIRST + j) * R + r]
                if r == R - 1:
                    number = centre_by(number, z, ZERO)
                acc = tl.dot(number, x, acc)
    return acc


@triton.jit
def corrected(p, xs_ptr, z, m_mask, sums_stride, FORM: tl.constexpr, ZERO: tl.constexpr):
    """p less what offsets and zero points put into it, by sums of x over the group."""
    if FORM == "raw":
        p -= tl.load(xs_ptr, mask=m_mask, other=0.0)[None, :]
    if ZERO == "sums":
        xs = tl.load(xs_ptr + sums_stride, mask=m_mask, other=0.0)
        p -= z[:, None] * xs[None, :]
    return p


@triton.jit
def load_zero(z_ptr, ZERO_OFFSET: tl.constexpr, ZERO: tl.constexpr):
    """Zero points of rows less the offset of symmetric codes; nothing in symmetric formats."""
    if ZERO == "none":
        return 0.0
    else:
        return tl.load(z_ptr).to(tl.float32) - ZERO_OFFSET
