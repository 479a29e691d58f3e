"""Layer formats: how one linear's weight is stored, and what that costs.

A format is a plain value; everything that depends on it (packing, the checkpoint's
`quantization_config`, byte counts in a budget) is a function of it. Only integer weight-only
formats exist today; another kind is another dataclass and another row in `packing.py`.

Bits count everything that is stored for the weight: codes, scales and zero points.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

ScaleDtype = Literal["float32", "bfloat16", "float16"]
SCALE_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
GROUP_SIZES = (32, 64, 128, -1)


@dataclass(frozen=True, slots=True)
class LayerFormat:
    """Integer weight-only storage of a [out, in] weight.

    Args:
        bits: 2 to 8.
        group_size: inputs that share a scale; -1 = one scale for each output channel.
        symmetric: no stored zero points (the zero point is 2^(bits-1)).
        scale_dtype: dtype of the stored scales.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: ScaleDtype

    @property
    def label(self) -> str:
        """Scheme name as people write it, e.g. "W4A16_ASYM g32"."""
        group = "channel" if self.group_size == -1 else f"g{self.group_size}"
        return f"W{self.bits}A16{'' if self.symmetric else '_ASYM'} {group}"

    def num_groups(self, columns: int) -> int:
        """Scales in one row of a weight with `columns` inputs."""
        return 1 if self.group_size == -1 else math.ceil(columns / self.group_size)

    def packed_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of all stored tensors of one weight, `weight_shape` included."""
        rows, columns = shape
        groups = self.num_groups(columns)
        codes = rows * math.ceil(columns * self.bits / 32) * 4
        scales = rows * groups * SCALE_DTYPES[self.scale_dtype].itemsize
        zeros = 0 if self.symmetric else math.ceil(rows * self.bits / 32) * 4 * groups
        return codes + scales + zeros + 16

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Stored bits for each weight, scales and zero points included."""
        return 8.0 * self.packed_bytes(shape) / (shape[0] * shape[1])

    def as_json(self) -> dict[str, Any]:
        """A plain dict that `from_json` takes back."""
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> LayerFormat:
        """The format that `as_json` wrote down."""
        return LayerFormat(**value)


def fits(fmt: LayerFormat, columns: int) -> bool:
    """Whether `columns` inputs divide into whole groups (the libraries require it)."""
    return fmt.group_size == -1 or columns % fmt.group_size == 0
