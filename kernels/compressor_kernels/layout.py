"""The planar layout of packed weights for the GPU kernels, and the way there and back.

A checkpoint row is a stream of codes. The kernel wants whole tiles of BN = 128 rows by
BK = planes * PC columns, each tile contiguous (8 KiB a word tensor at PC = 32):

    words  int16 [N/BN, K/BK, W, BN, PC]      fields as in `words.py`
    scales [N/BN, S, BN], zeros uint8 the same or None;  S = 1 for one group a row, else K/group

N and K are padded to whole tiles with the zero code. The one-byte scales of 4-bit floats, four
groups a tile, lie as int32 [N/BN, K/BK, BN]: "e8m0" is 2^(e-127) with 0 for 0 (MXFP4); "e5m3" is
2^(e-16) (1 + m/8), every positive e4m3 number without subnormals (NVFP4, whose tensor scale is
`factor`). Other scales ("float") keep their dtype.

Letters: N out features, K in features, NT and KT tiles along them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor_kernels.reference import num_groups, unpack_nibbles
from compressor_kernels.tuning import BLOCK_N, GemmSpec, tiles
from compressor_kernels.words import LAYOUTS, Kind, columns_a_plane

GROUP_SIZES = (16, 32, 64, 128, -1)
MOST_E8M0 = 192  # `tiles.shifted_scale`
INTEGER_KINDS: dict[int, Kind] = {2: "int2", 3: "int3", 4: "int4", 8: "int8"}


@dataclass(frozen=True, slots=True)
class PlanarWeight:
    """A packed weight [N, K] ready for the kernels; w = factor * scale * (q - zero)."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    shape: tuple[int, int]
    group_size: int
    kind: Kind = "int4"
    scale_kind: str = "float"
    factor: Tensor | None = None

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {self.group_size}")
        rows, columns = tiles(self.shape, self.block_k)
        expected = (rows, columns, LAYOUTS[self.kind].words, BLOCK_N, self.plane_columns)
        if tuple(self.words.shape) != expected or self.words.dtype != torch.int16:
            raise ValueError(
                f"words are {self.words.dtype} {tuple(self.words.shape)}; a weight of shape "
                f"{self.shape} needs int16 {expected}"
            )
        groups = padded_groups(self.shape[1], self.group_size, self.block_k)
        scales = (rows, groups if self.scale_kind == "float" else columns, BLOCK_N)
        for tensor in (self.scales, self.scales if self.zeros is None else self.zeros):
            if tuple(tensor.shape) != scales:
                raise ValueError(f"scales and zeros need shape {scales}: {tuple(tensor.shape)}")

    @property
    def plane_columns(self) -> int:
        """PC."""
        return columns_a_plane(self.kind, self.group_size)

    @property
    def block_k(self) -> int:
        """Columns of a tile."""
        return self.plane_columns * LAYOUTS[self.kind].num_planes

    @property
    def spec(self) -> GemmSpec:
        """What a launch configuration is chosen by."""
        has_zeros = self.zeros is not None
        return GemmSpec(self.kind, self.group_size, self.shape, has_zeros, self.scale_kind)

    @property
    def nbytes(self) -> int:
        """Bytes the tensors hold."""
        return sum(t.nbytes for t in (self.words, self.scales, self.zeros) if t is not None)


def padded_groups(columns: int, group_size: int, block_k: int) -> int:
    """Groups a row of whole tiles has."""
    return 1 if group_size == -1 else -(-columns // block_k) * (block_k // group_size)


def to_planar(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    kind: Kind = "int4",
) -> PlanarWeight:
    """Repack codes uint8 [N, K], scale [N, G], zero points uint8 [N, G] (None: 2^(bits-1)).

    Scales of dtype uint8 are "e5m3" in groups of 16 and "e8m0" in groups of 32.
    """
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {group_size}")
    shape = (codes.shape[0], codes.shape[1])
    block_k = columns_a_plane(kind, group_size) * LAYOUTS[kind].num_planes
    scale_kind, scales = "float", tile_groups(scale, shape, group_size, block_k)
    if scale.dtype == torch.uint8:
        scale_kind = {16: "e5m3", 32: "e8m0"}[group_size]
        scales = _four_bytes(scales)
    return PlanarWeight(
        words=pack_words(codes, kind, group_size),
        scales=scales,
        zeros=None if zero_point is None else tile_groups(zero_point, shape, group_size, block_k),
        shape=shape,
        group_size=group_size,
        kind=kind,
        scale_kind=scale_kind,
    )


def pack_words(codes: Tensor, kind: Kind, group_size: int) -> Tensor:
    """Codes uint8 [N, K] -> words int16 [NT, KT, W, BN, PC]."""
    layout, pc = LAYOUTS[kind], columns_a_plane(kind, group_size)
    rows, columns = tiles((codes.shape[0], codes.shape[1]), pc * layout.num_planes)
    missing = columns * pc * layout.num_planes - codes.shape[1]
    padded = F.pad(codes, (0, missing, 0, rows * BLOCK_N - codes.shape[0]))
    planes = padded.view(rows, BLOCK_N, columns, layout.num_planes, pc)
    size = (rows, columns, layout.words, BLOCK_N, pc)
    words = torch.zeros(size, dtype=torch.int32, device=codes.device)
    for plane, pieces in enumerate(layout.planes):
        values = planes[:, :, :, plane].permute(0, 2, 1, 3).to(torch.int32)
        for piece in pieces:
            field = (values >> piece.code) & ((1 << piece.width) - 1)
            words[:, :, piece.word] |= field << piece.bit
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)


