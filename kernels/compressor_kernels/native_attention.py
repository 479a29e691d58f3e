"""Attention of whole rows in C (`native/attention.c`), for queries that see ranges of keys.

Causal masks, documents side by side in a row, padding and sliding windows are all ranges. torch's
kernel for CPUs multiplies with every key before it hides some, in products too small for MKL.

Letters: B rows, H query heads, G key-value heads, M queries, L keys, E size of a head.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from compressor_kernels import native
from compressor_kernels.native import LONG, POINTER, needed

MOST_QUERIES = 8  # that C takes at once
LARGEST_HEAD = 512
PLAIN = b"plain C"  # without vectors torch's kernel is ten times as fast


class _RowsStruct(ctypes.Structure):
    """`Rows` of attention.c."""

    _fields_ = (
        *((name, POINTER) for name in ("q", "k", "v", "begin", "end", "out", "work")),
        *((n, LONG) for n in ("batch", "heads", "kv_heads", "queries", "keys", "size", "padded")),
        *((f"{name}_strides", LONG * 3) for name in ("q", "k", "v")),
        ("scale", ctypes.c_float),
    )


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend_rows` computes these q [B, H, M, E], k and v [B, G, L, E] here."""
    on_cpu = all(x.device.type == "cpu" and x.dtype == torch.float32 for x in (q, k, v))
    found = native.library()
    if not on_cpu or k.shape != v.shape or found is None or found.isa() == PLAIN:
        return False
    size = q.shape[-1]
    fits = size == k.shape[-1] <= LARGEST_HEAD and size % found.lanes() == 0
    return fits and q.shape[1] % k.shape[1] == 0 and all(x.stride(-1) == 1 for x in (q, k, v))


def key_ranges(mask: Tensor) -> tuple[Tensor, Tensor] | None:
    """begin, end int32 [B, M] of a mask bool [B, 1, M, L], True = seen.

    None where some query sees no key, or keys that are no range.
    """
    seen = mask[:, 0]
    count = seen.sum(-1, dtype=torch.int32)
    begin = seen.to(torch.int8).argmax(-1).to(torch.int32)
    back = seen.flip(-1).to(torch.int8).argmax(-1).to(torch.int32)
    end = seen.shape[-1] - back
    is_range = bool((count > 0).all()) and bool((end - begin == count).all())
    return (begin.contiguous(), end.contiguous()) if is_range else None


def causal_ranges(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """begin, end int32 [B, T]: every token sees itself and those before it."""
    end = torch.arange(1, length + 1, dtype=torch.int32).expand(batch, length).contiguous()
    return torch.zeros_like(end), end


def attend_rows(
    q: Tensor, k: Tensor, v: Tensor, ranges: tuple[Tensor, Tensor], scale: float
) -> Tensor:
    """softmax(scale q k^T) v over each query's keys [begin, end): [B, M, H, E], contiguous.

    Args:
        q: fp32 [B, H, M, E] with unit stride in E, as k and v [B, G, L, E]; head h reads h G // H.
        k: keys.
        v: values.
        ranges: begin < end, int32 [B, M] each.
        scale: of the scores.

    Raises RuntimeError where nothing can be compiled, ValueError for what `takes` refuses.
    """
    if not takes(q, k, v):
        raise ValueError(f"{q.dtype} {tuple(q.shape)} and {tuple(k.shape)} cannot be attended to")
    begin, end = ranges
    found = needed()
    (batch, heads, queries, size), (_, kv_heads, keys, _) = q.shape, k.shape
    if begin.shape != (batch, queries) or end.shape != begin.shape:
        raise ValueError(f"ranges {tuple(begin.shape)} do not belong to {tuple(q.shape)}")
    step = 2 * found.lanes()
    padded = -(-keys // step) * step
    out = torch.empty(batch, queries, heads, size)
    work = torch.empty(batch * kv_heads * (size + MOST_QUERIES) * padded)
    strides = [(LONG * 3)(*x.stride()[:3]) for x in (q, k, v)]
    pointers = (x.data_ptr() for x in (q, k, v, begin, end, out, work))
    counts = (batch, heads, kv_heads, queries, keys, size, padded)
    found.attend_rows(ctypes.byref(_RowsStruct(*pointers, *counts, *strides, scale)))
    return out
