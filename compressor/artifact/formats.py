"""Layer formats: how one linear's weight is stored, how its inputs are rounded, what that costs.

A format is a plain value; everything that depends on it (packing, the checkpoint's
`quantization_config`, byte counts in a budget) is a function of it. Five ways of storing exist, by
compressed-tensors' names:

    pack-quantized        2-8 bit integers, any group size, optional zero points
    int-quantized         int8, a scale for each output channel
    float-quantized       e4m3, a scale for each output channel or square block
    nvfp4-pack-quantized  e2m1, an e4m3 scale for each 16 inputs, one fp32 scale for the tensor
    mxfp4-pack-quantized  e2m1, a power-of-two scale for each 32 inputs

Bits count everything that is stored for the weight: codes, scales and zero points.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from compressor.recipe.presets import SCHEMES, Activations, Number, Preset

ScaleDtype = Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "e8m0"]
SCALE_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
STORED_SCALES: dict[str, torch.dtype] = {
    **SCALE_DTYPES,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "e8m0": torch.uint8,
}
GROUP_SIZES = (32, 64, 128, -1)  # that every engine with kernels knows; 16 is stored too
_LATER = {
    "number": "int",
    "activations": "none",
    "block": 0,
    "plain": False,
}  # fields old manifests do not have


@dataclass(frozen=True, slots=True)
class LayerFormat:
    """Storage of a [out, in] weight.

    Args:
        bits: 2 to 8 for integers, 4 (e2m1) or 8 (e4m3) for floats.
        group_size: inputs that share a scale; -1 = one scale for each output channel.
        symmetric: no stored zero points (the zero point is 2^(bits-1), or 0 of a float).
        scale_dtype: dtype of the stored scales.
        number: integers or floats.
        activations: how inputs of the layer are rounded before the product.
        block: edge of square blocks that share a scale; 0 = groups.
        plain: 8-bit integers stored as int8 although inputs are not rounded (embeddings).
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: ScaleDtype
    number: Number = "int"
    activations: Activations = "none"
    block: int = 0
    plain: bool = False

    @staticmethod
    def of(preset: Preset, scale_dtype: ScaleDtype) -> LayerFormat:
        """The format of a scheme; the scales of 4-bit floats have a dtype of their own."""
        if preset.number == "float" and preset.bits == 4:
            scale_dtype = "float8_e4m3fn" if preset.group_size == 16 else "e8m0"
        return LayerFormat(
            preset.bits,
            preset.group_size,
            preset.symmetric,
            scale_dtype,
            preset.number,
            preset.activations,
            preset.block,
        )

    @property
    def preset(self) -> Preset:
        """The scheme, without the dtype of scales."""
        return Preset(
            self.bits, self.symmetric, self.group_size, self.number, self.activations, self.block
        )

    @property
    def stored(self) -> str:
        """compressed-tensors' name of the way of storing."""
        if self.number == "int":
            is_packed = (self.activations == "none" or self.bits < 8) and not self.plain
            return "pack-quantized" if is_packed else "int-quantized"
        if self.bits == 8:
            return "float-quantized"
        return f"{'nv' if self.group_size == 16 else 'mx'}fp4-pack-quantized"

    @property
    def label(self) -> str:
        """Scheme name as people write it, e.g. "W4A16_ASYM g32" or "NVFP4"."""
        preset = self.preset
        if preset.is_fixed:
            return next((name for name, known in SCHEMES.items() if known == preset), self.stored)
        group = "channel" if self.group_size == -1 else f"g{self.group_size}"
        return f"W{self.bits}A16{'' if self.symmetric else '_ASYM'} {group}"

    def num_groups(self, columns: int) -> int:
        """Scales in one row of a weight with `columns` inputs."""
        width = self.block or self.group_size
        return 1 if width == -1 else math.ceil(columns / width)

    def packed_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of all stored tensors of one weight, `weight_shape` and global scales included."""
        rows, columns = shape
        groups = self.num_groups(columns)
        scale_rows = math.ceil(rows / self.block) if self.block else rows
        scales = scale_rows * groups * STORED_SCALES[self.scale_dtype].itemsize
        if self.stored == "pack-quantized":
            codes = rows * math.ceil(columns * self.bits / 32) * 4
            zeros = 0 if self.symmetric else math.ceil(rows * self.bits / 32) * 4 * groups
            return codes + scales + zeros + 16
        return rows * columns * self.bits // 8 + scales + 4 * len(self.global_scales)

    @property
    def global_scales(self) -> tuple[str, ...]:
        """Names of the one-element fp32 tensors stored beside the scales."""
        if self.stored != "nvfp4-pack-quantized":
            return ()
        return ("weight_global_scale", "input_global_scale")[: 1 + (self.activations == "nvfp4")]

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Stored bits for each weight, scales and zero points included."""
        return 8.0 * self.packed_bytes(shape) / (shape[0] * shape[1])

    def as_json(self) -> dict[str, Any]:
        """A plain dict that `from_json` takes back; fields that came later only when set."""
        return {k: v for k, v in asdict(self).items() if k not in _LATER or v != _LATER[k]}

    @staticmethod
    def from_json(value: dict[str, Any]) -> LayerFormat:
        """The format that `as_json` wrote down."""
        return LayerFormat(**value)


def fits(fmt: LayerFormat, columns: int) -> bool:
    """Whether `columns` inputs divide into whole groups or blocks (the libraries require it)."""
    width = fmt.block or fmt.group_size
    return width == -1 or columns % width == 0
