"""Paged attention for transformers' own model classes, through `AttentionInterface`.

The model code stays unmodified: it calls the registered function with queries, keys and values of
one flat row of tokens (many sequences side by side), and what to do with them stands in the active
`Attend` object, held by a context variable for the time of one forward pass. So two engines, in
one thread or in two, never see each other's state.

    # T tokens in the flat row, D of them decode (one token of a sequence), H query heads,
    # K key-value heads, R = H / K, E head size, L longest context, S slots

    out = softmax(scale * q k^T [tanh soft cap] [+ sink column]) v
          over keys with  position <= query's position  and, in sliding-window layers,
          position > query's position - window

The pools of a layer (kv_format.py: numbers, or codes with scales) have slots `block * block_size +
offset`. The last slot stays zero: padding of contexts points there, so that no request can read
another one's numbers (0 * NaN is NaN). A token sees every key as the pool gives it back,
its own included, so that neither chunks nor reused prefixes change what it sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.errors import UnsupportedError
from compressor.serve.kv_format import KVFormat, LayerShape
from compressor_kernels import gpu, native
from compressor_kernels.kv_pool import KVPool, Pages, load, store
from compressor_kernels.native_block import Contexts, attend

IMPLEMENTATION = "compressor_paged"
_IGNORED = {"dropout", "is_causal", "output_attentions", "position_ids", "use_cache"}


@dataclass(frozen=True, slots=True)
class Rule:
    """How one layer attends."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None  # [H]


class Attend(Protocol):
    """What the registered function hands its tensors to."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor: ...


_ACTIVE: ContextVar[Attend] = ContextVar("compressor_paged_attention")


@contextmanager
def active(attend: Attend) -> Iterator[None]:
    """Use `attend` for all attention layers inside the `with` block, in this thread."""
    token = _ACTIVE.set(attend)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def paged_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The function transformers calls: q [1, H, T, E], k and v [1, K, T, E] -> [1, T, H, E]."""
    layer = getattr(module, "layer_idx", None)
    scale = kwargs.pop("scaling", None)
    rule = Rule(
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        window=kwargs.pop("sliding_window", None),
        softcap=kwargs.pop("softcap", None),
        sinks=kwargs.pop("s_aux", None),
    )
    unknown = [n for n, v in kwargs.items() if isinstance(v, Tensor) and n not in _IGNORED]
    if layer is None or attention_mask is not None or unknown:
        reason = f"passes {', '.join(unknown) or 'a mask of its own or no layer index'}"
        raise UnsupportedError(f"attention of {type(module).__name__} {reason}", code="SV33")
    return _ACTIVE.get().attend(int(layer), query, key, value, rule), None


