"""What an allocation may cost: the limits of a budget, as numbers for the targeted linears alone.

    bytes   the smallest of what average_bits, size and fits leave, minus what is not targeted
    ms      what decode_ms leaves after head and norms (see latency.py)

`average_bits` counts codes, scales and zero points of the targeted linears. `size` counts all
weight files. `fits` counts all weight files and the KV cache at the given context (K and V of every
layer, sliding windows no longer than their window, 2 bytes a number, 1 with an fp8 cache);
activations and the runtime need room besides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from compressor.errors import RecipeError
from compressor.modeling.families import disk_name
from compressor.modeling.skeleton import parse_config
from compressor.modeling.state import ModelState
from compressor.recipe import Budget, QuantizeConfig, parse_size
from compressor.recipe.budget import parse_footprint
from compressor.stages.context import StageContext
from compressor.stages.latency import Device, find_device
from compressor.stages.selection import Selection, dense_bytes

ENDLESS = 1 << 62


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes that the targeted linears may take, and milliseconds (None = no such limit)."""

    num_bytes: int
    milliseconds: float | None = None
    device: Device | None = None
    active: float = 1.0

    @property
    def others(self) -> list[float]:
        """The limits besides the bytes, as the knapsack wants them."""
        return [] if self.milliseconds is None else [self.milliseconds]

    def times(self, unit: str, label: str, num_bytes: list[int]) -> tuple[float, ...]:
        """The other costs of a unit's linears in a format: their decoding time, if it counts."""
        if self.device is None:
            return ()
        share = self.active if unit.endswith(".experts") else 1.0
        return (sum(self.device.milliseconds(label, share * n) for n in num_bytes),)


def limits_of(config: QuantizeConfig, context: StageContext, selection: Selection) -> Limits:
    """The limits of a budget.

    Raises:
        RecipeError: what is not targeted alone is more than a limit (NU12), or no such device.
    """
    budget = config.budget
    assert budget is not None, "called only with a budget"
    num_bytes = min(_byte_limits(config, budget, context, selection))
    if budget.decode_ms is None:
        return Limits(num_bytes)
    device = find_device(budget.device or "", config.where("budget.device"))
    fixed = _fixed_milliseconds(context, selection, device)
    left = budget.decode_ms - fixed
    if left <= 0:
        raise _too_small(
            config, "decode_ms", f"{budget.decode_ms:g} ms", f"head and norms take {fixed:.3g} ms"
        )
    return Limits(num_bytes, left, device, _active_experts(context.state))


def _byte_limits(
    config: QuantizeConfig, budget: Budget, context: StageContext, selection: Selection
) -> list[int]:
    fixed = kept_bytes(context, selection)
    limits = [ENDLESS]
    if budget.average_bits is not None:
        weights = sum(t.shape[0] * t.shape[1] for t in selection.targets)
        limits.append(int(weights * budget.average_bits / 8))
    if budget.size is not None:
        limits.append(parse_size(budget.size) - fixed)
        if limits[-1] <= 0:
            raise _too_small(config, "size", budget.size, f"what stays dense takes {fixed} bytes")
    if budget.fits is not None:
        footprint = parse_footprint(budget.fits)
        cache = kv_bytes(context.state, footprint.context, fp8=_fp8_cache(config))
        limits.append(footprint.num_bytes - fixed - cache)
        if limits[-1] <= 0:
            text = f"what stays dense takes {fixed} bytes, the KV cache {cache}"
            raise _too_small(config, "fits", budget.fits, text)
    return limits


def _too_small(config: QuantizeConfig, key: str, value: str, why: str) -> RecipeError:
    return RecipeError(
        f"the budget {value} is too small: {why} (this stays dense, whatever is chosen)",
        code="NU12",
        where=config.where(f"budget.{key}"),
        fix=f"allow a larger {key}",
    )


def _fp8_cache(config: QuantizeConfig) -> bool:
    return getattr(config, "kv_cache", "none") == "fp8"


def kv_bytes(state: ModelState, context: int, *, fp8: bool = False) -> int:
    """Bytes of K and V of one sequence of `context` tokens."""
    text = parse_config(state.config).get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * len(state.blocks)
    window = getattr(text, "sliding_window", None) or context
    reach = {"full_attention": context, "sliding_attention": min(window, context)}
    tokens = sum(reach.get(kind, 0) for kind in kinds)
    return int(2 * tokens * heads * width * (1 if fp8 else 2))


def _active_experts(state: ModelState) -> float:
    """The fraction of experts that a token goes through."""
    text: Any = parse_config(state.config).get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    total = next((n for n in (getattr(text, name, None) for name in names) if n), None)
    chosen = getattr(text, "num_experts_per_tok", None)
    return chosen / total if total and chosen else 1.0


def _fixed_milliseconds(context: StageContext, selection: Selection, device: Device) -> float:
    """Head, norms and dense linears; of an input embedding of its own only one row is read."""
    tensors = context.state.checkpoint.tensors
    embedding = 0
    if any(name.startswith(("lm_head", "embed_out")) for name in tensors):
        names = [n for n in tensors if n.endswith(("embed_tokens.weight", "embed_in.weight"))]
        embedding = sum(tensors[n].nbytes for n in names)
    return device.milliseconds("BF16", kept_bytes(context, selection) - embedding)


def kept_bytes(context: StageContext, selection: Selection) -> int:
    """Bytes of everything that is not targeted: embeddings, norms, head, protected linears."""
    total = sum(count * width for count, width in stored_tensors(context.state))
    targeted = sum(t.shape[0] * t.shape[1] for t in selection.targets)
    return int(total - targeted * dense_bytes(context.state))


def stored_tensors(state: ModelState) -> Iterator[tuple[int, float]]:
    """(numbers, bytes of each) of every tensor the state has, dense, blocks that are left only."""
    skeleton = state.skeleton()
    for ref, block in zip(state.blocks, skeleton.blocks, strict=True):
        prefix = f"{skeleton.blocks_name}.{ref.index}."
        for name, tensor in block.state_dict().items():
            on_disk = prefix + disk_name(skeleton.model_type, name)
            yield tensor.numel(), _bytes_of_each(state, on_disk)
    for name in skeleton.outer_names():
        yield skeleton.model.state_dict()[name].numel(), _bytes_of_each(state, name)


def _bytes_of_each(state: ModelState, name: str) -> float:
    info = state.checkpoint.tensors[state.disk_tensor_name(name)]
    return info.nbytes / math.prod(info.shape)
