"""Decoder blocks of known architectures computed by the C kernels while the engine serves.

`fuse` gives the blocks of a model a forward of their own; it does the same as transformers' as long
as a paged batch is active, in two calls of C and one of attention. Anything it does not know stays
as it is. The engine's self-check compares the result with transformers' own code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.modeling.packed_linear import PackedLinear
from compressor.serve.attention import Rule, active_attention
from compressor_kernels.cpu import MANY_ROWS
from compressor_kernels.native_block import NAMES, Block, Norms

# Class of the block -> what its sliding window is.
_WINDOWS: dict[str, Callable[[Any], int | None]] = {
    "LlamaDecoderLayer": lambda attention: None,
    "MistralDecoderLayer": lambda attention: getattr(attention.config, "sliding_window", None),
    "Qwen2DecoderLayer": lambda attention: attention.sliding_window,
    "Qwen3DecoderLayer": lambda attention: attention.sliding_window,
}
_SILU = ("SiLU", "SiLUActivation")


@dataclass(frozen=True, slots=True)
class _Fused:
    """A block's forward: C around the attention."""

    plain: Callable[..., Any]
    native: Block
    packed: PackedLinear  # one of the linears; all have the same plan
    layer: int
    rule: Rule

    def __call__(
        self,
        hidden_states: Tensor,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor],
        **kwargs: Any,
    ) -> Any:
        attention = active_attention()
        rounds = self.packed.rounds
        count = hidden_states.shape[1]
        if attention is None or len(hidden_states) != 1 or not (rounds or count < MANY_ROWS):
            return self.plain(
                hidden_states, *args, position_embeddings=position_embeddings, **kwargs
            )
        x = hidden_states[0].contiguous()
        cosine, sine = (part[0].contiguous() for part in position_embeddings)
        heads = self.native.before(x, cosine, sine, rounds=rounds)
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in heads)
        attended = attention.attend(self.layer, q, k, v, self.rule)
        flat = attended.reshape(count, -1).contiguous()
        return self.native.after(x, flat, rounds=rounds).unsqueeze(0)


def fuse(model: nn.Module) -> list[nn.Module]:
    """Give every block that fits a fused forward; returns those blocks."""
    if getattr(model, "dtype", None) != torch.float32:
        return []
    changed = []
    for block in model.modules():
        fused = _fused(block) if type(block).__name__ in _WINDOWS else None
        if fused is not None:
            block.forward = fused
            changed.append(block)
    return changed


def unfuse(blocks: list[nn.Module]) -> None:
    """Give the blocks their own forward back."""
    for block in blocks:
        del block.forward


def _fused(block: Any) -> _Fused | None:
    attention, mlp = block.self_attn, block.mlp
    modules = [getattr(attention, f"{n}_proj") for n in NAMES[:4]]
    modules += [getattr(mlp, f"{n}_proj", None) for n in NAMES[4:]]
    if not all(isinstance(m, PackedLinear) and m.is_native for m in modules):
        return None
    if len({m.rounds for m in modules}) != 1 or type(mlp.act_fn).__name__ not in _SILU:
        return None
    linears = {n: m.resident for n, m in zip(NAMES, modules, strict=True)}
    window = _WINDOWS[type(block).__name__](attention)
    native = Block(linears, _norms(block), head_size=attention.head_dim)
    rule = Rule(scale=attention.scaling, window=window)
    return _Fused(block.forward, native, modules[0], attention.layer_idx, rule)


def _norms(block: Any) -> Norms:
    attention = block.self_attn
    query, key = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return Norms(
        _gain(block.input_layernorm),
        _gain(block.post_attention_layernorm),
        None if query is None else _gain(query),
        None if key is None else _gain(key),
        eps=block.input_layernorm.variance_epsilon,
    )


def _gain(norm: Any) -> Tensor:
    gain: Tensor = norm.weight.detach().float().contiguous()
    return gain
