"""paged_attention: one query token a sequence against its paged keys and values (decoding).

    out = softmax(scale * q k^T) v over positions  max(0, length - window) <= t < length

Grouped query heads share a key-value head and are the rows of one tile. The context is cut into a
fixed number of splits (fixed grids can be captured in a graph); each leaves its sum, its maximum
and its denominator, and a second kernel joins them in a fixed order. Quantized pools
(`store_kv.py`) are unpacked as weights are (`words.py`): plane p of a word is dimension
p * E/planes + j, so a product is a sum over planes and never reshapes; the scale of a token and
head multiplies a column of the scores and of the probabilities, not the elements.

Letters: B sequences, H query heads, K key-value heads, E head size, P splits.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment,index,misc"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressor_kernels.kv_pool import KVPool, Pages
from compressor_kernels.specialize import FLOATS, wants_asm
from compressor_kernels.tiles import plane_number, unpack
from compressor_kernels.words import LAYOUTS, Floats, Kind, assembly, constraints, numbers, plan

TOKENS = 64  # a turn of the loop
LOG2_E = 1.4426950408889634


@triton.jit
def load_planes(
    ptr, mask, PLANES: tl.constexpr, R: tl.constexpr, QUANTIZED: tl.constexpr, ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr, PLAN: tl.constexpr, FP16: tl.constexpr, IT: tl.constexpr,
):  # fmt: skip
    """Tuple of planes [T, E/planes] of keys or values as 16-bit floats."""
    raw = tl.load(ptr, mask=mask, other=0)
    if QUANTIZED:
        made = unpack((raw,), ASM, CONSTRAINTS, PLAN, True, FP16, IT)
        out = ()
        for p in tl.static_range(PLANES):
            out += (plane_number(made, p, 0.0, 0.0, R, "none", False),)
        return out
    elif IT:
        return (raw.to(tl.float32),)
    else:
        return (raw,)


@triton.jit
def weigh(acc, weights, v, p: tl.constexpr, PLANES: tl.constexpr):
    """acc + weights @ plane p of v; planes that do not exist stay as they are."""
    if p < PLANES:
        return tl.dot(weights, v[p], acc)
    else:
        return acc


@triton.jit(do_not_specialize=["stride_table"])  # tables grow: one kernel for all their widths
def paged_attention_kernel(
    Q, Keys, Values, KS, VS, Tables, Lengths, Out, Stats,
    stride_qb, stride_qh, stride_table, kv_heads, window, scale,
    E: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr,
    T: tl.constexpr, PLANES: tl.constexpr, R: tl.constexpr, QUANTIZED: tl.constexpr,
    ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, PLAN: tl.constexpr, FP16: tl.constexpr,
    IT: tl.constexpr,
):  # fmt: skip
    """One split of one key-value head; grid (B, K, P). Out [B, H, P, E], Stats [2, B, H, P]."""
    PC: tl.constexpr = E // PLANES
    b = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    length = tl.load(Lengths + b).to(tl.int32)
    begin = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - begin, splits), T) * T
    first = begin + split * share
    last = tl.minimum(first + share, length)
    rows = tl.arange(0, ROWS)
    rt = tl.arange(0, T)
    rj = tl.arange(0, PC)
    real = rows < GROUP
    q_ptr = Q + b * stride_qb + (head * GROUP + rows)[:, None] * stride_qh + rj[None, :]
    q = ()
    for p in tl.static_range(PLANES):
        part = tl.load(q_ptr + p * PC, mask=real[:, None], other=0.0)
        q += (part.to(tl.float32) if IT else part,)
    top = tl.full((ROWS,), -1e30, dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    acc0 = tl.zeros((ROWS, PC), dtype=tl.float32)
    acc1 = tl.zeros((ROWS, PC), dtype=tl.float32)
    acc2 = tl.zeros((ROWS, PC), dtype=tl.float32)
    acc3 = tl.zeros((ROWS, PC), dtype=tl.float32)
    for start in range(first, last, T):
        t = start + rt
        known = t < last
        page = tl.load(Tables + b * stride_table + t // PAGE, mask=known, other=0)
        slot = (page.to(tl.int64) * PAGE + t % PAGE) * kv_heads + head
        at = slot[:, None] * PC + rj[None, :]
        k = load_planes(
            Keys + at, known[:, None], PLANES, R, QUANTIZED, ASM, CONSTRAINTS, PLAN, FP16, IT
        )
        s = tl.dot(q[0], tl.trans(k[0]))
        for p in tl.static_range(1, PLANES):
            s = tl.dot(q[p], tl.trans(k[p]), s)
        s *= scale
        if QUANTIZED:
            s *= tl.load(KS + slot, mask=known, other=0.0)[None, :]
        s = tl.where(known[None, :], s, -1e30)
        higher = tl.maximum(top, tl.max(s, 1))
        shrink = tl.exp2(top - higher)
        weights = tl.exp2(s - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        top = higher
        if QUANTIZED:
            weights *= tl.load(VS + slot, mask=known, other=0.0)[None, :]
        v = load_planes(
            Values + at, known[:, None], PLANES, R, QUANTIZED, ASM, CONSTRAINTS, PLAN, FP16, IT
        )
        weights = weights.to(v[0].dtype)
        acc0 = weigh(acc0 * shrink[:, None], weights, v, 0, PLANES)
        acc1 = weigh(acc1 * shrink[:, None], weights, v, 1, PLANES)
        acc2 = weigh(acc2 * shrink[:, None], weights, v, 2, PLANES)
        acc3 = weigh(acc3 * shrink[:, None], weights, v, 3, PLANES)
    place = (b * kv_heads + head) * GROUP + rows
    out = Out + (place * splits + split).to(tl.int64)[:, None] * E + rj[None, :]
    accs = (acc0, acc1, acc2, acc3)
    for p in tl.static_range(PLANES):
        tl.store(out + p * PC, accs[p], mask=real[:, None])
    tl.store(Stats + place * splits + split, top, mask=real)
    shift = tl.num_programs(0) * kv_heads * GROUP * splits
    tl.store(Stats + shift + place * splits + split, total, mask=real)


@triton.jit
def join_splits_kernel(Partial, Stats, Out, heads_splits, E: tl.constexpr, P: tl.constexpr):
    """Out[b, h] from P partial sums in ascending order; grid (B * H)."""
    row = tl.program_id(0)
    e = tl.arange(0, E)
    top = tl.load(Stats + row * P)
    for split in range(1, P):
        top = tl.maximum(top, tl.load(Stats + row * P + split))
    acc = tl.zeros((E,), dtype=tl.float32)
    total = 0.0
    for split in range(P):
        weight = tl.exp2(tl.load(Stats + row * P + split) - top)
        total += weight * tl.load(Stats + heads_splits + row * P + split)
        acc += weight * tl.load(Partial + (row * P + split).to(tl.int64) * E + e)
    tl.store(Out + row * E + e, (acc / total).to(Out.dtype.element_ty))


# ------------------------------------------------------------------ host side


def kv_constants(kind: Kind | None, floats: Floats, *, asm: bool) -> dict[str, Any]:
    """Compile-time arguments that follow from the format of the pool."""
    if kind is None:
        fixed: dict[str, Any] = {"PLANES": 1, "R": 1, "ASM": "", "CONSTRAINTS": "", "PLAN": (0.0,)}
    else:
        planes = LAYOUTS[kind].num_planes
        fixed = {
            "PLANES": planes,
            "R": len(numbers(kind, floats)) // planes,
            "ASM": assembly(kind, floats) if asm else "",
            "CONSTRAINTS": constraints(kind, floats) if asm else "",
            "PLAN": plan(kind, floats),
        }
    return fixed | {"QUANTIZED": kind is not None, "FP16": floats == "fp16"}


def paged_attention(
    q: Tensor,
    pools: tuple[KVPool, KVPool],
    pages: Pages,
    *,
    scale: float,
    window: int | None = None,
    splits: int = 8,
) -> Tensor:
    """Attention of one token a sequence: q [B, H, E] bf16 or fp16 -> [B, H, E] in q.dtype.

    `splits` is fixed by the caller, so that grids do not depend on lengths. Lengths are 1 or more.
    Raises TypeError for another dtype, ValueError for sizes that do not fit.
    """
    keys, values = pools
    batch, heads, size = q.shape
    kv_heads = keys.data.shape[1]
    if q.dtype not in FLOATS:
        raise TypeError(f"q must be bfloat16 or float16, got {q.dtype}")
    fits = keys.data.shape == values.data.shape and keys.data.shape[2] * keys.planes == size
    if heads % kv_heads or not fits or keys.kind != values.kind or size & (size - 1):
        raise ValueError(f"q {tuple(q.shape)} does not fit pools of {tuple(keys.data.shape)}")
    interpreted = not isinstance(paged_attention_kernel, triton.runtime.JITFunction)
    q = q if q.stride(2) == 1 else q.contiguous()
    partial = torch.empty((batch, heads, splits, size), dtype=torch.float32, device=q.device)
    stats = torch.empty((2, batch, heads, splits), dtype=torch.float32, device=q.device)
    paged_attention_kernel[(batch, kv_heads, splits)](
        q, keys.data, values.data,
        keys.data if keys.scales is None else keys.scales,
        values.data if values.scales is None else values.scales,
        pages.tables, pages.lengths, partial, stats,
        q.stride(0), q.stride(1), pages.tables.stride(0), kv_heads,
        (1 << 30) if window is None else window, scale * LOG2_E,
        E=size,
        GROUP=heads // kv_heads,
        ROWS=max(16, triton.next_power_of_2(heads // kv_heads)),
        PAGE=pages.page,
        T=TOKENS,
        IT=interpreted,
        num_warps=4,
        num_stages=2 if wants_asm(q.device) else 1,
        **kv_constants(keys.kind, FLOATS[q.dtype], asm=wants_asm(q.device)),
    )  # fmt: skip
    out = torch.empty(q.shape, dtype=torch.float32 if interpreted else q.dtype, device=q.device)
    join_splits_kernel[(batch * heads,)](partial, stats, out, stats.stride(0), E=size, P=splits)
    return out.to(q.dtype)
