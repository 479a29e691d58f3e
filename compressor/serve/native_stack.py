"""Whole models of known architectures computed by the C kernels while the engine serves.

`NativeStack.of(model)` takes the weights out of transformers' modules and runs the blocks itself:
one call of C for all blocks where a step decodes one token a sequence, two calls and one attention
a block where it reads prompts. What it does not know it leaves to transformers (None). The engine's
self-check compares its logits with those of transformers' own code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from compressor.modeling.packed_linear import PackedLinear
from compressor.serve.attention import KVCache, PagedBatch, Rule
from compressor_kernels.cpu import MANY_ROWS
from compressor_kernels.native_block import NAMES, Block, Decoder, Norms

# Class of the model -> what the sliding window of its attention is.
_WINDOWS: dict[str, Callable[[Any], int | None]] = {
    "LlamaForCausalLM": lambda attention: None,
    "MistralForCausalLM": lambda attention: getattr(attention.config, "sliding_window", None),
    "Qwen2ForCausalLM": lambda attention: attention.sliding_window,
    "Qwen3ForCausalLM": lambda attention: attention.sliding_window,
}
_SILU = ("SiLU", "SiLUActivation")


@dataclass(frozen=True, slots=True)
class _Layer:
    """One block and how it attends."""

    block: Block
    index: int
    rule: Rule


@dataclass(slots=True)
class NativeStack:
    """The blocks of one model; everything around them is the model's own."""

    model: Any
    layers: list[_Layer]
    linear: PackedLinear  # one of them; all round their inputs or none does
    decoder: Decoder | None = None

    @classmethod
    def of(cls, model: Any) -> Self | None:
        """The stack of a float32 model on a CPU whose blocks are all packed for C, else None."""
        window = _WINDOWS.get(type(model).__name__)
        if window is None or model.dtype != torch.float32 or model.device.type != "cpu":
            return None
        packed = [_linears(block) for block in model.model.layers]
        if not packed or not all(packed) or len({m.rounds for ms in packed for m in ms}) != 1:
            return None
        layers = [
            _layer(block, linears, window)
            for block, linears in zip(model.model.layers, packed, strict=True)
        ]
        return cls(model, layers, packed[0][0])

    def open_pool(self, cache: KVCache) -> None:
        """Point the decoder at the pool's tensors, where they hold float32 numbers."""
        pools = [cache.pools[layer.index] for layer in self.layers]
        if any(pool.data.dtype != torch.float32 for pair in pools for pool in pair):
            return  # the blocks still run in C, attention between them
        self.decoder = Decoder(
            [layer.block for layer in self.layers],
            [(keys.data, values.data) for keys, values in pools],
            [(layer.rule.scale, layer.rule.window or 0) for layer in self.layers],
        )

    def takes(self, rows: int) -> bool:
        """Whether C is the faster way for so many tokens (MKL's exact products need many)."""
        return self.linear.rounds or rows < MANY_ROWS

    def __call__(self, ids: Tensor, positions: Tensor, picked: Tensor, batch: PagedBatch) -> Tensor:
        """Float32 logits [R, V] of the `picked` tokens; ids and positions are [1, T]."""
        inner = self.model.model
        hidden = inner.embed_tokens(ids)
        cosine, sine = (part[0].contiguous() for part in inner.rotary_emb(hidden, positions))
        x = hidden[0].contiguous()
        rounds = self.linear.rounds
        if not batch.chunks and self.decoder is not None:
            x = self.decoder(x, (cosine, sine), batch.contexts, rounds=rounds)
        else:
            for layer in self.layers:
                heads = layer.block.before(x, cosine, sine, rounds=rounds)
                q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in heads)
                attended = batch.attend(layer.index, q, k, v, layer.rule)
                flat = attended.reshape(len(x), -1).contiguous()
                x = layer.block.after(x, flat, rounds=rounds)
        logits: Tensor = self.model.lm_head(inner.norm(x[picked]))
        return logits


def _linears(block: Any) -> list[PackedLinear]:
    """The seven linears in the order of `NAMES`; none when C cannot compute the block."""
    modules = [getattr(block.self_attn, f"{name}_proj") for name in NAMES[:4]]
    modules += [getattr(block.mlp, f"{name}_proj", None) for name in NAMES[4:]]
    fits = all(isinstance(m, PackedLinear) and m.is_native for m in modules)
    return modules if fits and type(block.mlp.act_fn).__name__ in _SILU else []


def _layer(block: Any, linears: list[PackedLinear], window: Callable[[Any], int | None]) -> _Layer:
    attention = block.self_attn
    query, key = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    norms = Norms(
        _gain(block.input_layernorm),
        _gain(block.post_attention_layernorm),
        None if query is None else _gain(query),
        None if key is None else _gain(key),
        eps=block.input_layernorm.variance_epsilon,
    )
    residents = {name: m.resident for name, m in zip(NAMES, linears, strict=True)}
    native = Block(residents, norms, head_size=attention.head_dim)
    return _Layer(native, attention.layer_idx, Rule(attention.scaling, window(attention)))


def _gain(norm: Any) -> Tensor:
    gain: Tensor = norm.weight.detach().float().contiguous()
    return gain
