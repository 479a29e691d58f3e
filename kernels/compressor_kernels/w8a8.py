"""w8a8: eight-bit weights with eight-bit activations, int8 or e4m3, one scale a row on both sides.

    y[m, n] = sx[m] * sw[n] * sum_k x[m, k] w[n, k]  (+ bias)

For more than 16 rows torch's own products are used where they exist (`_int_mm`, `_scaled_mm`:
cuBLAS and CUTLASS); for few rows the weight is the first operand of a small tile, as in
`dequant_gemm.py`, and the product is bound by its bytes.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment,index"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressor_kernels.quantize_rows import TOP, quantize_rows
from compressor_kernels.tuning import KernelConfig

FEW_ROWS = 16  # torch._int_mm wants more


@triton.jit
def w8a8_kernel(
    X, SX, W, SW, Bias, Y, M, N, K,
    BM: tl.constexpr, BK: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    INT8: tl.constexpr, IT: tl.constexpr,
):  # fmt: skip
    """One tile Y[BM, 128]; grid (N/128, M/BM). X [M, K] and W [N, K] eight-bit."""
    BN: tl.constexpr = 128
    KIND: tl.constexpr = tl.int32 if INT8 and not IT else tl.float32
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    x_ptr = X + rm[None, :].to(tl.int64) * K + rk[:, None]
    w_ptr = W + rn[:, None].to(tl.int64) * K + rk[None, :]
    acc = tl.zeros((BN, BM), dtype=KIND)
    for start in range(0, K, BK):
        x_mask = rm[None, :] < M
        w_mask = rn[:, None] < N
        if not EVEN_K:
            x_mask = x_mask & (start + rk[:, None] < K)
            w_mask = w_mask & (start + rk[None, :] < K)
        x = tl.load(x_ptr + start, mask=x_mask, other=0.0)
        w = tl.load(w_ptr + start, mask=w_mask, other=0.0, eviction_policy="evict_first")
        if IT:
            acc = tl.dot(w.to(tl.float32), x.to(tl.float32), acc)
        else:
            acc = tl.dot(w, x, acc, out_dtype=KIND)
    y = acc.to(tl.float32) * tl.load(SW + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]
    y *= tl.load(SX + rm, mask=rm < M, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(Bias + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]
    mask = (rm[:, None] < M) & (rn[None, :] < N)
    out = Y + rm[:, None].to(tl.int64) * N + rn[None, :]
    tl.store(out, tl.trans(y).to(Y.dtype.element_ty), mask=mask)


def w8a8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    config: KernelConfig | None = None,
) -> Tensor:
    """y = quantized(x) @ (scale * weight)^T: x floating [M, K], weight [N, K] int8 or e4m3.

    scale [N] or [N, 1]. With `config` the kernel runs whatever M is. Raises ValueError for operands
    that do not fit, KeyError for a weight of another dtype.
    """
    if x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must be [M, {weight.shape[1]}], got {tuple(x.shape)}")
    if scale.numel() != weight.shape[0]:
        raise ValueError(f"scale must hold {weight.shape[0]} numbers, got {tuple(scale.shape)}")
    if weight.dtype not in TOP:
        raise KeyError(f"weight must be int8 or float8_e4m3fn, got {weight.dtype}")
    q, row_scale, _ = quantize_rows(x, weight.dtype)
    factor = scale.reshape(-1).float()
    if config is None and torch_has_product(q, weight):
        y = torch_product(q, weight, row_scale, factor)
        return (y if bias is None else y + bias.float()).to(x.dtype)
    interpreted = not isinstance(w8a8_kernel, triton.runtime.JITFunction)
    kept = torch.float32 if interpreted else x.dtype
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=kept, device=x.device)
    block = min(64, max(16, triton.next_power_of_2(x.shape[0])))
    launch = KernelConfig(block, 1, 4, 4) if config is None else config
    w8a8_kernel[(-(-weight.shape[0] // 128), -(-x.shape[0] // launch.block_m))](
        q.float() if interpreted else q,
        row_scale,
        weight.float() if interpreted else weight,
        factor, x if bias is None else bias, y, x.shape[0], weight.shape[0], x.shape[1],
        BM=launch.block_m,
        BK=128,
        HAS_BIAS=bias is not None,
        EVEN_K=x.shape[1] % 128 == 0,
        INT8=weight.dtype == torch.int8,
        IT=interpreted,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )  # fmt: skip
    return y.to(x.dtype)


def torch_has_product(q: Tensor, weight: Tensor) -> bool:
    """Whether torch multiplies these operands itself, and well: many rows on a GPU."""
    fits = q.shape[0] > FEW_ROWS and weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0
    if weight.device.type != "cuda" or not fits:
        return False
    return weight.dtype == torch.int8 or torch.cuda.get_device_capability(q.device) >= (8, 9)


def torch_product(q: Tensor, weight: Tensor, row_scale: Tensor, factor: Tensor) -> Tensor:
    """The scaled product by torch, float32 (int8) or bf16 (e4m3) [M, N]."""
    if weight.dtype == torch.int8:
        return torch._int_mm(q, weight.t()).float() * row_scale[:, None] * factor
    return torch._scaled_mm(
        q, weight.t(), row_scale[:, None], factor[None, :], out_dtype=torch.bfloat16
    )
