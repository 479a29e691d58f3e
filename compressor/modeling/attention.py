"""Attention of calibration passes on a CPU: by C where queries see ranges of keys, else by torch.

Registered with transformers under a name of its own, with the masks of its `sdpa`; a skeleton takes
it where transformers would have taken `sdpa`. What this module cannot do, `sdpa` does: gradients,
other devices and dtypes, masks with holes, head sizes that fill no vectors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from compressor_kernels.native_attention import attend_rows, causal_ranges, key_ranges, takes

NAME, REPLACED = "compressor_ranges", "sdpa"
Ranges = tuple[Tensor, Tensor]
# A micro-batch's mask goes through every block; None: it is no mask of ranges.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, H, M, E], key and value [B, G, L, E], mask [B or 1, 1, M, L] -> [B, M, H, E].

    A function for transformers' `AttentionInterface`; arguments as those of its `sdpa`.
    """
    differs = dropout or any(kwargs.get(n) is not None for n in ("position_bias", "softcap"))
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if not differs and not learns and takes(query, key, value):
        is_causal = kwargs.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        ranges = _ranges(attention_mask, query, key, is_causal)
        if ranges is not None:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return attend_rows(query, key, value, ranges, scale), None
    found: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return found


def _ranges(mask: Tensor | None, query: Tensor, key: Tensor, is_causal: bool) -> Ranges | None:
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    if mask is None:
        return causal_ranges(batch, keys) if is_causal and queries == keys else None
    shapes = {(count, 1, queries, keys) for count in (1, batch)}
    if mask.dtype != torch.bool or tuple(mask.shape) not in shapes:
        return None
    if mask not in _known:
        _known[mask] = key_ranges(mask)
    found: Ranges | None = _known[mask]
    if found is None or len(found[0]) == batch:
        return found
    return found[0].expand(batch, -1).contiguous(), found[1].expand(batch, -1).contiguous()


def use_ranges(model: PreTrainedModel) -> None:
    """Let a model of transformers attend by this module, if it would use `sdpa`."""
    switches = getattr(type(model), "_supports_attention_backend", False)
    if switches and model.config._attn_implementation == REPLACED:
        model.set_attn_implementation(NAME)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
