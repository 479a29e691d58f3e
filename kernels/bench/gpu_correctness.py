"""Every op, format and tier of M against `reference.py` in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compressor_kernels import reference
from compressor_kernels.dequant_gemm import dequant_gemm
from compressor_kernels.dequantize import dequantize_planar
from compressor_kernels.kv_pool import KVPool, Pages
from compressor_kernels.layout import PlanarWeight, from_planar
from compressor_kernels.paged_attention import paged_attention
from compressor_kernels.store_kv import store_kv
from compressor_kernels.tune import random_weights
from compressor_kernels.tuning import GemmSpec, KernelConfig
from compressor_kernels.w4a8 import to_bytes, w4a8
from compressor_kernels.w8a8 import w8a8

Row = dict[str, Any]
SPECS = {
    "int4": GemmSpec("int4", 128, (0, 0)),
    "int4-asym-g32": GemmSpec("int4", 32, (0, 0), has_zeros=True),
    "int4-row": GemmSpec("int4", -1, (0, 0)),
    "int8": GemmSpec("int8", -1, (0, 0)),
    "int3": GemmSpec("int3", 128, (0, 0), has_zeros=True),
    "int2": GemmSpec("int2", 64, (0, 0)),
    "e4m3": GemmSpec("e4m3", 128, (0, 0)),
    "nvfp4": GemmSpec("e2m1", 16, (0, 0), scale_kind="e5m3"),
    "mxfp4": GemmSpec("e2m1", 32, (0, 0), scale_kind="e8m0"),
}
# bf16 outputs round to 2^-9; scaled weights of `element` round once more
LIMIT = 6e-3
BF16 = torch.bfloat16


def checks(device: str) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Names and functions; each gives relative errors and whether they are small enough."""
    tiny = device == "cpu"
    shape = (130, 300) if tiny else (1416, 4136)
    tiers = (5,) if tiny else (1, 8, 16, 33, 64, 65, 300, 1500)
    for name, spec in SPECS.items():
        one = GemmSpec(spec.kind, spec.group_size, shape, spec.has_zeros, spec.scale_kind)
        yield f"dequant_gemm/{name}", partial(gemm_check, one, tiers, device)
    yield "split_k", partial(same_bits_check, shape, device)
    yield "w4a8", partial(eight_bit_check, shape, tiers, device)
    yield "attention", partial(attention_check, device)


def judged(errors: dict[str, float]) -> Row:
    """A row of relative errors."""
    return {"errors": errors, "ok": max(errors.values()) < LIMIT}


def relative(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def dense_weight(weight: PlanarWeight) -> Tensor:
    """float64 [N, K] by the reference, from what the layout gives back."""
    codes, scale, zeros = from_planar(weight)
    if weight.kind.startswith("int"):
        offset = float(1 << (int(weight.kind[3:]) - 1)) if zeros is None else zeros
        return reference.dequantize(codes, scale.double(), offset, weight.group_size)
    levels = reference.float_levels(8 if weight.kind == "e4m3" else 4).to(codes.device)
    if weight.scale_kind == "e8m0":
        scale = torch.exp2(scale.double() - 127)
    elif weight.scale_kind == "e5m3":
        scale = torch.exp2((scale >> 3).double() - 16) * (1 + (scale & 7).double() / 8)
    expanded = reference.expand_groups(scale.double(), codes.shape[1], weight.group_size)
    return levels[codes.int()].double() * expanded


def gemm_check(spec: GemmSpec, tiers: tuple[int, ...], device: str) -> Row:
    """Products at every tier and the dense weight."""
    torch.manual_seed(0)
    weight = random_weights(spec, torch.device(device))[0]
    dense = dense_weight(weight)
    errors = {"dense": relative(dequantize_planar(weight, torch.float32), dense)}
    for rows in tiers:
        x = torch.randn(rows, spec.shape[1], device=device).to(BF16)
        errors[f"M{rows}"] = relative(dequant_gemm(x, weight), x.double() @ dense.t())
    return judged(errors)


def same_bits_check(shape: tuple[int, int], device: str) -> Row:
    """Split-K gives the same bits every time."""
    weight = random_weights(GemmSpec("int4", 128, shape), torch.device(device))[0]
    x = torch.randn(7, shape[1], device=device).to(BF16)
    repeats = 2 if device == "cpu" else 20
    results = [dequant_gemm(x, weight, config=KernelConfig(16, 3, 4, 2)) for _ in range(repeats)]
    return {"ok": all(torch.equal(y, results[0]) for y in results)}


def eight_bit_check(shape: tuple[int, int], tiers: tuple[int, ...], device: str) -> Row:
    """w4a8 and w8a8 in both types against products of what was quantized."""
    errors = {}
    codes = torch.randint(0, 16, shape, device=device).to(torch.uint8)
    scale = torch.rand(shape[0], reference.num_groups(shape[1], 128), device=device).to(BF16)
    dense = reference.dequantize(codes, scale.double(), 8.0, 128)
    has_fp8 = device == "cpu" or torch.cuda.get_device_capability() >= (8, 9)
    for dtype in (torch.int8, torch.float8_e4m3fn)[: 1 + has_fp8]:
        weight = to_bytes(codes, scale, None, group_size=128, dtype=dtype)
        eight = torch.randint(-99, 99, shape, device=device).float().to(dtype)
        for rows in tiers:
            x = torch.randn(rows, shape[1], device=device).to(BF16)
            q, factor = reference.quantize_rows(x, dtype)
            exact = q.double() * factor.double()[:, None]
            name = f"{str(dtype).removeprefix('torch.')} M{rows}"
            errors[f"w4a8 {name}"] = relative(w4a8(x, weight), exact @ dense.t())
            y = w8a8(x, eight, torch.ones(shape[0], device=device))
            errors[f"w8a8 {name}"] = relative(y, exact @ eight.double().t())
    return judged(errors)


def attention_check(device: str) -> Row:
    """Attention over exact pools, and over quantized ones against what was stored."""
    errors = {}
    length, slots = 90, torch.arange(90, device=device)
    tables = torch.arange(6, device=device, dtype=torch.int32).view(1, -1)
    pages = Pages(tables, torch.tensor([length], device=device, dtype=torch.int32), 16)
    keys, values = (torch.randn(length, 2, 64, device=device).half() for _ in range(2))
    q = torch.randn(1, 8, 64, device=device).half()
    for kind, limit in ((None, 1.0), ("int8", 0.4), ("e4m3", 0.12), ("int4", 0.025)):
        place = torch.device(device)
        pools = [KVPool.empty((96, 2, 64), kind, dtype=q.dtype, device=place) for _ in range(2)]
        store_kv(keys, slots, pools[0])
        store_kv(values, slots, pools[1])
        y = paged_attention(q, (pools[0], pools[1]), pages, scale=0.125, splits=2)[0]
        exact = reference.paged_attention(q[0], keys, values, scale=0.125)
        errors[kind or "exact"] = relative(y, exact) * limit  # rounding of the format allowed
    return judged(errors)
