"""Codes to checkpoint tensors and back, in compressed-tensors' `pack-quantized` layout.

    weight_packed      int32 [O, ceil(I*b/32)]    unsigned codes, LSB-first stream along the inputs
    weight_scale       float [O, G]
    weight_shape       int64 (2,)                 [O, I]
    weight_zero_point  int32 [ceil(O*b/32), G]    asymmetric only; packed along the *outputs*

Writing goes through the library's own packing so that the schema stays theirs; reading back uses
`compressor_kernels.reference`, an independent implementation, so that a mistake in either shows.

Legend: O out, I in, G groups, b bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor

from compressor.artifact.formats import SCALE_DTYPES, LayerFormat
from compressor_kernels.reference import unpack_codes

ELEMENTS_AT_ONCE = 1 << 22  # weights packed or unpacked together: bounds the temporaries
SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """The stored tensors of one linear, by suffix, and the format that explains them."""

    tensors: dict[str, Tensor]
    format: LayerFormat

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the weight these tensors stand for."""
        rows, columns = self.tensors["weight_shape"].tolist()
        return int(rows), int(columns)

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


def pack_weight(codes: Tensor, scale: Tensor, zero_point: Tensor, fmt: LayerFormat) -> PackedWeight:
    """Store codes and grid.

    Args:
        codes: uint8 [O, I], unsigned.
        scale: float [O, G], already representable in the format's scale dtype.
        zero_point: int [O, G], unsigned domain; 2^(bits-1) everywhere if symmetric.
        fmt: how to store.
    """
    middle = 1 << (fmt.bits - 1)
    parts = [_pack_rows(part, fmt.bits) for part in _split_rows(codes)]
    tensors = {
        "weight_packed": torch.cat(parts),
        "weight_scale": scale.to(SCALE_DTYPES[fmt.scale_dtype]).contiguous(),
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if not fmt.symmetric:
        shifted = (zero_point.to(torch.int16) - middle).to(torch.int8)
        packed = pack_to_int32(shifted, fmt.bits, packed_dim=0)
        tensors["weight_zero_point"] = packed.contiguous()
    return PackedWeight(tensors, fmt)


def _split_rows(values: Tensor) -> tuple[Tensor, ...]:
    return torch.split(values, max(1, ELEMENTS_AT_ONCE // max(1, values.shape[1])))


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    packed: Tensor = pack_to_int32(signed, bits).contiguous()
    return packed


def unpack_weight(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [O, I], scale fp32 [O, G], zero point int32 [O, G], by the reference reader."""
    fmt, (rows, columns) = packed.format, packed.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    words = packed.tensors["weight_packed"]
    step = max(1, ELEMENTS_AT_ONCE // max(1, columns))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        codes[start:stop] = unpack_codes(words[start:stop], fmt.bits, (stop - start, columns))
    scale = packed.tensors["weight_scale"].float()
    if fmt.symmetric:
        zero = torch.full(scale.shape, 1 << (fmt.bits - 1), dtype=torch.int32)
    else:
        columns_first = packed.tensors["weight_zero_point"].t().contiguous()
        zero = unpack_codes(columns_first, fmt.bits, (scale.shape[1], rows)).t().to(torch.int32)
    return codes, scale, zero.contiguous()


def dense_weight(packed: PackedWeight) -> Tensor:
    """The weight fp32 [O, I] these tensors mean: (code - zero point) * scale."""
    codes, scale, zero = unpack_weight(packed)
    width = packed.shape[1] if packed.format.group_size == -1 else packed.format.group_size
    columns = packed.shape[1]
    scale_full = scale.repeat_interleave(width, dim=1)[:, :columns]
    zero_full = zero.repeat_interleave(width, dim=1)[:, :columns]
    return (codes.to(torch.int32) - zero_full).float() * scale_full
