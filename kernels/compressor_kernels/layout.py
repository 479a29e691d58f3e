"""The planar layout of 4-bit weights for the Triton kernel, and the way there and back.

A checkpoint row is a stream of nibbles. The kernel wants whole tiles of BN = 128 rows by BK = 128
columns, each tile one contiguous 8 KiB read:

    words  int16 [N/BN, K/BK, BN, BK/4]

Nibble p of word j in a tile is column p*32 + j ("planar along K"): two neighbouring int16 words in
a 32-bit register give two bf16 numbers with one logical instruction, and one plane is exactly one
group of 32 columns. N and K are padded to whole tiles with the zero code, scale 0.

    scales [N/BN, S, BN], zeros uint8 the same or None;  S = 1 for one group a row, else K/group

Letters: N out features, K in features, NT and KT tiles along them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor_kernels.reference import num_groups

BLOCK_N = 128
BLOCK_K = 128
PLANE_COLUMNS = BLOCK_K // 4
GROUP_SIZES = (32, 64, 128, -1)


@dataclass(frozen=True, slots=True)
class PlanarWeight:
    """A 4-bit weight [N, K] ready for `dequant_gemm`; w = scale * (q - zero)."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    shape: tuple[int, int]
    group_size: int

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {self.group_size}")
        rows, columns = tiles(self.shape)
        expected = (rows, columns, BLOCK_N, PLANE_COLUMNS)
        if tuple(self.words.shape) != expected or self.words.dtype != torch.int16:
            raise ValueError(
                f"words are {self.words.dtype} {tuple(self.words.shape)}; a weight of shape "
                f"{self.shape} needs int16 {expected}"
            )
        scales = (rows, padded_groups(self.shape[1], self.group_size), BLOCK_N)
        for tensor in (self.scales, self.scales if self.zeros is None else self.zeros):
            if tuple(tensor.shape) != scales:
                raise ValueError(f"scales and zeros need shape {scales}: {tuple(tensor.shape)}")

    @property
    def nbytes(self) -> int:
        """Bytes the three tensors hold."""
        zeros = 0 if self.zeros is None else self.zeros.nbytes
        return self.words.nbytes + self.scales.nbytes + zeros


def tiles(shape: tuple[int, int]) -> tuple[int, int]:
    """Tiles along N and K."""
    return -(-shape[0] // BLOCK_N), -(-shape[1] // BLOCK_K)


def padded_groups(columns: int, group_size: int) -> int:
    """Groups a row of whole tiles has."""
    return 1 if group_size == -1 else -(-columns // BLOCK_K) * (BLOCK_K // group_size)


def to_planar(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int
) -> PlanarWeight:
    """Repack codes uint8 [N, K], scale [N, G], zero points uint8 [N, G] (None: symmetric, 8)."""
    shape = (codes.shape[0], codes.shape[1])
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {group_size}")
    rows, columns = tiles(shape)
    padded = F.pad(codes, (0, columns * BLOCK_K - shape[1], 0, rows * BLOCK_N - shape[0]))
    planes = padded.view(rows, BLOCK_N, columns, 4, PLANE_COLUMNS).to(torch.int32)
    words = planes[:, :, :, 0].clone()
    for plane in range(1, 4):
        words |= planes[:, :, :, plane] << (4 * plane)
    words = torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)
    zeros = None if zero_point is None else _tile_groups(zero_point, shape, group_size)
    return PlanarWeight(
        words=words.permute(0, 2, 1, 3).contiguous(),
        scales=_tile_groups(scale, shape, group_size),
        zeros=zeros,
        shape=shape,
        group_size=group_size,
    )


def from_planar(weight: PlanarWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """The codes, scale and zero points that `to_planar` was given, bit for bit."""
    rows, columns = tiles(weight.shape)
    words = weight.words.permute(0, 2, 1, 3).to(torch.int32)
    planes = torch.stack([(words >> (4 * plane)) & 15 for plane in range(4)], dim=3)
    codes = planes.reshape(rows * BLOCK_N, columns * BLOCK_K).to(torch.uint8)
    codes = codes[: weight.shape[0], : weight.shape[1]].contiguous()
    zeros = None if weight.zeros is None else _untile_groups(weight.zeros, weight)
    return codes, _untile_groups(weight.scales, weight), zeros


def _tile_groups(values: Tensor, shape: tuple[int, int], group_size: int) -> Tensor:
    """[N, G] -> [N/BN, S, BN], zero padded."""
    rows = tiles(shape)[0]
    groups = padded_groups(shape[1], group_size)
    padded = F.pad(values, (0, groups - values.shape[1], 0, rows * BLOCK_N - values.shape[0]))
    return padded.view(rows, BLOCK_N, groups).permute(0, 2, 1).contiguous()


def _untile_groups(values: Tensor, weight: PlanarWeight) -> Tensor:
    groups = num_groups(weight.shape[1], weight.group_size)
    flat = values.permute(0, 2, 1).reshape(-1, values.shape[1])
    return flat[: weight.shape[0], :groups].contiguous()
