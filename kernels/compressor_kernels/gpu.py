"""Packed linears on a GPU: which formats the Triton kernels take, and how they are laid out."""

from __future__ import annotations

import torch
from torch import Tensor

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


def attends(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the Triton kernel computes decode attention over these pools: 16-bit, on a GPU."""
    size = q.shape[-1]
    is_known = q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16)
    same = keys.shape == values.shape and keys.dtype == values.dtype == q.dtype
    return is_known and same and size >= 16 and size & (size - 1) == 0


def attend(
    q: Tensor,
    pools: tuple[Tensor, Tensor],
    contexts: tuple[Tensor, Tensor],
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """Decode attention: q [D, H, E], pools [S, K, E] of keys and values -> [D, H, E].

    contexts: slots [D, L] of each sequence and lengths [D]; a page is one slot here.
    """
    from compressor_kernels.paged_attention import Pages, paged_attention
    from compressor_kernels.store_kv import KVPool

    keys, values = (KVPool(pool, None, None) for pool in pools)
    slots, lengths = contexts
    pages = Pages(slots.int(), lengths.int(), 1)
    return paged_attention(q, (keys, values), pages, scale=scale, window=window)
