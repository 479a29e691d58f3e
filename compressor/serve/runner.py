"""The model on one step's tokens: a flat row in, logits of the needed positions out.

`ModelRunner` learns the shape of the key-value pool by running the model once (no table of
architectures), and refuses a model whose paged logits differ from its own attention's: linear
attention, position biases, caches shared between layers and whatever else does not pass through
`AttentionInterface` is found by that comparison and named, never served wrong.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.errors import UnsupportedError, printable
from compressor.modeling.packed_linear import unrounded_inputs
from compressor.serve import attention
from compressor.serve.attention import Chunk, KVCache, PagedBatch, Probe
from compressor.serve.graphs import Capture, DecodeGraphs, buckets, obstacle
from compressor.serve.kv_format import KVFormat
from compressor.serve.native_stack import NativeStack
from compressor.serve.scheduler import Scheduled
from compressor.serve.sequence import SamplingParams, Sequence
from compressor_kernels.kv_pool import Pages

_SELF_CHECK_TOKENS = 24
# Relative error of the logits that rounding can explain; a wrong mask gives about 1.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}


@dataclass(frozen=True, slots=True)
class Rows:
    """Where one scheduled item's logits lie: `prompt` rows from `first`, then the sampled one."""

    first: int
    num_prompt: int
    sampled: int | None

    @property
    def stop(self) -> int:
        return self.first + self.num_prompt + (self.sampled is not None)


