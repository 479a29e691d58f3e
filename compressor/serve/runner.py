"""The model on one step's tokens: a flat row in, logits of the needed positions out.

`ModelRunner` learns the shape of the key-value pool by running the model once (no table of
architectures), and refuses a model whose paged logits differ from its own attention's: linear
attention, position biases, caches shared between layers and whatever else does not pass through
`AttentionInterface` is found by that comparison and named, never served wrong.
"""

from __future__ import annotations

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
from compressor.serve.native_stack import NativeStack
from compressor.serve.scheduler import Scheduled

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
    """A transformers causal language model over a paged pool (built by `open_pool`)."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.original = model.config._attn_implementation
        self.cache: KVCache | None = None
        self.block_size = 0
        self._arguments = forward_arguments(model)
        attention.register()
        self._switch(attention.IMPLEMENTATION)
        self.stack = NativeStack.of(model)
        try:
            self.shapes = self._probe()
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """Give the model its own attention back."""
        self._switch(self.original)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in all layers."""
        return sum(s.elements for s in self.shapes.values()) * self.dtype.itemsize

    def open_pool(self, num_blocks: int, block_size: int) -> None:
        """Allocate the pool."""
        self.block_size = block_size
        slots = num_blocks * block_size
        self.cache = KVCache(self.shapes, slots, dtype=self.dtype, device=self.device)
        if self.stack is not None:
            self.stack.open_pool(self.cache)

    @torch.inference_mode()
    def run(self, items: list[Scheduled]) -> tuple[Tensor, list[Rows]]:
        """Logits [rows, V] (float32) and, for each item in order, where its rows are."""
        order = sorted(range(len(items)), key=lambda i: items[i].count > 1)  # decodes first
        flat = [items[i] for i in order]
        batch, starts = self._batch(flat)
        picked: list[int] = []
        rows: dict[int, Rows] = {}
        for index, item, start in zip(order, flat, starts, strict=True):
            prompt = item.sequence.prompt_rows(item.start, item.stop)
            first = len(picked)
            picked += [start + p - item.start for p in prompt]
            if item.samples:
                picked.append(start + item.count - 1)
            rows[index] = Rows(first, len(prompt), len(picked) - 1 if item.samples else None)
        ids = [t for item in flat for t in item.sequence.tokens[item.start : item.stop]]
        positions = [p for item in flat for p in range(item.start, item.stop)]
        if self.stack is not None and self.stack.takes(len(ids)):
            logits = self.stack(*self._tensors(ids, positions, picked), batch)
        else:
            with attention.active(batch):
                logits = self._forward(ids, positions, picked)
        return logits, [rows[i] for i in range(len(items))]

    def self_check(self, vocab_size: int) -> float:
        """Relative error of chunked, paged logits against the model's eager attention.

        Raises UnsupportedError (SV33) when rounding cannot explain it. Uses the first blocks of
        the pool, so it must run before any request.
        """
        generator = torch.Generator().manual_seed(0)
        length = min(_SELF_CHECK_TOKENS, self._max_check_tokens())
        ids = torch.randint(0, vocab_size, (length,), generator=generator).tolist()
        with unrounded_inputs(self.model):
            paged = self._paged_logits(ids)
            self._switch("eager")
            try:
                expected = self._forward(ids, list(range(length)), list(range(length)))
            finally:
                self._switch(attention.IMPLEMENTATION)
        error = float((paged - expected).norm() / expected.norm().clamp_min(1e-6))
        if not error <= _TOLERANCE.get(self.dtype, 0.15):
            raise UnsupportedError(
                f"{type(self.model).__name__} gives other logits with paged attention "
                f"(relative error {error:.2g})",
                code="SV33",
                why="some layer does not pass all of its attention through AttentionInterface.",
                fix="serve this model with transformers or vLLM.",
            )
        return error

    @torch.inference_mode()
    def _paged_logits(self, ids: list[int]) -> Tensor:
        from compressor.serve.sequence import SamplingParams, Sequence

        sequence = Sequence("self-check", tuple(ids), SamplingParams(prompt_logprobs=0))
        sequence.block_table = list(range(-(-len(ids) // self.block_size)))
        cuts = [0, len(ids) // 2, len(ids) - 1, len(ids)]
        parts = [
            self.run([Scheduled(sequence, start, stop - start)])[0]
            for start, stop in itertools.pairwise(cuts)
            if stop > start
        ]
        return torch.cat(parts)

    def _max_check_tokens(self) -> int:
        assert self.cache is not None
        return self.cache.null_slot

    def _batch(self, flat: list[Scheduled]) -> tuple[PagedBatch, list[int]]:
        """Decodes come first in `flat`; also the row at which each item starts."""
        assert self.cache is not None
        decodes = [item for item in flat if item.count == 1]
        contexts, lengths = self._decode_slots(decodes)
        slots = [contexts.gather(1, lengths[:, None] - 1).flatten()]
        starts, chunks = list(range(len(decodes))), []
        row = len(decodes)
        for item in flat[len(decodes) :]:
            context = self._slots(item.sequence.block_table, item.stop)
            slots.append(context[item.start :])
            starts.append(row)
            chunks.append(Chunk(row, item.count, context.to(self.device)))
            row += item.count
        place = self.device
        flat_slots = torch.cat(slots).to(place)
        batch = PagedBatch(self.cache, flat_slots, contexts.to(place), lengths.to(place), chunks)
        return batch, starts

    def _decode_slots(self, decodes: list[Scheduled]) -> tuple[Tensor, Tensor]:
        """Slots of each decode token's context, padded with the null slot, and the lengths."""
        assert self.cache is not None
        lengths = torch.tensor([item.stop for item in decodes], dtype=torch.int64)
        longest = max((item.stop for item in decodes), default=0)
        width = -(-longest // self.block_size)
        tables = [item.sequence.block_table[:width] for item in decodes]
        padded = [table + [0] * (width - len(table)) for table in tables]
        blocks = torch.tensor(padded, dtype=torch.int64).reshape(len(decodes), width, 1)
        slots = (blocks * self.block_size + torch.arange(self.block_size)).flatten(1)[:, :longest]
        known = torch.arange(longest) < lengths[:, None]
        return slots.where(known, self.cache.null_slot), lengths

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

    def _probe(self) -> dict[int, attention.LayerShape]:
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
        return probe.shapes

    def _switch(self, implementation: str) -> None:
        self.model.set_attn_implementation(implementation)


def check_layer_types(config: Any, probe: Probe) -> None:
    """Refuse layers whose declared kind of attention is not the one they asked for."""
    for layer, kind in enumerate(getattr(config, "layer_types", None) or []):
        is_sliding = kind == "sliding_attention" and probe.windows.get(layer) is not None
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
