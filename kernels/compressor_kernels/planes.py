"""Bit planes: codes of any width from 2 to 8 bits in a form that byte operations unpack.

The binary digits of b name the planes: 3 = 2 + 1, 4 = 4, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1. A
code is the sum of its plane values, the first plane most significant. The bytes used are exactly
those of the packed stream (columns padded to a multiple of 8), and unpacking one field of a whole
plane is one shift and one mask over contiguous bytes: no gather, no 32-bit arithmetic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PLANE_WIDTHS = (8, 4, 2, 1)


def plane_widths(bits: int) -> list[int]:
    """Plane widths, most significant first, that add up to `bits`: 7 -> [4, 2, 1]."""
    return [width for width in PLANE_WIDTHS if bits & width]


def to_planes(codes: Tensor, bits: int) -> dict[str, Tensor]:
    """Split uint8 codes [O, I] into planes; in a plane of width p, field i of byte j holds column
    i*C + j, where C = columns*p/8. Columns are padded to a multiple of 8.
    """
    codes = F.pad(codes, (0, -codes.shape[1] % 8))
    planes, low = {}, bits
    for width in plane_widths(bits):
        low -= width
        fields = ((codes >> low) & ((1 << width) - 1)).view(codes.shape[0], 8 // width, -1)
        plane = fields[:, 0].clone()
        for index in range(1, 8 // width):
            plane |= fields[:, index] << (width * index)
        planes[f"plane{width}"] = plane.contiguous()
    return planes


def from_planes(planes: dict[str, Tensor], bits: int, rows: slice) -> Tensor:
    """Codes uint8 [rows, padded columns] of some rows; the inverse of `to_planes`."""
    codes: Tensor | None = None
    low = bits
    for width in plane_widths(bits):
        low -= width
        part = _read_plane(planes[f"plane{width}"][rows], width)
        part = part if low == 0 else part.bitwise_left_shift_(low)
        codes = part if codes is None else codes.bitwise_or_(part)
    if codes is None:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    return codes


def _read_plane(plane: Tensor, width: int) -> Tensor:
    """Plane values uint8 [R, C * 8 / width] of bytes [R, C]."""
    per_byte, columns = 8 // width, plane.shape[1]
    if per_byte == 1:
        return plane.clone()
    part = torch.empty((plane.shape[0], per_byte * columns), dtype=torch.uint8, device=plane.device)
    torch.bitwise_and(plane, (1 << width) - 1, out=part[:, :columns])
    for index in range(1, per_byte):
        field = part[:, index * columns : (index + 1) * columns]
        torch.bitwise_right_shift(plane, width * index, out=field)
    part[:, columns : (per_byte - 1) * columns] &= (1 << width) - 1
    return part
