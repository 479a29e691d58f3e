"""A transformers model without weights, and what of it must be real to run one block at a time.

The skeleton is built on the meta device from `config.json`. Its decoder blocks (the longest
ModuleList) are replaced by stubs that either record what they are called with or hand back given
activations. Running the skeleton then does everything around the blocks - embedding, masks, rotary
tables, final norm, head - in transformers' own code, for every architecture.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from compressor.algorithms import products
from compressor.errors import UnsupportedError
from compressor.modeling.attention import use_ranges
from compressor.modeling.device import CPU
from compressor.modeling.experts import split_experts


class _Entered(Exception):
    """Raised by the last stub when only what comes before the blocks is wanted."""


class _Stub(nn.Module):
    """Stands where a decoder block stood; attributes are those of the block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_block", [block])
        self.kwargs: dict[str, Any] = {}
        self.seen: Tensor | None = None
        self.replacement: Tensor | None = None
        self.ends = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.seen, self.kwargs = hidden, {**_named(self, args), **kwargs}
        if self.ends:
            raise _Entered
        return hidden if self.replacement is None else self.replacement


def _named(stub: _Stub, args: tuple[Any, ...]) -> dict[str, Any]:
    names = list(inspect.signature(stub._block[0].forward).parameters)[1:]  # behind `hidden`
    return dict(zip(names, args, strict=False))


class _Head(nn.Linear):
    """The head; for large vocabularies it is a good part of all products."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return products.linear(input, self.weight, self.bias)


class Skeleton:
    """The model's structure: meta blocks, and an outer part that is filled and run."""

    def __init__(self, model: PreTrainedModel, blocks_name: str) -> None:
        self.model = model
        self.blocks_name = blocks_name
        self.device = CPU  # where the outer part is, and blocks are to be
        self.blocks: list[nn.Module] = list(model.get_submodule(blocks_name))
        self._stubs = nn.ModuleList(_Stub(block) for block in self.blocks)
        model.set_submodule(blocks_name, self._stubs)

    @property
    def num_blocks(self) -> int:
        """Decoder blocks."""
        return len(self.blocks)

    @property
    def model_type(self) -> str:
        """The architecture's name in transformers."""
        return str(self.model.config.model_type)

    def outer_names(self) -> list[str]:
        """Names of the tensors outside of the blocks; a tied head is not among them."""
        tied = tied_names(self.model)
        return [n for n in self.model.state_dict() if n not in tied]

    def fill_outer(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Give embedding, final norm and head their weights, cast to the compute dtype."""
        cast = {n: t.to(dtype) for n, t in tensors.items()}
        self.model.load_state_dict(cast, strict=False, assign=True)
        self.model.tie_weights()
        self.model.eval().to(self.device)

    def new_block(self, index: int) -> nn.Module:
        """A fresh meta copy of block `index`."""
        return copy.deepcopy(self.blocks[index]).eval()

    def enter(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        grad: bool = False,
        cache: Any = None,
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """Embed tokens [B, T]: the input of the first block, and each block's keyword arguments.

        Positions [B, T] that start again at 0 begin another document: tokens see only their own.
        Differentiable with respect to the embedding if `grad`. Final norm and head do not run.
        Tokens go on behind those that a cache of transformers' knows; the blocks will fill it.

        Raises:
            UnsupportedError: the blocks get no mask that could keep documents apart (CK26).
        """
        self._set_replacement(None)
        first_stub, last = self._first(), self._stubs[-1]
        first_stub.seen = None
        last.ends = True  # type: ignore[assignment]
        try:
            with torch.set_grad_enabled(grad):
                self._run(tokens, mask, positions, cache=cache)
        except _Entered:
            pass
        finally:
            last.ends = False  # type: ignore[assignment]
        first = first_stub.seen
        if first is None:
            raise UnsupportedError(f"{self.model_type}: its blocks are not called", code="CK26")
        kwargs = [dict(stub.kwargs) for stub in self._stubs]
        several = positions is not None and bool((positions[:, 1:] == 0).any())
        if several and any(k.get("attention_mask") is None for k in kwargs):
            raise UnsupportedError(
                f"{self.model_type}: documents in one row cannot be kept from seeing each other",
                code="CK26",
                fix="use packing: rows, or joined if they may",
            )
        return first, kwargs

    def leave(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Final norm and head: the last block's output [B, T, D] -> logits [B, T, V].

        Differentiable with respect to `hidden`.
        """
        self._set_replacement(hidden.to(self.device))
        logits: Tensor = self._run(tokens, None, None)
        self._set_replacement(None)
        return logits

    def _run(
        self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, *, cache: Any = None
    ) -> Tensor:
        more = {} if positions is None else {"position_ids": positions.to(self.device)}
        more |= {} if cache is None else {"past_key_values": cache}
        known, tokens = cache is not None, tokens.to(self.device)
        mask = None if mask is None else mask.to(self.device)
        out = self.model(input_ids=tokens, attention_mask=mask, use_cache=known, **more)
        return out.logits  # type: ignore[no-any-return]

    def _first(self) -> _Stub:
        return self._stubs[0]  # type: ignore[return-value]

    def _set_replacement(self, hidden: Tensor | None) -> None:
        for stub in self._stubs:
            stub.replacement = hidden  # type: ignore[assignment]


def tied_names(model: PreTrainedModel) -> set[str]:
    """State names that only repeat another tensor (a tied head)."""
    tied = getattr(model, "_tied_weights_keys", None)
    shared = model.config.get_text_config().tie_word_embeddings
    return set(tied) if tied and shared else set()


def parse_config(config: dict[str, Any]) -> Any:
    """transformers' configuration object for a `config.json` dict."""
    model_type = config.get("model_type", "")
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedError(f"unknown model_type {model_type!r}", code="CK26")
    plain = {k: v for k, v in config.items() if k not in ("quantization_config", "dtype")}
    return CONFIG_MAPPING[model_type].from_dict(plain)


def empty_model(config: dict[str, Any]) -> PreTrainedModel:
    """transformers' causal language model with every parameter on the meta device, fp32."""
    parsed = parse_config(config)
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(parsed, dtype=torch.float32)
    return model.eval()


def build_skeleton(config: dict[str, Any]) -> Skeleton:
    """The skeleton of a `config.json` dict; experts are split into single linears."""
    model = empty_model(config)
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    if not lists:
        raise UnsupportedError(f"{config['model_type']}: no list of decoder blocks", code="CK26")
    name = max(lists, key=lambda n: (len(lists[n]), -len(n)))
    split_experts(model)
    use_ranges(model)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head.__class__ = _Head
    return Skeleton(model, name)
