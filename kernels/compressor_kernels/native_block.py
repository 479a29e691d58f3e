"""Decoder blocks in C: everything of a block but its attention in two calls (`native/block.c`).

For decoding on a CPU: a block of a 1 B model takes a millisecond of reading weights, and some
forty small operations from Python take a fifth of that again. `attend` is the attention of single
new tokens over a paged pool; `Decoder` runs all blocks for such tokens in one call.

Letters: T tokens, D hidden size, H query heads, G key-value heads, E size of a head, L longest
context.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from compressor_kernels.native import (
    LONG,
    POINTER,
    Tensors,
    Weight,
    WeightStruct,
    needed,
    weight_struct,
    work_bytes,
)


class _BlockStruct(ctypes.Structure):
    """`Block` of block.c."""

    _fields_ = (
        ("qkv", WeightStruct * 3),
        ("out", WeightStruct),
        ("gate_up", WeightStruct * 2),
        ("down", WeightStruct),
        *((name, POINTER) for name in ("norm_in", "norm_out", "norm_q", "norm_k")),
        *((name, LONG) for name in ("heads", "kv_heads", "size")),
        ("eps", ctypes.c_float),
    )


class _LayerStruct(ctypes.Structure):
    """`Layer` of block.c."""

    _fields_ = (
        *((name, POINTER) for name in ("block", "keys", "values")),
        ("window", LONG),
        ("scale", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class Resident:
    """A weight laid out by `native.lay_out`, and its bias (float32 [O] or None)."""

    weight: Weight
    tensors: Tensors
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Norms:
    """Gains of the four norms, float32 [D], [D], [E], [E]; the last two may be missing."""

    before: Tensor
    after: Tensor
    query: Tensor | None
    key: Tensor | None
    eps: float


NAMES = ("q", "k", "v", "o", "gate", "up", "down")


class Block:
    """One block's weights, ready for C."""

    def __init__(self, linears: dict[str, Resident], norms: Norms, *, head_size: int) -> None:
        """Check that shapes fit together.

        Args:
            linears: by the names of `NAMES`.
            norms: float32 and contiguous.
            head_size: E.

        Raises ValueError when they do not.
        """
        self._keep = (linears, norms)  # the struct points into their tensors
        shapes = [linears[name].weight.shape for name in NAMES]
        self.query, self.kv = shapes[0][0], shapes[1][0]
        self.width, self.inner = shapes[0][1], shapes[4][0]
        inward, wide = (self.kv, self.width), (self.inner, self.width)
        outward = [(self.width, self.query), wide, wide, (self.width, self.inner)]
        if shapes != [(self.query, self.width), inward, inward, *outward]:
            raise ValueError(f"shapes of a block do not fit together: {shapes}")
        if self.query % head_size or self.kv % head_size or head_size % 2:
            raise ValueError(f"heads of {head_size} do not divide {self.query} and {self.kv}")
        self.head_size = head_size
        q, k, v, o, gate, up, down = (
            weight_struct(r.weight, r.tensors, r.bias) for r in (linears[n] for n in NAMES)
        )
        self.struct = _BlockStruct(
            (q, k, v), o, (gate, up), down,
            norms.before.data_ptr(), norms.after.data_ptr(),
            None if norms.query is None else norms.query.data_ptr(),
            None if norms.key is None else norms.key.data_ptr(),
            self.query // head_size, self.kv // head_size, head_size, norms.eps,
        )  # fmt: skip
        self._by_reference = ctypes.byref(self.struct)
        self.work_bytes = {
            rounds: max(work_bytes(r.weight, 1, rounds=rounds) for r in linears.values())
            + 4 * (self.width + 2 * self.inner)
            for rounds in (False, True)
        }

    def before(
        self, x: Tensor, cosine: Tensor, sine: Tensor, *, rounds: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Norm, projections and positions: x [T, D], cosine and sine [T, E], float32 and
        contiguous -> q [T, H, E], k and v [T, G, E]."""
        count = x.shape[0]
        q, k, v = (torch.empty((count, n)) for n in (self.query, self.kv, self.kv))
        work = torch.empty(count * self.work_bytes[rounds], dtype=torch.uint8)
        needed().block_in(
            self._by_reference, x.data_ptr(), count, cosine.data_ptr(), sine.data_ptr(),
            q.data_ptr(), k.data_ptr(), v.data_ptr(), work.data_ptr(), rounds,
        )  # fmt: skip
        size = self.head_size
        return q.view(count, -1, size), k.view(count, -1, size), v.view(count, -1, size)

    def after(self, x: Tensor, attended: Tensor, *, rounds: bool) -> Tensor:
        """Output projection, residuals and MLP: x [T, D], attended [T, H * E] -> [T, D]."""
        y = torch.empty_like(x)
        work = torch.empty(len(x) * self.work_bytes[rounds], dtype=torch.uint8)
        needed().block_out(
            self._by_reference, x.data_ptr(), attended.data_ptr(), len(x), y.data_ptr(),
            work.data_ptr(), rounds,
        )  # fmt: skip
        return y


@dataclass(frozen=True, slots=True)
class Contexts:
    """Where the keys and values of single tokens lie: int64 slots [T, L] and lengths [T]."""

    slots: Tensor
    lengths: Tensor


def attend(
    q: Tensor, pool: tuple[Tensor, Tensor], contexts: Contexts, *, scale: float, window: int | None
) -> Tensor:
    """Softmax attention of one token a sequence: q [T, H, E], pool keys [S, G, E] and values
    [S, G, F], all float32 and contiguous -> [T, H, F]. `window`: only the last so many positions.
    """
    keys, values = pool
    tensors = (q, keys, values)
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in tensors):
        raise ValueError("attention in C takes contiguous float32 tensors")
    count, heads, size = q.shape
    longest, wide = contexts.slots.shape[1], values.shape[2]
    out = torch.empty((count, heads, wide))
    scores = torch.empty((count, heads, longest))
    sizes = (LONG * 7)(count, longest, heads, keys.shape[1], size, wide, window or 0)
    pointers = (t.data_ptr() for t in chain(tensors, (contexts.slots, contexts.lengths)))
    needed().attend(*pointers, out.data_ptr(), scores.data_ptr(), ctypes.byref(sizes), scale)
    return out


Pool = tuple[Tensor, Tensor]  # keys [S, G, E] and values [S, G, E] of a layer


class Decoder:
    """All blocks of a model over the pools of their layers."""

    def __init__(self, blocks: list[Block], pools: list[Pool], rules: list[tuple[float, int]]):
        """Point C at blocks and pools.

        Args:
            blocks: in order.
            pools: float32 and contiguous, of each block.
            rules: scale and window (0: all) of each block's attention.
        """
        self._keep = (blocks, pools)
        layers = [
            _LayerStruct(ctypes.addressof(b.struct), k.data_ptr(), v.data_ptr(), window, scale)
            for b, (k, v), (scale, window) in zip(blocks, pools, rules, strict=True)
        ]
        self._layers = (_LayerStruct * len(layers))(*layers)
        self._heads = max(block.query // block.head_size for block in blocks)
        self._floats = max(2 * (b.query + b.kv) + b.width for b in blocks)
        self._bytes = {r: max(b.work_bytes[r] for b in blocks) for r in (False, True)}

    def __call__(
        self, x: Tensor, turns: tuple[Tensor, Tensor], contexts: Contexts, *, rounds: bool
    ) -> Tensor:
        """x [T, D] and cosine and sine [T, E], float32 and contiguous -> [T, D] in place of x."""
        count, longest = contexts.slots.shape
        floats = self._floats + self._heads * longest
        work = torch.empty(count * (4 * floats + self._bytes[rounds]), dtype=torch.uint8)
        needed().decode(
            ctypes.byref(self._layers), len(self._layers), x.data_ptr(), count,
            turns[0].data_ptr(), turns[1].data_ptr(), contexts.slots.data_ptr(),
            contexts.lengths.data_ptr(), longest, work.data_ptr(), rounds,
        )  # fmt: skip
        return x