class ModelRunner:
    """A transformers causal language model over a paged pool (built by `open_pool`).

    Args:
        model: on its device, in evaluation mode.
        kv_cache_dtype: a name in `options.KV_CACHE_DTYPES`.
    """

    def __init__(self, model: Any, kv_cache_dtype: str = "auto") -> None:
        self.model = model
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.kept = KVFormat.of(kv_cache_dtype, self.dtype)
        self.original = model.config._attn_implementation
        self.cache: KVCache | None = None
        self.graphs: DecodeGraphs | None = None
        self.block_size = 0
        self._arguments = forward_arguments(model)
        attention.register()
        self._switch(attention.IMPLEMENTATION)
        self.stack = NativeStack.of(model)
        try:
            probe = self._probe()
        except Exception:
            self.close()
            raise
        self.shapes, self.rules = probe.shapes, probe.rules

    def close(self) -> None:
        """Give the model its own attention back; drop what was recorded of it."""
        self.graphs = None
        self._switch(self.original)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys, values and their scales of one token in all layers.

        Raises UnsupportedError (SV33) when a head does not fit the format of the pool.
        """
        nowhere = torch.device("meta")
        layers = [self.kept.pools(s, 1, nowhere, layer=i) for i, s in self.shapes.items()]
        return sum(pool.nbytes for pair in layers for pool in pair)

    def open_pool(self, num_blocks: int, block_size: int) -> None:
        """Allocate the pool."""
        self.block_size = block_size
        self.cache = KVCache(
            self.shapes, num_blocks, block_size=block_size, kept=self.kept, device=self.device
        )
        if self.stack is not None:
            self.stack.open_pool(self.cache)

    @torch.inference_mode()
    def run(self, items: list[Scheduled]) -> tuple[Tensor, list[Rows]]:
        """Logits [rows, V] (float32) and, for each item in order, where its rows are."""
        order = sorted(range(len(items)), key=lambda i: items[i].count > 1)  # decodes first
        flat = [items[i] for i in order]
        starts = itertools.accumulate((item.count for item in flat), initial=0)
        picked: list[int] = []
        rows: dict[int, Rows] = {}
        for index, item, start in zip(order, flat, starts, strict=False):
            prompt = item.sequence.prompt_rows(item.start, item.stop)
            first = len(picked)
            picked += [start + p - item.start for p in prompt]
            if item.samples:
                picked.append(start + item.count - 1)
            rows[index] = Rows(first, len(prompt), len(picked) - 1 if item.samples else None)
        return self._logits(flat, picked), [rows[i] for i in range(len(items))]

    def _logits(self, flat: list[Scheduled], picked: list[int]) -> Tensor:
        """Logits [picked, V]: by the C stack, by a graph, or by the model's own Python."""
        ids = [t for item in flat for t in item.sequence.tokens[item.start : item.stop]]
        positions = [p for item in flat for p in range(item.start, item.stop)]
        if self.stack is not None and self.stack.takes(len(ids)):
            return self.stack(*self._tensors(ids, positions, picked), self._batch(flat))
        is_decode = len(ids) == len(flat)
        if is_decode and self.graphs is not None and len(ids) <= self.graphs.max_rows:
            return self.graphs(ids, positions, *self._decode_rows(flat))[picked]
        with attention.active(self._batch(flat)):
            return self._forward(ids, positions, picked)

    def open_graphs(self, max_rows: int, max_tokens: int, capture: Capture) -> str:
        """Record decode steps of up to `max_rows` sequences and `max_tokens` positions.

        Returns a note: what was recorded, or why steps run without graphs. Uses blocks of
        the pool, so it must run before any request.
        """
        assert self.cache is not None
        query = torch.empty(0, dtype=self.dtype, device=self.device)
        reason = obstacle(query, self.cache, self.rules.items())
        if reason:
            return f"decoding without CUDA graphs: {reason}"
        sizes = {"max_rows": max_rows, "max_blocks": -(-max_tokens // self.block_size)}
        try:
            self.graphs = DecodeGraphs(self._step, self.cache, **sizes, capture=capture)
            error = self._graph_error(max_rows)
        except RuntimeError as failure:
            self.graphs = None
            return f"decoding without CUDA graphs: {str(failure).partition(chr(10))[0]}"
        if error > _TOLERANCE.get(self.dtype, 0.15):
            self.graphs = None
            return f"decoding without CUDA graphs: they differ by {error:.2g} (relative)"
        return f"decode steps of up to {max_rows} sequences recorded, error {error:.1e} (relative)"

    @torch.inference_mode()
    def _step(self, ids: Tensor, positions: Tensor, batch: PagedBatch) -> Tensor:
        with attention.active(batch):
            arguments = {"input_ids": ids, "position_ids": positions, "use_cache": False}
            return self.model(**arguments).logits[0].float()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def _graph_error(self, max_rows: int) -> float:
        """Largest distance of recorded from unrecorded logits, over the buckets."""
        assert self.graphs is not None
        assert self.cache is not None
        found = []
        for rows in buckets(max_rows):
            blocks = [index % self.cache.trash_block for index in range(rows)]
            first = [Scheduled(_probe_sequence([b % 7], first=b), 0, 1) for b in blocks]
            ids, picked = [item.sequence.tokens[0] for item in first], list(range(rows))
            recorded = self.graphs(ids, [0] * rows, *self._decode_rows(first)).clone()
            with attention.active(self._batch(first)):
                found.append(_distance(recorded, self._forward(ids, [0] * rows, picked)))
        return max(found)

    @torch.inference_mode()
    def warm_up(self, sizes: list[int]) -> None:
        """Read prompts of these many tokens, so that every kernel they need is compiled."""
        for count in sizes:
            self.run([Scheduled(_probe_sequence([0] * count, self.block_size), 0, count)])

    def self_check(self, vocab_size: int) -> float:
        """Relative error of chunked, paged logits against the model's eager attention.

        A pool that rounds is compared with one pass of plain attention over rounded keys and
        values, and that plain attention, without rounding, with the model's own.

        Raises UnsupportedError (SV33) when rounding of floats cannot explain it. Uses the first
        blocks of the pool, so it must run before any request.
        """
        generator = torch.Generator().manual_seed(0)
        length = min(_SELF_CHECK_TOKENS, self._max_check_tokens())
        ids = torch.randint(0, vocab_size, (length,), generator=generator).tolist()
        with unrounded_inputs(self.model):
            paged = self._paged_logits(ids)
            self._switch("eager")
            try:
                expected = self._one_pass(ids)
            finally:
                self._switch(attention.IMPLEMENTATION)
            if self.kept == KVFormat.of("auto", self.dtype):
                error = _distance(paged, expected)
            else:
                error = _distance(self._one_pass(ids, Probe()), expected)
                rounded = self._one_pass(ids, Probe(self.kept))
                error = max(error, _distance(paged, rounded))
        if not error <= _TOLERANCE.get(self.dtype, 0.15):
            raise UnsupportedError(
                f"{type(self.model).__name__} gives other logits with paged attention "
                f"(relative error {error:.2g})",
                code="SV33",
                why="some layer does not pass all of its attention through AttentionInterface.",
                fix="serve this model with transformers or vLLM.",
            )
        return error

    def _one_pass(self, ids: list[int], attend: attention.Attend | None = None) -> Tensor:
        """Logits of all positions; attention by the model, or by `attend`."""
        places = list(range(len(ids)))
        with contextlib.nullcontext() if attend is None else attention.active(attend):
            return self._forward(ids, places, places)

    @torch.inference_mode()
    def _paged_logits(self, ids: list[int]) -> Tensor:
        sequence = _probe_sequence(ids, self.block_size, prompt_logprobs=0)
        cuts = [0, len(ids) // 2, len(ids) - 1, len(ids)]
        parts = [
            self.run([Scheduled(sequence, start, stop - start)])[0]
            for start, stop in itertools.pairwise(cuts)
            if stop > start
        ]
        return torch.cat(parts)

    def _max_check_tokens(self) -> int:
        assert self.cache is not None
        return self.cache.num_slots

    def _batch(self, flat: list[Scheduled]) -> PagedBatch:
        """Decodes come first in `flat`."""
        assert self.cache is not None
        decodes = [item for item in flat if item.count == 1]
        decode_slots, pages = self._decode_rows(decodes)
        slots, chunks = [decode_slots], []
        row = len(decodes)
        for item in flat[len(decodes) :]:
            context = self._slots(item.sequence.block_table, item.stop)
            slots.append(context[item.start :])
            chunks.append(Chunk(row, item.count, context.to(self.device)))
            row += item.count
        place = self.device
        there = Pages(pages.tables.to(place), pages.lengths.to(place), pages.page)
        return PagedBatch(self.cache, torch.cat(slots).to(place), there, chunks)

    def _decode_rows(self, decodes: list[Scheduled]) -> tuple[Tensor, Pages]:
        """Where the new tokens go (int64 [D]) and their contexts, on the CPU."""
        pages = self._pages(decodes)
        last = pages.lengths.long() - 1
        blocks = pages.tables.gather(1, last[:, None] // self.block_size).flatten().long()
        return blocks * self.block_size + last % self.block_size, pages

    def _pages(self, decodes: list[Scheduled]) -> Pages:
        """Block tables of the decode tokens, padded with block 0, and their contexts' lengths."""
        lengths = torch.tensor([item.stop for item in decodes], dtype=torch.int32)
        width = -(-max((item.stop for item in decodes), default=0) // self.block_size)
        tables = [item.sequence.block_table[:width] for item in decodes]
        padded = [table + [0] * (width - len(table)) for table in tables]
        blocks = torch.tensor(padded, dtype=torch.int32).reshape(len(decodes), width)
        return Pages(blocks, lengths, self.block_size)

    def _slots(self, block_table: list[int], length: int) -> Tensor:
        blocks = torch.tensor(block_table[: -(-length // self.block_size)], dtype=torch.int64)
        offsets = torch.arange(self.block_size)
        return (blocks[:, None] * self.block_size + offsets).flatten()[:length]

    def _tensors(
        self, ids: list[int], positions: list[int], picked: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids [1, T], positions [1, T] and the rows whose logits are wanted."""
        rows = ([ids], [positions], picked)
        tokens, places, select = (torch.tensor(r, dtype=torch.int64) for r in rows)
        return tokens.to(self.device), places.to(self.device), select.to(self.device)

    @torch.inference_mode()
    def _forward(self, ids: list[int], positions: list[int], picked: list[int]) -> Tensor:
        tokens, places, select = self._tensors(ids, positions, picked)
        arguments = {"input_ids": tokens, "position_ids": places, "use_cache": False}
        if "logits_to_keep" in self._arguments:
            return self.model(**arguments, logits_to_keep=select).logits[0].float()  # type: ignore[no-any-return]
        return self.model(**arguments).logits[0, select].float()  # type: ignore[no-any-return]

    def _probe(self) -> Probe:
        probe = Probe()
        with attention.active(probe):
            self._forward([0, 0], [0, 1], [1])
        config = self.model.config.get_text_config()
        expected = int(getattr(config, "num_hidden_layers", 0))
        check_layer_types(config, probe)
        if not probe.shapes or len(probe.shapes) != expected:
            raise UnsupportedError(
                f"{type(self.model).__name__}: {len(probe.shapes)} of {expected} layers use "
                "attention that can be paged",
                code="SV33",
                why="linear attention, state space layers and hand-written attention cannot.",
                fix="serve this model with transformers or vLLM.",
            )
        return probe

    def _switch(self, implementation: str) -> None:
        self.model.set_attn_implementation(implementation)


def _probe_sequence(
    ids: list[int], block_size: int = 1, *, first: int = 0, prompt_logprobs: int | None = None
) -> Sequence:
    """A request of the runner's own, in blocks from `first` on."""
    params = SamplingParams(prompt_logprobs=prompt_logprobs)
    sequence = Sequence("runner", tuple(ids), params)
    sequence.block_table = list(range(first, first + -(-len(ids) // block_size)))
    return sequence


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-6))


def check_layer_types(config: Any, probe: Probe) -> None:
    """Refuse layers whose declared kind of attention is not the one they asked for."""
    for layer, kind in enumerate(getattr(config, "layer_types", None) or []):
        rule = probe.rules.get(layer)
        is_sliding = kind == "sliding_attention" and rule is not None and rule.window is not None
        if kind != "full_attention" and not is_sliding:
            raise UnsupportedError(
                f"layer {layer} is of type {printable(str(kind))}, which cannot be paged here",
                code="SV33",
                why="only full and sliding-window attention have keys and values per token.",
                fix="serve this model with transformers or vLLM.",
            )


def forward_arguments(model: Any) -> set[str]:
    """Names the model's forward takes; refuses models that cannot be told positions."""
    names = set(inspect.signature(model.forward).parameters)
    if not getattr(model, "_supports_attention_backend", False) or "position_ids" not in names:
        raise UnsupportedError(
            f"{type(model).__name__} does not use transformers' AttentionInterface",
            code="SV33",
            why="its attention is written out in the model and cannot be paged.",
            fix="serve this model with transformers or vLLM.",
        )
    return names
