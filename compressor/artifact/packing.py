"""Codes to checkpoint tensors and back, in the layouts of compressed-tensors.

    pack-quantized   weight_packed      int32 [O, ceil(I*b/32)]   LSB-first stream along the inputs
                     weight_scale       float [O, G]
                     weight_shape       int64 (2,)                [O, I]
                     weight_zero_point  int32 [ceil(O*b/32), G]   asymmetric; along the *outputs*
    int-quantized    weight             int8 [O, I]
                     weight_scale       float [O, 1]
    float-quantized  weight             e4m3 [O, I]
                     weight_scale       float [O, 1], or [ceil(O/128), I/128] for blocks
    nvfp4, mxfp4     weight_packed      uint8 [O, I/2]            low nibble first
                     weight_scale       e4m3 [O, I/16], or uint8 [O, I/32]: 2^(e - 127)
                     weight_global_scale, input_global_scale  fp32 (1,)   nvfp4; scales are divided

In memory codes are uint8 [O, I] everywhere: unsigned integers, or the bits of a float. The scale
that comes with them, fp32 [O, G], is what a level is multiplied with (global scales included).
Writing integers goes through the library's own packing so that the schema stays theirs; reading
back uses `compressor_kernels.reference`, an independent implementation, so that a mistake in either
shows.

Legend: O out, I in, G groups, b bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor

from compressor.artifact.formats import SCALE_DTYPES, LayerFormat
from compressor_kernels.reference import (
    expand_groups,
    float_levels,
    float_scales,
    pack_nibbles,
    unpack_codes,
    unpack_nibbles,
)

ELEMENTS_AT_ONCE = 1 << 22  # weights packed or unpacked together: bounds the temporaries
SUFFIXES = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_global_scale",
    "input_global_scale",
)
Codes = tuple[Tensor, Tensor, Tensor]  # uint8 [O, I], scale fp32 [O, G], zero point int32 [O, G]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """The stored tensors of one linear, by suffix, and the format that explains them."""

    tensors: dict[str, Tensor]
    format: LayerFormat

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the weight these tensors stand for."""
        if "weight_shape" in self.tensors:
            rows, columns = self.tensors["weight_shape"].tolist()
            return int(rows), int(columns)
        if "weight" in self.tensors:
            rows, columns = self.tensors["weight"].shape
            return rows, columns
        rows, half = self.tensors["weight_packed"].shape
        return rows, 2 * half

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def global_scales(self) -> dict[str, Tensor]:
        """The one-element tensors beside the scales, by suffix."""
        return {n: self.tensors[n] for n in self.format.global_scales if n in self.tensors}


def pack_weight(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    fmt: LayerFormat,
    *,
    global_scales: Mapping[str, Tensor] | None = None,
) -> PackedWeight:
    """Store codes and grid.

    Args:
        codes: uint8 [O, I]: unsigned integers or the bits of floats.
        scale: float [O, G], already representable in the format's scale dtype.
        zero_point: int [O, G], unsigned domain; 2^(bits-1) everywhere if symmetric; not looked at
            for floats.
        fmt: how to store.
        global_scales: the tensors that `fmt.global_scales` names, stored as they are; that of the
            inputs may come later.
    """
    if fmt.stored == "pack-quantized":
        return PackedWeight(_pack_integers(codes, scale, zero_point, fmt), fmt)
    if fmt.bits == 8:
        return PackedWeight(_pack_bytes(codes, scale, fmt), fmt)
    known = dict(global_scales or {})
    if fmt.stored == "mxfp4-pack-quantized":
        stored = (torch.frexp(scale).exponent + 126).to(torch.uint8)  # scale = 0.5 * 2^exponent
    else:
        stored = (scale * known["weight_global_scale"]).to(torch.float8_e4m3fn)
    tensors = {"weight_packed": pack_nibbles(codes), "weight_scale": stored.contiguous()}
    return PackedWeight(tensors | {n: known[n] for n in fmt.global_scales if n in known}, fmt)


def _pack_integers(
    codes: Tensor, scale: Tensor, zero_point: Tensor, fmt: LayerFormat
) -> dict[str, Tensor]:
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
    return tensors


def _pack_bytes(codes: Tensor, scale: Tensor, fmt: LayerFormat) -> dict[str, Tensor]:
    if fmt.number == "int":
        weight = (codes - 128).view(torch.int8)  # modulo 256: the signed code
    else:
        weight = codes.contiguous().view(torch.float8_e4m3fn)
    rows = scale[:: fmt.block] if fmt.block else scale
    return {"weight": weight, "weight_scale": rows.to(SCALE_DTYPES[fmt.scale_dtype]).contiguous()}


def _split_rows(values: Tensor) -> tuple[Tensor, ...]:
    return torch.split(values, max(1, ELEMENTS_AT_ONCE // max(1, values.shape[1])))


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    packed: Tensor = pack_to_int32(signed, bits).contiguous()
    return packed


def unpack_weight(packed: PackedWeight) -> Codes:
    """Codes uint8 [O, I], scale fp32 [O, G], zero point int32 [O, G], by the reference reader."""
    fmt = packed.format
    if fmt.stored == "pack-quantized":
        return _unpack_integers(packed)
    scale = float_scales(packed.tensors, fmt.stored)
    if fmt.block:
        scale = scale.repeat_interleave(fmt.block, dim=0)[: packed.shape[0]].contiguous()
    if fmt.number == "int":
        codes = packed.tensors["weight"].view(torch.uint8) + 128
        return codes, scale, torch.full(scale.shape, 128, dtype=torch.int32)
    if fmt.bits == 8:
        codes = packed.tensors["weight"].view(torch.uint8)
    else:
        codes = unpack_nibbles(packed.tensors["weight_packed"])
    return codes, scale, torch.zeros(scale.shape, dtype=torch.int32)


def _unpack_integers(packed: PackedWeight) -> Codes:
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
    """The weight fp32 [O, I] these tensors mean: level * scale."""
    return expand_codes(unpack_weight(packed), packed.format)


def expand_codes(codes: Codes, fmt: LayerFormat) -> Tensor:
    """Dense fp32 [O, I]: (code - zero point) * scale, or the float a code stands for * scale."""
    q, scale, zero = codes
    rows, columns = q.shape
    width = fmt.block or (columns if fmt.group_size == -1 else fmt.group_size)
    if fmt.number == "float":
        levels = float_levels(fmt.bits).to(q.device)[q.int()]
        return levels * expand_groups(scale, columns, width)
    if columns % width:
        return (q.float() - expand_groups(zero, columns, width)) * expand_groups(
            scale, columns, width
        )
    grouped = q.view(rows, -1, width).to(scale.dtype)  # the only copy: the rest is in place
    return grouped.sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).view(rows, columns)
