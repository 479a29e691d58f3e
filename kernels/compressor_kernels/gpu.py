"""Packed linears on a GPU: which formats the Triton kernels take, and how they are laid out."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor_kernels.kv_pool import KVPool, Pages
from compressor_kernels.layout import (
    GROUP_SIZES,
    INTEGER_KINDS,
    PlanarWeight,
    planar_float,
    to_planar,
)
from compressor_kernels.reference import read_checkpoint
from compressor_kernels.words import Kind

FLOAT_KINDS: dict[str, Kind] = {
    "float-quantized": "e4m3",
    "nvfp4-pack-quantized": "e2m1",
    "mxfp4-pack-quantized": "e2m1",
}


def kind_of(stored: str, bits: int) -> Kind | None:
    """The kernels' name of a format; None if they do not have it."""
    if stored in ("pack-quantized", "int-quantized"):
        return INTEGER_KINDS.get(bits)
    return FLOAT_KINDS.get(stored)


def takes(stored: str, bits: int, *, group_size: int, block: int) -> bool:
    """Whether the Triton kernels compute this format."""
    known = kind_of(stored, bits)
    return known is not None and (block or group_size) in GROUP_SIZES and block in (0, 128)


def multiplies_e4m3(device: torch.device) -> bool:
    """Whether the GPU's tensor cores take e4m3 as checkpoints store it (sm_89 on)."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def prepare(
    tensors: dict[str, Tensor], *, stored: str, bits: int, group_size: int, block: int
) -> dict[str, Tensor]:
    """Checkpoint tensors -> words, scale, and zeros or factor where the format has them."""
    if stored in FLOAT_KINDS:
        weight = planar_float(tensors, stored=stored, group_size=group_size, block=block)
    else:
        checkpoint = read_checkpoint(tensors, bits, group_size)
        weight = to_planar(*checkpoint, group_size, INTEGER_KINDS[bits])
    parts = {"zeros": weight.zeros, "factor": weight.factor}
    known = {name: tensor for name, tensor in parts.items() if tensor is not None}
    return {"words": weight.words, "scale": weight.scales} | known


def planar(
    resident: dict[str, Tensor], kind: Kind, *, shape: tuple[int, int], group_size: int
) -> PlanarWeight:
    """The weight whose tensors `prepare` made."""
    scale = resident["scale"]
    one_byte = {16: "e5m3", 32: "e8m0"}
    return PlanarWeight(
        resident["words"],
        scale,
        resident.get("zeros"),
        shape,
        group_size,
        kind,
        one_byte[group_size] if scale.dtype == torch.int32 else "float",
        resident.get("factor"),
    )


def apply(x: Tensor, weight: PlanarWeight) -> Tensor:
    """y [M, N] in x.dtype; float32 activations are multiplied with the dense weight."""
    from compressor_kernels.dequant_gemm import dequant_gemm  # triton exists only on Linux
    from compressor_kernels.dequantize import dequantize_planar

    if x.dtype in (torch.bfloat16, torch.float16):
        return dequant_gemm(x, weight)
    return x @ dequantize_planar(weight, torch.float32).to(x.dtype).t()


def _is_power_of_two(size: int) -> bool:
    """Whether a size is a power of two, as ranges of Triton must be."""
    return size & (size - 1) == 0


def stores(pool: KVPool) -> bool:
    """Whether the Triton kernel writes new tokens into this pool."""
    on_gpu = pool.data.device.type == "cuda" and pool.kind is not None
    return on_gpu and _is_power_of_two(pool.data.shape[2])


def store(x: Tensor, slots: Tensor, pool: KVPool) -> None:
    """Write x [T, heads, E] to `slots` int64 [T] of a pool that `stores` takes."""
    from compressor_kernels.store_kv import store_kv

    store_kv(x, slots, pool)


def attends(q: Tensor, keys: KVPool, values: KVPool) -> bool:
    """Whether the Triton kernel computes decode attention over these pools: on a GPU, for 16-bit
    queries, and where numbers are kept as they are, for pools of their dtype."""
    size = q.shape[-1]
    is_known = q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16)
    same = keys.data.shape == values.data.shape and keys.kind == values.kind
    fits = keys.kind is not None or keys.data.dtype == values.data.dtype == q.dtype
    return is_known and same and fits and size >= 16 and _is_power_of_two(size)


def attend(
    q: Tensor,
    pools: tuple[KVPool, KVPool],
    pages: Pages,
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """Decode attention: q [D, H, E] over pools of keys and values -> [D, H, E]."""
    from compressor_kernels.paged_attention import paged_attention

    return paged_attention(q, pools, pages, scale=scale, window=window)
