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
def byte_scale(packed, g: tl.constexpr, SCALE: tl.constexpr):
    """Byte g of four one-byte scales: 2^(e-127), or 2^(e-16) (1 + m/8)."""
    byte = (packed >> (8 * g)) & 0xFF
    if SCALE == "e8m0":
        return (byte << 23).to(tl.float32, bitcast=True)
    else:
        return ((byte << 20) + (111 << 23)).to(tl.float32, bitcast=True)


@triton.jit
def shifted_scale(packed, g: tl.constexpr, SCALE: tl.constexpr):
    """Byte g in bf16, times 2^62 or 2^81: most of what e2m1 numbers lack, which is 2^126.

    The rest is left to `restored`, so that neither scale nor product leaves bf16's range: powers of
    two from 2^-61 to 2^65 (below, weights fade to zero; above, `layout.py` refuses them).
    """
    if SCALE == "e8m0":
        bits = masked_shift(packed, 8 * g - 7, 0xFF << 7) + (62 << 7)
    else:
        bits = masked_shift(packed, 8 * g - 4, 0xFF << 4) | (192 << 7)
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def restored(acc, SCALE: tl.constexpr):
    """Sums of numbers with `shifted_scale`, times the power of two that is still missing."""
    return acc * (2.0**64 if SCALE == "e8m0" else 2.0**45)


@triton.jit
def load_scale(s_ptr, packed, g: tl.constexpr, SCALE: tl.constexpr, SHIFTED: tl.constexpr):
    """Scales of group g of a tile."""
    if SCALE == "float":
        return tl.load(s_ptr).to(tl.float32)
    else:
        return shifted_scale(packed, g, SCALE) if SHIFTED else byte_scale(packed, g, SCALE)


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
    """p less what offsets and zero points put into it, by sums of x over the one group."""
    if FORM == "raw":
        p -= tl.load(xs_ptr, mask=m_mask, other=0.0)[None, :]
    if ZERO == "sums":
        xs = tl.load(xs_ptr + sums_stride, mask=m_mask, other=0.0)
        p -= z[:, None] * xs[None, :]
    return p


