"""dequant_gemm: y = x @ w^T for 4-bit weights, dequantized on the way into the tensor cores.

The weight is the dot's *first* operand (acc [BN, BM] = W [BN, BK] @ X^T [BK, BM]), so that on
NVIDIA the unpacked numbers go from registers straight into the matrix instruction. A nibble n
becomes a float by a bit trick that costs one logical instruction per two weights:

    bf16: (w & 0x000F) | 0x4300 = 128 + n        fp16: (w & 0x000F) | 0x6400 = 1024 + n

Neither the offset nor the zero point z is subtracted from weights, and no weight is multiplied by
its scale. Both are applied once a group to the float32 accumulator, with xs = the sum of x in the
group:

    acc += s * (sum_i (magic + n_i) x_i  -  (magic + z) * xs)

which is exact in the products and about a thousand times closer than rounding s*(n-z) to bf16. A
plane of the layout (`layout.py`) is 32 columns, so groups of 32, 64 and 128 are one, two and four
dots; with one group a row the scale comes after the loop.

Split-K writes float32 partial sums [SPLIT_K, M, N] which a second kernel adds in a fixed order: the
result never depends on timing.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressor_kernels.layout import BLOCK_K, PlanarWeight, padded_groups, tiles
from compressor_kernels.tuning import KernelConfig, choose_config, device_arch

MAGIC = {torch.bfloat16: 128.0, torch.float16: 1024.0}


@triton.jit
def unpack_nvidia(words, FP16: tl.constexpr):
    """int16 -> four 16-bit floats magic + n; two words a register."""
    if FP16:
        return tl.inline_asm_elementwise(
            asm="""
            {
            .reg .b32 t1, t2, t3;
            shr.u32 t1, $4, 4;
            shr.u32 t2, $4, 8;
            shr.u32 t3, $4, 12;
            lop3.b32 $0, $4, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 $1, t1, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 $2, t2, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 $3, t3, 0x000F000F, 0x64006400, 0xEA;
            }
            """,
            constraints="=r,=r,=r,=r,r",
            args=[words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            asm="""
            {
            .reg .b32 t1, t2, t3;
            shr.u32 t1, $4, 4;
            shr.u32 t2, $4, 8;
            shr.u32 t3, $4, 12;
            lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $1, t1, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $2, t2, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $3, t3, 0x000F000F, 0x43004300, 0xEA;
            }
            """,
            constraints="=r,=r,=r,=r,r",
            args=[words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def plane(words, i: tl.constexpr, FP16: tl.constexpr, IT: tl.constexpr):
    """Nibble i of each word as magic + n, without inline assembly."""
    nibble = (words >> (4 * i)) & 0xF
    if IT:
        result = nibble.to(tl.float32) + (1024.0 if FP16 else 128.0)
    elif FP16:
        result = (nibble | 0x6400).to(tl.float16, bitcast=True)
    else:
        result = (nibble | 0x4300).to(tl.bfloat16, bitcast=True)
    return result


@triton.jit
def unpack(words, FP16: tl.constexpr, ASM: tl.constexpr, IT: tl.constexpr):
    """Four planes [BN, 32] of magic + n."""
    if ASM and not IT:
        return unpack_nvidia(words, FP16)
    else:
        return (
            plane(words, 0, FP16, IT),
            plane(words, 1, FP16, IT),
            plane(words, 2, FP16, IT),
            plane(words, 3, FP16, IT),
        )


@triton.jit
def load_x(x_ptr, k, m_mask, K, EVEN_K: tl.constexpr, IT: tl.constexpr):
    """One plane of x^T [32, BM]; float32 in the interpreter, whose bf16 arithmetic is wrong."""
    if EVEN_K:
        x = tl.load(x_ptr, mask=m_mask, other=0.0)
    else:
        x = tl.load(x_ptr, mask=m_mask & (k < K), other=0.0)
    if IT:
        x = x.to(tl.float32)
    return x


@triton.jit
def rescale(acc, p, s_ptr, z_ptr, xs_ptr, sm, FP16: tl.constexpr, SYM: tl.constexpr):
    """acc + s * (p - (magic + z) * xs): the scale and zero point of one group."""
    magic: tl.constexpr = 1024.0 if FP16 else 128.0
    s = tl.load(s_ptr).to(tl.float32)
    xs = tl.load(xs_ptr, mask=sm, other=0.0)
    if SYM:
        p -= ((magic + 8.0) * xs)[None, :]
    else:
        z = tl.load(z_ptr).to(tl.float32) + magic
        p -= z[:, None] * xs[None, :]
    return acc + s[:, None] * p


@triton.jit
def dequant_gemm_kernel(
    X,
    Words,
    S,
    Z,
    XS,
    Bias,
    Y,
    M,
    N,
    K,
    stride_xm,
    k_tiles,
    tiles_a_split,
    BM: tl.constexpr,
    G: tl.constexpr,
    PARTIAL: tl.constexpr,
    SYM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    FP16: tl.constexpr,
    ASM: tl.constexpr,
    IT: tl.constexpr,
):
    """One tile Y[BM, 128] (or its partial sum over a K range); grid (N/128, M/BM, splits).

    X [M, K] 16-bit floats; Words, S, Z as in `layout.py`; XS float32 [S, M] sums of x over groups.
    PARTIAL: split-K is in use, Y is the float32 workspace and the bias comes later.
    G: group size, 0 for one group a row. IT: interpreter (float32 arithmetic throughout).
    """
    BN: tl.constexpr = 128
    BK: tl.constexpr = 128
    BQ: tl.constexpr = BK // 4
    SUB: tl.constexpr = BK // G if G > 0 else 0
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    pid_k = tl.program_id(2)
    rm = pid_m * BM + tl.arange(0, BM)
    rn = pid_n * BN + tl.arange(0, BN)
    rb = tl.arange(0, BN)
    rq = tl.arange(0, BQ)
    m_mask = rm[None, :] < M
    first = pid_k * tiles_a_split
    last = tl.minimum(first + tiles_a_split, k_tiles)
    k = first * BK + rq[:, None]
    x_ptr = X + rm[None, :] * stride_xm + k
    w_ptr = Words + (pid_n * k_tiles + first).to(tl.int64) * (BN * BQ)
    w_ptr = w_ptr + rb[:, None] * BQ + rq[None, :]
    s_ptr = S + (pid_n * k_tiles + first) * (SUB * BN) + rb
    z_ptr = Z + (pid_n * k_tiles + first) * (SUB * BN) + rb
    xs_ptr = XS + first * SUB * M + rm
    sm = rm < M
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for _ in range(first, last):
        words = tl.load(w_ptr, eviction_policy="evict_first")
        x0 = load_x(x_ptr, k, m_mask, K, EVEN_K, IT)
        x1 = load_x(x_ptr + BQ, k + BQ, m_mask, K, EVEN_K, IT)
        x2 = load_x(x_ptr + 2 * BQ, k + 2 * BQ, m_mask, K, EVEN_K, IT)
        x3 = load_x(x_ptr + 3 * BQ, k + 3 * BQ, m_mask, K, EVEN_K, IT)
        w0, w1, w2, w3 = unpack(words, FP16, ASM, IT)
        if G == 0:
            acc = tl.dot(w0, x0, acc)
            acc = tl.dot(w1, x1, acc)
            acc = tl.dot(w2, x2, acc)
            acc = tl.dot(w3, x3, acc)
        elif G == 128:
            p = tl.dot(w3, x3, tl.dot(w2, x2, tl.dot(w1, x1, tl.dot(w0, x0))))
            acc = rescale(acc, p, s_ptr, z_ptr, xs_ptr, sm, FP16, SYM)
        elif G == 64:
            p = tl.dot(w1, x1, tl.dot(w0, x0))
            acc = rescale(acc, p, s_ptr, z_ptr, xs_ptr, sm, FP16, SYM)
            p = tl.dot(w3, x3, tl.dot(w2, x2))
            acc = rescale(acc, p, s_ptr + BN, z_ptr + BN, xs_ptr + M, sm, FP16, SYM)
        else:
            acc = rescale(acc, tl.dot(w0, x0), s_ptr, z_ptr, xs_ptr, sm, FP16, SYM)
            p = tl.dot(w1, x1)
            acc = rescale(acc, p, s_ptr + BN, z_ptr + BN, xs_ptr + M, sm, FP16, SYM)
            p = tl.dot(w2, x2)
            acc = rescale(acc, p, s_ptr + 2 * BN, z_ptr + 2 * BN, xs_ptr + 2 * M, sm, FP16, SYM)
            p = tl.dot(w3, x3)
            acc = rescale(acc, p, s_ptr + 3 * BN, z_ptr + 3 * BN, xs_ptr + 3 * M, sm, FP16, SYM)
        x_ptr += BK
        k += BK
        w_ptr += BN * BQ
        s_ptr += SUB * BN
        z_ptr += SUB * BN
        xs_ptr += SUB * M
    if G == 0:
        row = pid_n * BN + rb
        xs_ptr = XS + pid_k * M + rm
        acc = rescale(tl.zeros_like(acc), acc, S + row, Z + row, xs_ptr, sm, FP16, SYM)
    if HAS_BIAS and not PARTIAL:
        acc += tl.load(Bias + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]
    y_ptr = Y + pid_k.to(tl.int64) * M * N + rm[:, None].to(tl.int64) * N + rn[None, :]
    mask = (rm[:, None] < M) & (rn[None, :] < N)
    tl.store(y_ptr, tl.trans(acc).to(Y.dtype.element_ty), mask=mask)


@triton.jit
def reduce_kernel(
    Partial, Bias, Y, size, N, SPLIT_K: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """Y[i] = sum over splits of Partial[split, i] in ascending order (+ bias)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    total = tl.load(Partial + i, mask=mask, other=0.0)
    for split in range(1, SPLIT_K):
        total += tl.load(Partial + tl.cast(size, tl.int64) * split + i, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(Bias + i % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(Y + i, total.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def group_sums_kernel(X, XS, M, K, stride_xm, SIZE, BLOCK: tl.constexpr):
    """XS[g, m] = sum of x[m, g*SIZE : (g+1)*SIZE], float32; grid (groups, M)."""
    g = tl.program_id(0)
    m = tl.program_id(1)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, SIZE, BLOCK):
        inside = start + tl.arange(0, BLOCK)
        k = g * SIZE + inside
        x = tl.load(X + m * stride_xm + k, mask=(inside < SIZE) & (k < K), other=0.0)
        total += x.to(tl.float32)
    tl.store(XS + g * M + m, tl.sum(total, 0))


# ------------------------------------------------------------------ host side


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set when this module was imported."""
    return not isinstance(dequant_gemm_kernel, triton.runtime.JITFunction)


def wants_asm(device: torch.device) -> bool:
    """Whether to unpack with NVIDIA's lop3; without it loops are twice as long.

    AMD's compiler finds its and-or from the plain form, and makes loops 5 % shorter than with
    inline assembly (195 against 206 instructions on gfx942, 16 rows).
    """
    return device.type == "cuda" and torch.version.hip is None


def check_operands(x: Tensor, weight: PlanarWeight, bias: Tensor | None) -> None:
    """Refuse what the kernel would read wrongly."""
    if x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must be [M, {weight.shape[1]}], got {tuple(x.shape)}")
    if x.dtype not in MAGIC:
        raise TypeError(f"x must be bfloat16 or float16, got {x.dtype}")
    if x.device != weight.words.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.words.device}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")


def group_sums(x: Tensor, size: int, groups: int) -> Tensor:
    """Float32 [groups, M] sums of x [M, K] over `size` columns each, zero past K."""
    sums = torch.empty((groups, x.shape[0]), dtype=torch.float32, device=x.device)
    block = min(1024, triton.next_power_of_2(size))
    group_sums_kernel[(groups, x.shape[0])](
        x, sums, x.shape[0], x.shape[1], x.stride(0), size, BLOCK=block
    )
    return sums


def dequant_gemm(
    x: Tensor,
    weight: PlanarWeight,
    *,
    bias: Tensor | None = None,
    config: KernelConfig | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = x @ w^T (+ bias): x bf16 or fp16 [M, K] -> [M, N] in `out_dtype` (x.dtype by default).

    Any N, K and M. Accumulates in float32; the same inputs and config give the same bits.
    Raises ValueError or TypeError for operands that do not fit. Without `config`, `tuning.py`
    chooses one.
    """
    check_operands(x, weight, bias)
    if config is None:
        config = choose_config(
            device_arch(x.device), weight.shape, x.shape[0], group_size=weight.group_size
        )
    x = x if x.stride(1) == 1 else x.contiguous()
    dtype = x.dtype if out_dtype is None else out_dtype
    y = torch.empty(
        (x.shape[0], weight.shape[0]),
        dtype=torch.float32 if is_interpreted() else dtype,  # its cast to bf16 truncates
        device=x.device,
    )
    if x.shape[0]:
        _launch(x, weight, y, bias, config)
    return y.to(dtype)


def _launch(
    x: Tensor, weight: PlanarWeight, y: Tensor, bias: Tensor | None, config: KernelConfig
) -> None:
    """Group sums, the product, and for split-K the ordered sum of the partial results."""
    (rows, columns), out_features = x.shape, weight.shape[0]
    n_tiles, k_tiles = tiles(weight.shape)
    tiles_a_split = -(-k_tiles // min(config.split_k, k_tiles))
    split_k = -(-k_tiles // tiles_a_split)  # every split has work
    if weight.group_size == -1:
        sums = group_sums(x, tiles_a_split * BLOCK_K, split_k)
    else:
        sums = group_sums(x, weight.group_size, padded_groups(columns, weight.group_size))
    target = y if split_k == 1 else torch.empty((split_k, *y.shape), device=x.device)
    dequant_gemm_kernel[(n_tiles, -(-rows // config.block_m), split_k)](
        x,
        weight.words,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        sums,
        x if bias is None else bias,
        target,
        rows,
        out_features,
        columns,
        x.stride(0),
        k_tiles,
        tiles_a_split,
        BM=config.block_m,
        G=max(weight.group_size, 0),
        PARTIAL=split_k > 1,
        SYM=weight.zeros is None,
        HAS_BIAS=bias is not None,
        EVEN_K=columns % BLOCK_K == 0,
        FP16=x.dtype == torch.float16,
        ASM=wants_asm(x.device),
        IT=is_interpreted(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if split_k > 1:
        _reduce(target, y, bias)


def _reduce(partial: Tensor, y: Tensor, bias: Tensor | None) -> None:
    block = 1024
    reduce_kernel[(-(-y.numel() // block),)](
        partial,
        y if bias is None else bias,
        y,
        y.numel(),
        y.shape[1],
        SPLIT_K=partial.shape[0],
        HAS_BIAS=bias is not None,
        BLOCK=block,
    )
