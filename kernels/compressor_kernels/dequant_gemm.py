"""dequant_gemm: y = x @ w^T for packed weights, dequantized on the way into the tensor cores.

The weight is the dot's *first* operand (acc [BN, BM] = W [BN, BK] @ X^T [BK, BM]), so that on
NVIDIA the unpacked numbers go from registers straight into the matrix instruction. How codes
become exact numbers c = q - 2^(bits-1) (or the level of a small float) is in `words.py`. With scale
s, zero point z and z' = z - 2^(bits-1) there are three forms:

    group    acc += s * sum_i (c_i - z') x_i              scale once a group, in float32
    raw      acc += s * sum_i (offset + c_i) x_i, and after all groups
             acc -= sum_groups s * (sum_i offset x_i + z' sum_i x_i)
    element  acc += sum_i [s * (c_i - z')] x_i            scale each weight, rounded to 16 bits

`group` is the exact one. `raw` saves the subtraction from every weight where that is dear (AMD has
no bf16 arithmetic) and needs sums of x over the groups (`sums.py`; a preceding RMSNorm gives them).
`element` has one accumulator and is for many rows, where the float32 rescaling costs more than it
gives, and for groups of 16; with e4m3 and power-of-two scales of 4-bit floats it rounds nothing.
With one scale a row it comes after the loop in every form. From some hundred rows on it can be
better to write the dense weight once and multiply with it: `form="dense"`.

Split-K writes float32 partial sums [SPLIT_K, M, N] which a second kernel adds in a fixed order: the
result never depends on timing. Bias, residual and SiLU(gate) * up come with the last step.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment,index"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressor_kernels.dequantize import dequantize_planar
from compressor_kernels.layout import PlanarWeight
from compressor_kernels.specialize import FLOATS, constants, wants_asm
from compressor_kernels.split_k import reduce_partial, silu_up
from compressor_kernels.sums import group_sums
from compressor_kernels.tiles import tile_product
from compressor_kernels.tuning import (
    BLOCK_N,
    KernelConfig,
    choose_config,
    device_arch,
    tiles,
)
from compressor_kernels.words import Kind


@triton.jit
def dequant_gemm_kernel(
    X, Words, S, Z, XS, Factor, Bias, Residual, Y,
    M, N, K, stride_xm, k_tiles, tiles_a_split, sums_stride,
    BM: tl.constexpr, PC: tl.constexpr, PLANES: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    G: tl.constexpr, FORM: tl.constexpr, CENTRED: tl.constexpr, ZERO: tl.constexpr,
    ZERO_OFFSET: tl.constexpr, SCALE: tl.constexpr, PARTIAL: tl.constexpr,
    HAS_FACTOR: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr, EVEN_K: tl.constexpr, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr,
    PLAN: tl.constexpr, FP16: tl.constexpr, IT: tl.constexpr,
):  # fmt: skip
    """One tile Y[BM, 128] (or its partial sum over a K range); grid (N/128, M/BM, splits).

    X [M, K] 16-bit floats; Words, S, Z as in `layout.py`; XS [2, groups, M] as in `sums.py`.
    PARTIAL: split-K is in use, Y is the float32 workspace and the epilogue comes later.
    G: group size, 0 for one group a row. IT: interpreter (float32 arithmetic throughout).
    """
    pid_n = tl.program_id(0)
    pid_k = tl.program_id(2)
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    first = pid_k * tiles_a_split
    last = tl.minimum(first + tiles_a_split, k_tiles)
    acc = tile_product(
        X + rm * stride_xm, Words, S, Z, XS + rm, rm < M, K, M, sums_stride, pid_n, pid_k,
        k_tiles, first, last,
        BM, PC, PLANES, W, R, G, FORM, CENTRED, ZERO, ZERO_OFFSET, SCALE, EVEN_K, ASM,
        CONSTRAINTS, PLAN, FP16, IT,
    )  # fmt: skip
    if HAS_FACTOR:
        acc *= tl.load(Factor)
    store_tile(
        acc, Bias, Residual, Y, M, N, rm, pid_n, pid_k, PARTIAL, HAS_BIAS, HAS_RESIDUAL, GATED
    )  # fmt: skip


@triton.jit
def store_tile(
    acc, Bias, Residual, Y, M, N, rm, pid_n, pid_k,
    PARTIAL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Epilogue and store of acc [128, BM]; a partial sum is stored as it is."""
    BN: tl.constexpr = acc.shape[0]
    BM: tl.constexpr = acc.shape[1]
    columns = N
    rn = pid_n * BN + tl.arange(0, BN)
    if HAS_BIAS and not PARTIAL:
        acc += tl.load(Bias + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]
    if GATED and not PARTIAL:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (2, BN // 2, BM)), (1, 2, 0)))
        acc = silu_up(gate, up)
        rn = pid_n * (BN // 2) + tl.arange(0, BN // 2)
        columns = N // 2
    mask = (rm[:, None] < M) & (rn[None, :] < columns)
    at = rm[:, None].to(tl.int64) * columns + rn[None, :]
    y = tl.trans(acc)
    if HAS_RESIDUAL and not PARTIAL:
        y += tl.load(Residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(Y + pid_k.to(tl.int64) * M * N + at, y.to(Y.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------ host side


@dataclass(frozen=True, slots=True)
class Fusion:
    """What one launch does besides the product: y = act(x w^T + bias) + residual.

    bias [N]. `gated`: rows of the weight are 64 of gate and 64 of up in turn
    (`layout.interleave_gate_up`), y = silu(gate) * up with N/2 columns. residual: like y. `sums`:
    group sums of x that a preceding kernel made (`sums.py`); else they are computed when needed.
    """

    bias: Tensor | None = None
    residual: Tensor | None = None
    gated: bool = False
    sums: Tensor | None = None


ALONE = Fusion()


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set when this module was imported."""
    return not isinstance(dequant_gemm_kernel, triton.runtime.JITFunction)


def form_with_sums(form: str, kind: Kind, *, has_sums: bool) -> str:
    """`raw` in place of `group` where somebody has made the sums it needs."""
    return "raw" if has_sums and form == "group" and kind.startswith("int") else form


def check_operands(x: Tensor, weight: PlanarWeight, fusion: Fusion) -> None:
    """Refuse what the kernel would read wrongly."""
    if x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must be [M, {weight.shape[1]}], got {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be bfloat16 or float16, got {x.dtype}")
    if x.device != weight.words.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.words.device}")
    if fusion.bias is not None and tuple(fusion.bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must be [{weight.shape[0]}], got {tuple(fusion.bias.shape)}")
    if fusion.gated and weight.shape[0] % BLOCK_N:
        raise ValueError(f"gated weights have a multiple of {BLOCK_N} rows, got {weight.shape[0]}")
    out = (x.shape[0], weight.shape[0] // (1 + fusion.gated))
    if fusion.residual is not None and tuple(fusion.residual.shape) != out:
        raise ValueError(f"residual must be {out}, got {tuple(fusion.residual.shape)}")


def dequant_gemm(
    x: Tensor,
    weight: PlanarWeight,
    *,
    fusion: Fusion = ALONE,
    config: KernelConfig | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = x @ w^T: x bf16 or fp16 [M, K] -> [M, N] in `out_dtype` (x.dtype by default).

    Any N, K and M. Accumulates in float32; the same inputs and config give the same bits.
    Raises ValueError or TypeError for operands that do not fit. Without `config`, `tuning.py`
    chooses one.
    """
    check_operands(x, weight, fusion)
    if config is None:
        config = choose_config(device_arch(x.device), weight.spec, x.shape[0])
    x = x if x.stride(1) == 1 else x.contiguous()
    dtype = x.dtype if out_dtype is None else out_dtype
    y = torch.empty(
        (x.shape[0], weight.shape[0] // (1 + fusion.gated)),
        dtype=torch.float32 if is_interpreted() else dtype,  # its cast to bf16 truncates
        device=x.device,
    )
    if x.shape[0] and config.form == "dense":
        product = (x @ dequantize_planar(weight, x.dtype).t()).unsqueeze(0)
        reduce_partial(product, y, fusion.bias, fusion.residual, gated=fusion.gated)
    elif x.shape[0]:
        _launch(x, weight, y, fusion, config)
    return y.to(dtype)


def _launch(
    x: Tensor, weight: PlanarWeight, y: Tensor, fusion: Fusion, config: KernelConfig
) -> None:
    """Group sums if needed, the product, and for split-K the ordered sum of partial results."""
    (rows, columns), out_features = x.shape, weight.shape[0]
    n_tiles, k_tiles = tiles(weight.shape, weight.block_k)
    tiles_a_split = -(-k_tiles // min(config.split_k, k_tiles))
    split_k = -(-k_tiles // tiles_a_split)  # every split has work
    sums = None if weight.group_size == -1 else fusion.sums
    form = form_with_sums(config.form, weight.kind, has_sums=sums is not None)
    if sums is None and form == "raw":
        whole = tiles_a_split * weight.block_k
        sums = group_sums(x, weight.kind, group_size=weight.group_size, whole=whole)
    target = y
    if split_k > 1:
        target = torch.empty((split_k, rows, out_features), device=x.device)
    dequant_gemm_kernel[(n_tiles, -(-rows // config.block_m), split_k)](
        x, weight.words, weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        x if sums is None else sums,
        weight.scales if weight.factor is None else weight.factor,
        x if fusion.bias is None else fusion.bias,
        x if fusion.residual is None else fusion.residual,
        target, rows, out_features, columns, x.stride(0), k_tiles, tiles_a_split,
        0 if sums is None else sums.stride(0),
        BM=config.block_m,
        PARTIAL=split_k > 1,
        HAS_BIAS=fusion.bias is not None,
        HAS_RESIDUAL=fusion.residual is not None,
        GATED=fusion.gated,
        EVEN_K=columns % weight.block_k == 0,
        IT=is_interpreted(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **constants(weight.spec, FLOATS[x.dtype], form=form, asm=wants_asm(x.device)),
    )  # fmt: skip
    if split_k > 1:
        reduce_partial(target, y, fusion.bias, fusion.residual, gated=fusion.gated)