@triton.jit
def group_corrections(
    acc, S, Z, xs_ptr, m_mask, sums_row, sums_stride, first, last,
    ZERO: tl.constexpr, ZERO_OFFSET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc less what offsets and zero points of groups first..last-1 put into it.

    S @ XS[0] + (S * z') @ XS[1] over 16 groups at a time, after the loop: products that the main
    loop would otherwise issue for every group. S, Z: scales and zero points of these 128 rows,
    group by group. The sums keep 22 bits in three passes of tf32.
    """
    rows = tl.arange(0, acc.shape[0])[:, None]
    for start in tl.range(first, last, 16, num_stages=1):
        group = start + tl.arange(0, 16)
        at = rows + group[None, :] * acc.shape[0]
        there = group[None, :] < last
        xs_at = xs_ptr[None, :] + group[:, None] * sums_row
        xs_there = (group[:, None] < last) & m_mask
        scale = -tl.load(S + at, mask=there, other=0.0).to(tl.float32)
        sums = tl.load(xs_at, mask=xs_there, other=0.0)
        acc = tl.dot(scale, sums, acc, input_precision=PRECISION)
        if ZERO == "sums":
            zero = tl.load(Z + at, mask=there, other=0).to(tl.float32) - ZERO_OFFSET
            sums = tl.load(xs_at + sums_stride, mask=xs_there, other=0.0)
            acc = tl.dot(scale * zero, sums, acc, input_precision=PRECISION)
    return acc


@triton.jit
def load_zero(z_ptr, ZERO_OFFSET: tl.constexpr, ZERO: tl.constexpr):
    """Zero points of rows less the offset of symmetric codes; nothing in symmetric formats."""
    if ZERO == "none":
        return 0.0
    else:
        return tl.load(z_ptr).to(tl.float32) - ZERO_OFFSET


@triton.jit
def tile_product(
    x_rows, Words, S, Z, xs_ptr, sm, K, sums_row, sums_stride, pid_n, pid_k, k_tiles, first, last,
    BM: tl.constexpr, PC: tl.constexpr, PLANES: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    G: tl.constexpr, FORM: tl.constexpr, CENTRED: tl.constexpr, ZERO: tl.constexpr,
    ZERO_OFFSET: tl.constexpr, SCALE: tl.constexpr, EVEN_K: tl.constexpr, ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr, PLAN: tl.constexpr, FP16: tl.constexpr, IT: tl.constexpr,
):  # fmt: skip
    """float32 [128, BM]: rows pid_n * 128.. of the weight, tiles first..last-1, times rows of x.

    x_rows: pointers to the BM rows, sm: which exist. xs_ptr: pointers to their sums of group 0,
    which lie `sums_row` apart from group to group (G = 0: from split to split).
    """
    BN: tl.constexpr = 128
    BK: tl.constexpr = PLANES * PC
    GROUPS: tl.constexpr = BK // G if G > 0 else 1
    EACH: tl.constexpr = PLANES // GROUPS
    SUB: tl.constexpr = GROUPS if G > 0 else 0
    SCALES: tl.constexpr = SUB if SCALE == "float" else 1
    rb = tl.arange(0, BN)
    rq = tl.arange(0, PC)
    m_mask = sm[None, :]
    k = first * BK + rq[:, None]
    x_ptr = x_rows[None, :] + k
    w_ptr = Words + (pid_n * k_tiles + first).to(tl.int64) * (W * BN * PC)
    w_ptr = w_ptr + rb[:, None] * PC + rq[None, :]
    at = (pid_n * k_tiles + first) * (SCALES * BN) + rb
    if G == 0:
        at = pid_n * BN + rb
    s = tl.load(S + at).to(tl.float32) if G == 0 else 0.0
    z = load_zero(Z + at, ZERO_OFFSET, ZERO if G == 0 else "none")
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for _ in range(first, last):
        words = load_words(w_ptr, BN * PC, W)
        numbers = unpack(words, ASM, CONSTRAINTS, PLAN, CENTRED, FP16, IT)
        packed = load_packed(S + at, SCALE)
        for g in tl.static_range(GROUPS):
            sg = s
            zg = z
            if G > 0:
                sg = load_scale(S + at + g * BN, packed, g, SCALE, not CENTRED)
                zg = load_zero(Z + at + g * BN, ZERO_OFFSET, ZERO if FORM != "raw" else "none")
            if G == 0 or FORM == "element":
                acc = planes_product(
                    acc, numbers, x_ptr, k, m_mask, K, sg, zg,
                    g * EACH, EACH, PC, R, FORM, ZERO, G > 0, EVEN_K, IT,
                )  # fmt: skip
            else:
                p = planes_product(
                    tl.zeros((BN, BM), dtype=tl.float32), numbers, x_ptr, k, m_mask, K, sg, zg,
                    g * EACH, EACH, PC, R, FORM, ZERO, False, EVEN_K, IT,
                )  # fmt: skip
                acc += sg[:, None] * p
        x_ptr += BK
        k += BK
        w_ptr += W * BN * PC
        at += SCALES * BN
    if G == 0:
        xs_ptr += pid_k * sums_row
        acc = s[:, None] * corrected(acc, xs_ptr, z, sm, sums_stride, FORM, ZERO)
    elif FORM == "element" and not CENTRED:
        acc = restored(acc, SCALE)
    elif FORM == "raw":
        base = pid_n * k_tiles * (SUB * BN)
        acc = group_corrections(
            acc, S + base, Z + base, xs_ptr, m_mask, sums_row, sums_stride,
            first * SUB, last * SUB, ZERO, ZERO_OFFSET, "ieee" if ASM == "" else "tf32x3",
        )  # fmt: skip
    return acc