def register() -> None:
    """Tell transformers about `IMPLEMENTATION` (harmless to repeat)."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, paged_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, no_mask)


def no_mask(*_args: Any, **_kwargs: Any) -> None:
    """The mask function that goes with it: masks follow from the block tables."""


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: Rule) -> Tensor:
    """Attention with grouped heads: q [B, K, R, M, E], k, v [B, K, L, E], mask [B or 1, M, L].

    Returns [B, K, R, M, E of v].
    """
    batch, kv_heads, group, num_queries, _ = q.shape
    if rule.softcap is None and rule.sinks is None:
        rows = q.reshape(batch, kv_heads, group * num_queries, -1)
        tiled = mask.unsqueeze(1)
        if num_queries > 1:
            tiled = tiled.expand(-1, group, -1, -1).flatten(1, 2).unsqueeze(1)
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=tiled, scale=rule.scale)
        return out.reshape(batch, kv_heads, group, num_queries, -1)
    scores = (q @ k.unsqueeze(2).transpose(-1, -2)) * rule.scale
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    if rule.sinks is not None:
        sink = rule.sinks.reshape(1, kv_heads, group, 1, 1).expand(batch, -1, -1, num_queries, 1)
        scores = torch.cat([scores, sink.to(scores.dtype)], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)[..., : k.shape[-2]]
    return weights @ v.unsqueeze(2)


@dataclass(slots=True)
class Probe:
    """Plain causal attention over one sequence that notes what each layer is like.

    With `kept`, keys and values are rounded as a pool of that format rounds them.
    """

    kept: KVFormat | None = None
    shapes: dict[int, LayerShape] = field(default_factory=dict)
    rules: dict[int, Rule] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        if layer in self.shapes:
            raise UnsupportedError(f"attention layer {layer} runs twice in one pass", code="SV33")
        self.shapes[layer] = LayerShape(k.shape[1], k.shape[3], v.shape[3])
        self.rules[layer] = rule
        positions = torch.arange(q.shape[2], device=q.device)
        mask = visible(positions, positions, rule.window).unsqueeze(0)
        if self.kept is not None:
            k, v = self.kept.rounded(k), self.kept.rounded(v)
        return _chunk(q[0], k[0], v[0], mask, rule).unsqueeze(0)


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Bool [len(queries), len(keys)]: may this query position see this key position?"""
    distance = queries[:, None] - keys[None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


class KVCache:
    """The pools: per layer keys and values of every slot.

    Behind the blocks of requests lie the trash block, which padding rows of captured steps write,
    and one slot that stays zero.

    Args:
        shapes: sizes per layer index.
        num_blocks: blocks for requests.
        block_size: tokens a block.
        kept: how keys and values are kept.
        device: where.

    Raises UnsupportedError (SV33) when a head does not fit the format.
    """

    def __init__(
        self,
        shapes: dict[int, LayerShape],
        num_blocks: int,
        *,
        block_size: int,
        kept: KVFormat,
        device: torch.device,
    ) -> None:
        self.block_size, self.kept, self.device = block_size, kept, device
        self.num_slots = num_blocks * block_size
        self.trash_block, self.trash_slot = num_blocks, self.num_slots
        self.null_slot = self.num_slots + block_size
        self.pools = {
            layer: kept.pools(shape, self.null_slot + 1, device, layer=layer)
            for layer, shape in shapes.items()
        }

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pair in self.pools.values() for pool in pair)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence: `count` queries at the end of the context `slots`."""

    row: int
    count: int
    slots: Tensor  # int64 [L], the slots of positions 0 .. L-1


@dataclass(slots=True)
class PagedBatch:
    """One flat row of tokens over the pool: first D decode tokens, then prefill chunks.

    Attributes:
        slots: int64 [T], where the keys and values of each token go.
        pages: blocks and lengths of the contexts of the D decode tokens.
    """

    cache: KVCache
    slots: Tensor
    pages: Pages
    chunks: list[Chunk]
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    _contexts: Contexts | None = None

    @property
    def contexts(self) -> Contexts:
        """The decode contexts as int64 slots [D, L], padded with the null slot, and lengths [D]."""
        if self._contexts is None:
            page, lengths = self.pages.page, self.pages.lengths.long()
            inside = torch.arange(page, device=self.slots.device)
            slots = (self.pages.tables.long()[:, :, None] * page + inside).flatten(1)
            known = torch.arange(slots.shape[1], device=slots.device) < lengths[:, None]
            self._contexts = Contexts(slots.where(known, self.cache.null_slot), lengths)
        return self._contexts

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        pools = self.cache.pools[layer]
        for pool, new in zip(pools, (k, v), strict=True):
            write = gpu.store if gpu.stores(pool) else store
            write(new[0].transpose(0, 1), self.slots, pool)
        parts = []
        if self.pages.lengths.shape[0]:
            parts.append(self._decode(q[0], pools, rule))
        for index, chunk in enumerate(self.chunks):
            rows = q[0, :, chunk.row : chunk.row + chunk.count]
            keys, values = (load(pool, chunk.slots, q.dtype).transpose(0, 1) for pool in pools)
            parts.append(_chunk(rows, keys, values, self._chunk_mask(index, chunk, rule), rule))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0)

    def _decode(self, q: Tensor, pools: tuple[KVPool, KVPool], rule: Rule) -> Tensor:
        num_decodes = self.pages.lengths.shape[0]
        heads = q[:, :num_decodes].transpose(0, 1)  # [D, H, E]
        is_plain = rule.softcap is None and rule.sinks is None
        if is_plain and gpu.attends(q, *pools):
            return gpu.attend(heads, pools, self.pages, scale=rule.scale, window=rule.window)
        if is_plain and self._is_native(q, pools[0]):
            numbers = (pools[0].data, pools[1].data)
            rows = heads.contiguous()
            return attend(rows, numbers, self.contexts, scale=rule.scale, window=rule.window)
        k, v = (load(pool, self.contexts.slots, q.dtype).transpose(1, 2) for pool in pools)
        grouped = heads.reshape(num_decodes, k.shape[1], -1, 1, heads.shape[-1])
        out = attend_masked(grouped, k, v, self._decode_mask(rule), rule)
        return out.reshape(num_decodes, heads.shape[1], -1)

    @staticmethod
    def _is_native(q: Tensor, keys: KVPool) -> bool:
        on_cpu = q.device.type == "cpu" and q.dtype == keys.data.dtype == torch.float32
        return on_cpu and native.library() is not None

    def _decode_mask(self, rule: Rule) -> Tensor:
        key = (-1, rule.window)
        if key not in self._masks:
            slots, lengths = self.contexts.slots, self.contexts.lengths
            positions = torch.arange(slots.shape[1], device=slots.device)
            self._masks[key] = visible(lengths - 1, positions, rule.window).unsqueeze(1)
        return self._masks[key]

    def _chunk_mask(self, index: int, chunk: Chunk, rule: Rule) -> Tensor:
        key = (index, rule.window)
        if key not in self._masks:
            positions = torch.arange(chunk.slots.shape[0], device=self.slots.device)
            self._masks[key] = visible(positions[-chunk.count :], positions, rule.window)[None]
        return self._masks[key]


def _chunk(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: Rule) -> Tensor:
    """One sequence's queries [H, n, E] over its context [K, L, E] -> [n, H, E of v]."""
    heads, count, _ = q.shape
    grouped = q.reshape(1, k.shape[0], heads // k.shape[0], count, -1)
    out = attend_masked(grouped, k[None], v[None], mask, rule)
    return out.reshape(heads, count, -1).transpose(0, 1)
