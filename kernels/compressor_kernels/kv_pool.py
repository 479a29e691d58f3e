"""The key-value pool of one layer: numbers as they are, or codes under a scale of their own.

    data   int16 [slots, heads, E / planes] words as in `words.py` (PC = E / planes), or numbers
    scales float32 [slots, heads]: s = max|x| / top of one token and head

    kind int8: q = round(x / s) + 128, top 127     int4: q = round(x / s) + 8, top 7
    kind e4m3: x / s rounded to nearest, half to even, top 448

`store` and `load` in plain PyTorch are the specification of `store_kv.py` and of what
`paged_attention.py` reads, and the way wherever there is no GPU.

Letters: B sequences, T tokens, E head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor_kernels.words import LAYOUTS, Kind

KV_TOP: dict[Kind, float] = {"int8": 127.0, "int4": 7.0, "e4m3": 448.0}
_ZERO: dict[Kind, int] = {"int8": 128, "int4": 8}  # the code of 0


@dataclass(frozen=True, slots=True)
class KVPool:
    """Keys or values of every slot of one layer; `kind` None keeps the numbers as they are."""

    data: Tensor
    scales: Tensor | None
    kind: Kind | None

    @staticmethod
    def empty(
        size: tuple[int, int, int], kind: Kind | None, *, dtype: torch.dtype, device: torch.device
    ) -> KVPool:
        """A zeroed pool of (slots, heads, E). Raises ValueError for an E the kind cannot split."""
        if kind is None:
            return KVPool(torch.zeros(size, dtype=dtype, device=device), None, None)
        planes = LAYOUTS[kind].num_planes
        if kind not in KV_TOP or size[2] % (16 * planes):
            raise ValueError(f"{kind} needs head sizes in multiples of {16 * planes}: {size[2]}")
        words = (size[0], size[1], size[2] // planes)
        data = torch.zeros(words, dtype=torch.int16, device=device)
        return KVPool(data, torch.ones(size[:2], dtype=torch.float32, device=device), kind)

    @property
    def planes(self) -> int:
        """Numbers in a word."""
        return 1 if self.kind is None else LAYOUTS[self.kind].num_planes

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)


@dataclass(frozen=True, slots=True)
class Pages:
    """Where contexts lie: block tables int32 [B, pages], lengths int32 [B], tokens a page."""

    tables: Tensor
    lengths: Tensor
    page: int


def pack(x: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Numbers [..., E] -> words int16 [..., E / planes] and scales float32 [...]."""
    top, wide = KV_TOP[kind], x.float()
    highest = wide.abs().amax(-1)
    scale = torch.where(highest > 0, highest / top, torch.ones_like(highest))
    ratio = (wide / scale[..., None]).clamp(-top, top)
    if kind == "e4m3":
        codes = ratio.to(torch.float8_e4m3fn).view(torch.uint8).int()
    else:
        codes = ratio.round().int() + _ZERO[kind]
    bits, planes = LAYOUTS[kind].bits, LAYOUTS[kind].num_planes
    parts = codes.view(*codes.shape[:-1], planes, -1)
    words = torch.zeros_like(parts[..., 0, :])
    for plane in range(planes):
        words |= parts[..., plane, :] << (bits * plane)
    return words.to(torch.int16), scale


def unpack(words: Tensor, scales: Tensor, kind: Kind) -> Tensor:
    """Words [..., PC] and scales [...] -> float32 [..., E]."""
    bits, planes = LAYOUTS[kind].bits, LAYOUTS[kind].num_planes
    wide, mask = words.int(), (1 << bits) - 1
    codes = torch.cat([(wide >> (bits * plane)) & mask for plane in range(planes)], dim=-1)
    if kind == "e4m3":
        levels = codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
    else:
        levels = (codes - _ZERO[kind]).float()
    return levels * scales[..., None]


def check_tokens(x: Tensor, pool: KVPool) -> None:
    """Raise ValueError when heads or E of x [T, heads, E] are not the pool's."""
    if x.shape[1] != pool.data.shape[1] or x.shape[2] != pool.data.shape[2] * pool.planes:
        raise ValueError(f"x is {tuple(x.shape)}, the pool {tuple(pool.data.shape)} words")


def store(x: Tensor, slots: Tensor, pool: KVPool) -> None:
    """Write x [T, heads, E] to `slots` int64 [T] of the pool (errors: `check_tokens`)."""
    check_tokens(x, pool)
    if pool.kind is None or pool.scales is None:
        pool.data.index_copy_(0, slots, x.to(pool.data.dtype))
        return
    words, scales = pack(x, pool.kind)
    pool.data.index_copy_(0, slots, words)
    pool.scales.index_copy_(0, slots, scales)


def load(pool: KVPool, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of `slots` int64 [...] as `dtype` [..., heads, E]."""
    if pool.kind is None or pool.scales is None:
        return pool.data[slots].to(dtype)
    return unpack(pool.data[slots], pool.scales[slots], pool.kind).to(dtype)