def from_planar(weight: PlanarWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """The codes, scale and zero points that `to_planar` was given, bit for bit."""
    layout = LAYOUTS[weight.kind]
    words = weight.words.to(torch.int32)
    planes = []
    for pieces in layout.planes:
        values = torch.zeros_like(words[:, :, 0])
        for piece in pieces:
            field = (words[:, :, piece.word] >> piece.bit) & ((1 << piece.width) - 1)
            values |= field << piece.code
        planes.append(values.permute(0, 2, 1, 3))
    codes = torch.stack(planes, dim=3).to(torch.uint8).flatten(2).flatten(0, 1)
    codes = codes[: weight.shape[0], : weight.shape[1]].contiguous()
    zeros = (
        None
        if weight.zeros is None
        else untile_groups(weight.zeros, weight.shape, weight.group_size)
    )
    scales = weight.scales if weight.scale_kind == "float" else _from_four_bytes(weight.scales)
    return codes, untile_groups(scales, weight.shape, weight.group_size), zeros


def planar_float(
    tensors: dict[str, Tensor], *, stored: str, group_size: int, block: int = 0
) -> PlanarWeight:
    """A weight of a float format (`reference.dequantize_stored`) for the kernels.

    Raises ValueError for what the kernels cannot hold: NaN codes, scales that are not positive or,
    powers of two, above 2^65, and square blocks other than 128.
    """
    scale = tensors["weight_scale"]
    if stored == "float-quantized":
        codes = tensors["weight"].view(torch.uint8)
        if bool(((codes & 127) == 127).any()):
            raise ValueError("the weight holds NaN")
        if block:
            scale = scale.repeat_interleave(block, dim=0)[: codes.shape[0]]
        return to_planar(codes, scale, None, block or group_size, "e4m3")
    codes = unpack_nibbles(tensors["weight_packed"])
    if stored == "mxfp4-pack-quantized":
        if bool((scale > MOST_E8M0).any()):
            raise ValueError("scales are above 2^65, more than the kernels' bf16 holds")
        return to_planar(codes, scale, None, group_size, "e2m1")
    known = scale.float().repeat_interleave(group_size, dim=1)[:, : codes.shape[1]] != 0
    made = to_planar(codes * known, e5m3(scale), None, group_size, "e2m1")
    factor = tensors["weight_global_scale"].float().reciprocal().reshape(1)
    return PlanarWeight(
        made.words, made.scales, None, made.shape, group_size, "e2m1", "e5m3", factor
    )


def e5m3(scale: Tensor) -> Tensor:
    """Bytes of e4m3 numbers as 2^(e-16) (1 + m/8): uint8; 0 where the number is 0.

    Raises ValueError for negative numbers and NaN.
    """
    values = scale.float()
    if not bool((values >= 0).all()):
        raise ValueError("scales must be numbers of zero or more")
    mantissa, exponent = torch.frexp(values)
    code = ((exponent + 15) * 8 + (mantissa * 2 - 1) * 8).to(torch.uint8)
    return torch.where(values == 0, torch.zeros_like(code), code)


def interleave_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of two tensors [F, ...] in turns of 64: what a gated product multiplies with.

    Raises ValueError when F is not a multiple of 64.
    """
    if gate.shape != up.shape or gate.shape[0] % (BLOCK_N // 2):
        raise ValueError(f"gate and up need the same multiple of 64 rows: {gate.shape[0]}")
    halves = [part.view(-1, BLOCK_N // 2, *part.shape[1:]) for part in (gate, up)]
    return torch.stack(halves, dim=1).reshape(2 * gate.shape[0], *gate.shape[1:])


def tile_groups(values: Tensor, shape: tuple[int, int], group_size: int, block_k: int) -> Tensor:
    """[N, G] -> [N/BN, S, BN], zero padded."""
    rows = tiles(shape, block_k)[0]
    groups = padded_groups(shape[1], group_size, block_k)
    padded = F.pad(values, (0, groups - values.shape[1], 0, rows * BLOCK_N - values.shape[0]))
    return padded.view(rows, BLOCK_N, groups).permute(0, 2, 1).contiguous()


def untile_groups(values: Tensor, shape: tuple[int, int], group_size: int) -> Tensor:
    """[N/BN, S, BN] -> [N, G], without the padding."""
    groups = num_groups(shape[1], group_size)
    flat = values.permute(0, 2, 1).reshape(-1, values.shape[1])
    return flat[: shape[0], :groups].contiguous()


def _four_bytes(scales: Tensor) -> Tensor:
    """uint8 [NT, 4 KT, BN] -> int32 [NT, KT, BN], the first group in the low byte."""
    apart = scales.view(scales.shape[0], -1, 4, BLOCK_N).transpose(2, 3).contiguous()
    return apart.view(torch.int32).squeeze(-1)


def _from_four_bytes(words: Tensor) -> Tensor:
    apart = words.unsqueeze(-1).view(torch.uint8).transpose(2, 3)
    return apart.reshape(words.shape[0], -1, BLOCK_N)
