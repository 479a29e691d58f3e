"""w4a8: int4 weights with eight-bit activations, e4m3 or int8, in the tensor cores of that type.

    y[m, n] = sx[m] * sum over groups of s * (h * sum_i t_i x_i - (z - c) * sum_i x_i)

Four codes of neighbouring columns become the four bytes of a register. In int8 they are taken as
they are (t = q, h = 1, c = 0). In e4m3 a byte-permute instruction looks them up: it has eight
entries, so the code enters as an odd number, t = 2q - 15, whose magnitude is one of 1, 3, .. 15
(all exact in e4m3) and whose sign is a bit of its own (h = 1/2, c = 7.5). Offsets and zero points
are applied by the sums of quantized x over groups, which the quantization of x makes anyway.

Layout: tiles of 128 x 128 codes as in `layout.py`, but four int16 words 4t..4t+3 of a row hold
columns 4t..4t+3 of all four planes (of 32 columns each):

    int8   word 4t + 2(p/2) + i/2, bits 8(i%2) + 4(p%2): column 4t+i of plane p
    e4m3   magnitude (|2q-15| - 1) / 2: word 4t + p, bits 4i..4i+2;
           sign: word 4t + 2(p/2) + i/2, bit 8(i%2) + (3 if p is odd else 7)
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment,index"

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from compressor_kernels.layout import tile_groups, untile_groups
from compressor_kernels.quantize_rows import quantize_rows
from compressor_kernels.reference import dequantize
from compressor_kernels.tuning import BLOCK_N, KernelConfig, tiles

INT8_ASM = (
    "{ .reg .b32 a, b; mov.b32 a, $4; mov.b32 b, $5;"
    " and.b32 $0, a, 0x0F0F0F0F; shr.u32 a, a, 4; and.b32 $1, a, 0x0F0F0F0F;"
    " and.b32 $2, b, 0x0F0F0F0F; shr.u32 b, b, 4; and.b32 $3, b, 0x0F0F0F0F; }"
)
# e4m3 of 1, 3, 5, 7 and 9, 11, 13, 15
LOW, HIGH = "0x4E4A4438", "0x57555351"


def _two_planes(first: int, source: str) -> str:
    """e4m3 bytes of planes `first` and `first` + 1 from one register."""
    return (
        f" and.b32 t, {source}, 0x7777; prmt.b32 t, l, h, t;"
        f" lop3.b32 ${first}, {source}, 0x80808080, t, 0xEA;"
        f" shr.u32 t, {source}, 16; and.b32 t, t, 0x7777; prmt.b32 t, l, h, t;"
        f" shl.b32 {source}, {source}, 4; lop3.b32 ${first + 1}, {source}, 0x80808080, t, 0xEA;"
    )


E4M3_ASM = (
    "{ .reg .b32 a, b, t, l, h; mov.b32 a, $4; mov.b32 b, $5;"
    f" mov.b32 l, {LOW}; mov.b32 h, {HIGH};" + _two_planes(0, "a") + _two_planes(2, "b") + " }"
)


@triton.jit
def four_planes(words, ASM: tl.constexpr, FP8: tl.constexpr):
    """int16 words -> four planes of eight-bit numbers; four words a turn."""
    if FP8:
        return tl.inline_asm_elementwise(
            asm=ASM, constraints="=r,=r,=r,=r,r,r", args=[words], dtype=(tl.float8e4nv,) * 4,
            is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            asm=ASM, constraints="=r,=r,=r,=r,r,r", args=[words], dtype=(tl.int8,) * 4,
            is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def gathered_plane(tile_ptr, j, p: tl.constexpr, FP8: tl.constexpr):
    """Plane p from memory, word by word: the layout in other words, for the interpreter."""
    i = j % 4
    shared = tl.load(tile_ptr + j // 4 * 4 + p // 2 * 2 + i // 2).to(tl.int32)
    if FP8:
        own = tl.load(tile_ptr + j // 4 * 4 + p).to(tl.int32)
        magnitude = 2 * ((own >> (4 * i)) & 7) + 1
        sign = (shared >> (8 * (i % 2) + (3 if p % 2 else 7))) & 1
        return tl.where(sign == 1, -magnitude, magnitude).to(tl.float32)
    else:
        return ((shared >> (8 * (i % 2) + 4 * (p % 2))) & 15).to(tl.float32)


@triton.jit
def w4a8_kernel(
    X, SX, Words, S, Z, XS, Bias, Y, M, N, K, k_tiles,
    BM: tl.constexpr, G: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr, FP8: tl.constexpr, ASM: tl.constexpr, IT: tl.constexpr,
):  # fmt: skip
    """One tile Y[BM, 128]; grid (N/128, M/BM). X [M, K] eight-bit, XS float32 [groups, M]."""
    BN: tl.constexpr = 128
    GROUPS: tl.constexpr = 128 // G if G > 0 else 1
    EACH: tl.constexpr = 4 // GROUPS
    SUB: tl.constexpr = GROUPS if G > 0 else 0
    KIND: tl.constexpr = tl.float32 if FP8 or IT else tl.int32
    half: tl.constexpr = 0.5 if FP8 else 1.0
    centre: tl.constexpr = 7.5 if FP8 else 0.0
    pid_n = tl.program_id(0)
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    rb = tl.arange(0, BN)
    rq = tl.arange(0, 32)
    k = rq[:, None]
    x_ptr = X + rm[None, :].to(tl.int64) * K + k
    w_ptr = Words + (pid_n * k_tiles).to(tl.int64) * (BN * 32) + rb[:, None] * 32
    at = pid_n * k_tiles * (SUB * BN) + rb if G > 0 else pid_n * BN + rb
    xs_ptr = XS + rm
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    whole = tl.zeros((BN, BM), dtype=KIND)
    for _ in range(k_tiles):
        if not IT:
            words = tl.load(w_ptr + rq[None, :], eviction_policy="evict_first")
            planes = four_planes(words, ASM, FP8)
        for g in tl.static_range(GROUPS):
            p = whole if G == 0 else tl.zeros((BN, BM), dtype=KIND)
            for j in tl.static_range(EACH):
                offset = (g * EACH + j) * 32
                mask = (rm[None, :] < M) & (k + offset < K)
                if EVEN_K:
                    mask = rm[None, :] < M
                x = tl.load(x_ptr + offset, mask=mask, other=0.0)
                if IT:
                    w = gathered_plane(w_ptr, rq[None, :], g * EACH + j, FP8)
                    p = tl.dot(w, x.to(tl.float32), p)
                elif FP8:
                    p = tl.dot(planes[g * EACH + j], x, p)
                else:
                    p = tl.dot(planes[g * EACH + j], x, p, out_dtype=tl.int32)
            if G == 0:
                whole = p
            else:
                acc += scaled(p, S, Z, xs_ptr + g * M, at + g * BN, rm, M, half, centre, HAS_ZEROS)
        x_ptr += 128
        k += 128
        w_ptr += BN * 32
        at += SUB * BN
        xs_ptr += SUB * M
    if G == 0:
        acc = scaled(whole, S, Z, xs_ptr, at, rm, M, half, centre, HAS_ZEROS)
    acc *= tl.load(SX + rm, mask=rm < M, other=0.0)[None, :]
    rn = pid_n * BN + rb
    if HAS_BIAS:
        acc += tl.load(Bias + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]
    mask = (rm[:, None] < M) & (rn[None, :] < N)
    y = tl.trans(acc).to(Y.dtype.element_ty)
    tl.store(Y + rm[:, None].to(tl.int64) * N + rn[None, :], y, mask=mask)


@triton.jit
def scaled(
    p, S, Z, xs_ptr, at, rm, M, half: tl.constexpr, centre: tl.constexpr, HAS_ZEROS: tl.constexpr
):
    """s * (half * p - (z - centre) * xs)."""
    s = tl.load(S + at).to(tl.float32)
    xs = tl.load(xs_ptr, mask=rm < M, other=0.0)
    p = p.to(tl.float32) * half
    if HAS_ZEROS:
        z = tl.load(Z + at).to(tl.float32) - centre
        p -= z[:, None] * xs[None, :]
    else:
        p -= ((8.0 - centre) * xs)[None, :]
    return s[:, None] * p


# ------------------------------------------------------------------ host side


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteWeight:
    """An int4 weight [N, K] for eight-bit activations; w = scale * (q - zero), zero 8 if None.

    words int16 [N/128, K/128, 128, 32]; scales and zeros as in `layout.py`.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    shape: tuple[int, int]
    group_size: int
    dtype: torch.dtype

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What has to be kept, by the names of the fields."""
        found = {"words": self.words, "scales": self.scales}
        return found if self.zeros is None else found | {"zeros": self.zeros}

    def codes(self) -> Tensor:
        """The codes uint8 [N, K] that `to_bytes` packed."""
        words = self.words.unflatten(-1, (8, 4)).int()
        planes = []
        for p in range(4):
            for i in range(4):
                shared, odd = words[..., p // 2 * 2 + i // 2], p % 2
                if self.dtype == torch.int8:
                    planes.append((shared >> (8 * (i % 2) + 4 * odd)) & 15)
                    continue
                size = (words[..., p] >> (4 * i)) & 7
                is_low = (shared >> (8 * (i % 2) + (3 if odd else 7))) & 1
                planes.append(torch.where(is_low == 1, 7 - size, 8 + size))
        apart = torch.stack(planes, -1).unflatten(-1, (4, 4))  # [N/128, K/128, 128, 8, 4, 4]
        padded = apart.permute(0, 2, 1, 4, 3, 5).flatten(2).flatten(0, 1)
        codes: Tensor = padded[: self.shape[0], : self.shape[1]].to(torch.uint8)
        return codes

    def dense(self) -> Tensor:
        """The weight, float32 [N, K]."""
        scale = untile_groups(self.scales, self.shape, self.group_size).float()
        zero: Tensor | float = 8.0
        if self.zeros is not None:
            zero = untile_groups(self.zeros, self.shape, self.group_size)
        return dequantize(self.codes(), scale, zero, self.group_size)


def to_bytes(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, *, group_size: int, dtype: torch.dtype
) -> ByteWeight:
    """Repack codes uint8 [N, K] for activations of `dtype` (int8 or e4m3).

    Raises ValueError for a group size other than 32, 64, 128 and -1.
    """
    if group_size not in (32, 64, 128, -1):
        raise ValueError(f"group_size must be 32, 64, 128 or -1, got {group_size}")
    shape = (codes.shape[0], codes.shape[1])
    rows, columns = tiles(shape, 128)
    padded = F.pad(codes, (0, columns * 128 - shape[1], 0, rows * BLOCK_N - shape[0]))
    apart = padded.view(rows, BLOCK_N, columns, 4, 8, 4).permute(0, 2, 1, 3, 4, 5).int()
    words = torch.zeros((rows, columns, BLOCK_N, 8, 4), dtype=torch.int32, device=codes.device)
    for p in range(4):
        for i in range(4):
            q, shared, odd = apart[:, :, :, p, :, i], p // 2 * 2 + i // 2, p % 2
            if dtype == torch.int8:
                words[..., shared] |= q << (8 * (i % 2) + 4 * odd)
            else:
                words[..., p] |= ((2 * q - 15).abs() - 1) // 2 << (4 * i)
                words[..., shared] |= (q < 8).int() << (8 * (i % 2) + (3 if odd else 7))
    words = torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)
    zeros = None if zero_point is None else tile_groups(zero_point, shape, group_size, 128)
    scales = tile_groups(scale, shape, group_size, 128)
    return ByteWeight(
        words=words.flatten(3),
        scales=scales,
        zeros=zeros,
        shape=shape,
        group_size=group_size,
        dtype=dtype,
    )


def w4a8(
    x: Tensor,
    weight: ByteWeight,
    *,
    bias: Tensor | None = None,
    config: KernelConfig | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = quantized(x) @ w^T: x floating [M, K] -> [M, N]; any M, N, K.

    Raises ValueError when x does not fit the weight, and on AMD, for which there is no kernel.
    """
    if torch.version.hip is not None:
        raise ValueError("w4a8 unpacks with PTX; AMD has no kernel of it")
    if x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must be [M, {weight.shape[1]}], got {tuple(x.shape)}")
    rows, out_features = x.shape[0], weight.shape[0]
    dtype = x.dtype if out_dtype is None else out_dtype
    interpreted = not isinstance(w4a8_kernel, triton.runtime.JITFunction)
    kept = torch.float32 if interpreted else dtype
    y = torch.empty((rows, out_features), dtype=kept, device=x.device)
    if not rows:
        return y.to(dtype)
    q, scales, sums = quantize_rows(x, weight.dtype, group_size=weight.group_size)
    is_fp8 = weight.dtype == torch.float8_e4m3fn
    block = min(64, max(16, triton.next_power_of_2(rows)))
    launch = KernelConfig(block, 1, 4, 4) if config is None else config
    n_tiles, k_tiles = tiles(weight.shape, 128)
    w4a8_kernel[(n_tiles, -(-rows // launch.block_m))](
        q.float() if interpreted else q,
        scales, weight.words, weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        sums, x if bias is None else bias, y, rows, out_features, x.shape[1], k_tiles,
        BM=launch.block_m,
        G=max(weight.group_size, 0),
        HAS_ZEROS=weight.zeros is not None,
        HAS_BIAS=bias is not None,
        EVEN_K=x.shape[1] % 128 == 0,
        FP8=is_fp8,
        ASM=E4M3_ASM if is_fp8 else INT8_ASM,
        IT=interpreted,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )  # fmt: skip
    return y.to(dtype)
