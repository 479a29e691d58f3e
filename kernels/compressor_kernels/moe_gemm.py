"""moe_dequant_gemm: every token times the packed weights of its experts, in one launch.

    y[i] = r[i] * x[i / top_k] @ w[expert of i]^T      i = token * top_k + choice

The choices are sorted by expert, each expert's run padded to whole tiles of BM rows; `SortedTokens`
says which choice stands in each place and which expert each tile belongs to. Experts see few rows
each, so the small tiles of `dequant_gemm.py` are the right ones; the loop is the same.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment,index"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressor_kernels.layout import PlanarWeight
from compressor_kernels.specialize import FLOATS, constants, wants_asm
from compressor_kernels.sums import group_sums
from compressor_kernels.tiles import tile_product
from compressor_kernels.tuning import KernelConfig, device_arch, heuristic, tiles


@triton.jit
def moe_gemm_kernel(
    X, Words, S, Z, XS, Factor, Places, Experts, Routing, Y,
    num_tokens, choices, N, K, stride_xm, k_tiles, top_k, sums_stride,
    words_stride, scales_stride, factor_stride,
    BM: tl.constexpr, PC: tl.constexpr, PLANES: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    G: tl.constexpr, FORM: tl.constexpr, CENTRED: tl.constexpr, ZERO: tl.constexpr,
    ZERO_OFFSET: tl.constexpr, SCALE: tl.constexpr, HAS_FACTOR: tl.constexpr,
    HAS_ROUTING: tl.constexpr, EVEN_K: tl.constexpr, ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr, PLAN: tl.constexpr, FP16: tl.constexpr, IT: tl.constexpr,
):  # fmt: skip
    """One tile of one expert; grid (N/128, tiles of rows). Y [choices, N].

    Places int32: choice in each row, `choices` in padding. Experts int32: of each tile, -1 past the
    last one. Routing float32 [choices]. Strides: from expert to expert.
    """
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    expert = tl.load(Experts + pid_m).to(tl.int64)
    if expert >= 0:
        choice = tl.load(Places + pid_m * BM + tl.arange(0, BM))
        known = choice < choices
        token = tl.where(known, choice // top_k, 0)
        acc = tile_product(
            X + token.to(tl.int64) * stride_xm, Words + expert * words_stride,
            S + expert * scales_stride, Z + expert * scales_stride, XS + token, known, K,
            num_tokens, sums_stride, pid_n, 0, k_tiles, 0, k_tiles,
            BM, PC, PLANES, W, R, G, FORM, CENTRED, ZERO, ZERO_OFFSET, SCALE, EVEN_K, ASM,
            CONSTRAINTS, PLAN, FP16, IT,
        )  # fmt: skip
        if HAS_FACTOR:
            acc *= tl.load(Factor + expert * factor_stride)
        if HAS_ROUTING:
            acc *= tl.load(Routing + choice, mask=known, other=0.0)[None, :]
        rn = pid_n * 128 + tl.arange(0, 128)
        mask = known[:, None] & (rn[None, :] < N)
        y = tl.trans(acc).to(Y.dtype.element_ty)
        tl.store(Y + choice[:, None].to(tl.int64) * N + rn[None, :], y, mask=mask)


@dataclass(frozen=True, slots=True)
class SortedTokens:
    """Choices in the order of experts. places int32 [tiles * block_m], experts int32 [tiles]."""

    places: Tensor
    experts: Tensor
    block_m: int


def sort_tokens(chosen: Tensor, num_experts: int, *, block_m: int) -> SortedTokens:
    """Sort choices [M, top_k] (expert ids) by expert, stable, padded to tiles.

    The number of tiles depends on M, top_k and the number of experts alone (for captured graphs);
    the last ones may be empty.
    """
    flat = chosen.flatten().long()
    order = flat.argsort(stable=True)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device)
    counts.index_add_(0, flat, torch.ones_like(flat))
    padded = (counts + block_m - 1) // block_m * block_m
    ends = padded.cumsum(0)
    most = min(num_experts, flat.numel())
    num_tiles = (flat.numel() + most * (block_m - 1)) // block_m
    places = torch.full((num_tiles * block_m,), flat.numel(), device=flat.device)
    before = counts.cumsum(0) - counts
    sorted_experts = flat[order]
    rank = torch.arange(flat.numel(), device=flat.device) - before[sorted_experts]
    places[(ends - padded)[sorted_experts] + rank] = order
    starts = torch.arange(num_tiles, device=flat.device) * block_m
    experts = torch.searchsorted(ends, starts, right=True)
    experts = torch.where(experts < num_experts, experts, -1)
    return SortedTokens(places.int(), experts.int(), block_m)


def stack_experts(weights: list[PlanarWeight]) -> PlanarWeight:
    """One weight whose tensors have the experts in front, flattened into rows of tiles.

    Raises ValueError when the weights differ in shape or format.
    """
    first = weights[0]
    if any(w.spec != first.spec for w in weights):
        raise ValueError("experts must have one shape and one format")
    joined: dict[str, Any] = dict.fromkeys(("zeros", "factor"))
    for name in ("words", "scales", "zeros", "factor"):
        if getattr(first, name) is not None:
            joined[name] = torch.cat([getattr(weight, name) for weight in weights])
    rows = tiles(first.shape, first.block_k)[0] * 128 * len(weights)
    return PlanarWeight(
        joined["words"], joined["scales"], joined["zeros"], (rows, first.shape[1]),
        first.group_size, first.kind, first.scale_kind, joined["factor"],
    )  # fmt: skip


def moe_dequant_gemm(
    x: Tensor,
    experts: PlanarWeight,
    tokens: SortedTokens,
    *,
    shape: tuple[int, int, int],
    routing: Tensor | None = None,
) -> Tensor:
    """y [M * top_k, N] in x.dtype: x bf16 or fp16 [M, K] with experts from `stack_experts`.

    shape: (number of experts, N, top_k). routing float32 [M * top_k] multiplies the rows. Raises
    ValueError or TypeError for operands that do not fit.
    """
    num_experts, out_features, top_k = shape
    n_tiles = -(-out_features // 128)
    if x.dim() != 2 or x.shape[1] != experts.shape[1]:
        raise ValueError(f"x must be [M, {experts.shape[1]}], got {tuple(x.shape)}")
    if experts.words.shape[0] != num_experts * n_tiles:
        raise ValueError(f"the weights are not of {num_experts} experts with {out_features} rows")
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be bfloat16 or float16, got {x.dtype}")
    interpreted = not isinstance(moe_gemm_kernel, triton.runtime.JITFunction)
    choices = x.shape[0] * top_k
    kept = torch.float32 if interpreted else x.dtype
    y = torch.empty((choices, out_features), dtype=kept, device=x.device)
    config = _config(x, experts, tokens.block_m)
    sums = None
    if config.form == "raw":
        whole = tiles(experts.shape, experts.block_k)[1] * experts.block_k
        sums = group_sums(x, experts.kind, group_size=experts.group_size, whole=whole)
    one = {name: t.numel() // num_experts for name, t in _tensors(experts).items()}
    moe_gemm_kernel[(n_tiles, tokens.experts.shape[0])](
        x, experts.words, experts.scales,
        experts.scales if experts.zeros is None else experts.zeros,
        x if sums is None else sums,
        experts.scales if experts.factor is None else experts.factor,
        tokens.places, tokens.experts, x if routing is None else routing, y,
        x.shape[0], choices, out_features, x.shape[1], x.stride(0),
        tiles(experts.shape, experts.block_k)[1], top_k,
        0 if sums is None else sums.stride(0),
        one["words"], one["scales"], one.get("factor", 0),
        BM=config.block_m,
        HAS_ROUTING=routing is not None,
        EVEN_K=x.shape[1] % experts.block_k == 0,
        IT=interpreted,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **constants(experts.spec, FLOATS[x.dtype], form=config.form, asm=wants_asm(x.device)),
    )  # fmt: skip
    return y.to(x.dtype)


def _tensors(experts: PlanarWeight) -> dict[str, Tensor]:
    known = {"words": experts.words, "scales": experts.scales, "factor": experts.factor}
    return {name: tensor for name, tensor in known.items() if tensor is not None}


def _config(x: Tensor, experts: PlanarWeight, block_m: int) -> KernelConfig:
    """The rule of a product with `block_m` rows, without split-K."""
    return heuristic(device_arch(x.device), experts.spec, block_m)
