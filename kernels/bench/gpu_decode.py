"""One decoding step of a Llama-shaped model with random weights, from our kernels or from torch's.

    h += o(attention(rms_norm(h)))        h += down(silu(gate) * up of rms_norm(h))

Both steps use the same norm and paged attention, so their difference is the linears: packed (norm
with group sums, gate and up in one launch, residuals in the epilogues) or bf16. Rotary embedding
and sampling are left out of both; the head is bf16 in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_subjects import Scale
from torch import Tensor

from compressor_kernels.dequant_gemm import Fusion, dequant_gemm
from compressor_kernels.kv_pool import KVPool, Pages
from compressor_kernels.layout import PlanarWeight, to_planar
from compressor_kernels.norm import rms_norm
from compressor_kernels.paged_attention import paged_attention
from compressor_kernels.store_kv import store_kv

PAGE = 16
CONTEXT = 512
VOCABULARY = 128_256
Linear = PlanarWeight | Tensor


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one block; packed or dense."""

    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear


def random_linear(shape: tuple[int, int], device: str, *, packed: bool) -> Linear:
    """int4 in symmetric groups of 128, or bf16."""
    if not packed:
        return torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02
    codes = torch.randint(0, 16, shape, device=device, dtype=torch.uint8)
    scale = torch.rand(shape[0], shape[1] // 128, device=device) * 0.005
    return to_planar(codes, scale.bfloat16(), None, 128)


def random_layers(scale: Scale, *, packed: bool) -> list[Layer]:
    """As many layers as the model has."""
    hidden, inner, count = scale.decode
    heads, kv_heads, size = scale.heads
    shapes = ((heads + 2 * kv_heads) * size, hidden), (hidden, heads * size)
    shapes = (*shapes, (2 * inner, hidden), (hidden, inner))
    return [
        Layer(*(random_linear(shape, scale.device, packed=packed) for shape in shapes))
        for _ in range(count)
    ]


def product(x: Tensor, weight: Linear, fusion: Fusion) -> Tensor:
    """x w^T with the epilogue, by our kernel or by torch."""
    if isinstance(weight, PlanarWeight):
        return dequant_gemm(x, weight, fusion=fusion)
    y = x @ weight.t()
    if fusion.gated:
        gate, up = y.chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate) * up
    return y if fusion.residual is None else y + fusion.residual


def decode_step(scale: Scale, batch: int, *, packed: bool) -> Callable[[], Tensor]:
    """A call that makes one token of each of `batch` sequences with CONTEXT tokens before them."""
    device, (hidden, _, _) = scale.device, scale.decode
    heads, kv_heads, size = scale.heads
    layers = random_layers(scale, packed=packed)
    words = VOCABULARY if device == "cuda" else 128
    head = torch.randn(words, hidden, device=device, dtype=torch.bfloat16) * 0.02
    weight = torch.ones(hidden, device=device, dtype=torch.bfloat16)
    context = CONTEXT if device == "cuda" else PAGE
    blocks = batch * context // PAGE
    tables = torch.arange(blocks, device=device, dtype=torch.int32).view(batch, -1)
    lengths = torch.full((batch,), context, device=device, dtype=torch.int32)
    pages = Pages(tables, lengths, PAGE)
    slots = tables[:, -1].long() * PAGE + PAGE - 1
    kv_size = (blocks * PAGE, kv_heads, size)
    place = torch.device(device)
    pools = [
        tuple(KVPool.empty(kv_size, None, dtype=torch.bfloat16, device=place) for _ in range(2))
        for _ in layers
    ]
    start = torch.randn(batch, hidden, device=device).bfloat16()

    def step() -> Tensor:
        h = start
        for layer, pool in zip(layers, pools, strict=True):
            x, sums = normed(h, weight, layer.qkv)
            qkv = product(x, layer.qkv, Fusion(sums=sums)).view(batch, -1, size)
            q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
            store_kv(k, slots, pool[0])
            store_kv(v, slots, pool[1])
            mixed = paged_attention(q, pool, pages, scale=size**-0.5)
            h = product(mixed.flatten(1), layer.o, Fusion(residual=h))
            x, sums = normed(h, weight, layer.gate_up)
            x = product(x, layer.gate_up, Fusion(gated=True, sums=sums))
            h = product(x, layer.down, Fusion(residual=h))
        return rms_norm(h, weight, eps=1e-5)[0] @ head.t()

    return step


def normed(h: Tensor, weight: Tensor, linear: Linear) -> tuple[Tensor, Tensor | None]:
    """RMSNorm, with group sums for a packed linear."""
    spec = linear.spec if isinstance(linear, PlanarWeight) else None
    return rms_norm(h, weight, eps=1e-5, sums_for=spec)
