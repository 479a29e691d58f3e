"""Measure a compressed stream against its reference at the logits of the whole model."""

from __future__ import annotations

import torch

from compressor.algorithms.divergence import kl_tokens
from compressor.modeling.activations import ActivationStore
from compressor.modeling.walk import Walk
from compressor.stages.statistics import Streams


@torch.no_grad()
def hidden_divergence(walk: Walk, streams: Streams, rows: slice) -> float | None:
    """Mean KL(reference || compressed) in nats a token over some rows; None without rows."""
    return stream_divergence(walk, streams.reference, streams.compressed, rows)


@torch.no_grad()
def stream_divergence(
    walk: Walk, reference: ActivationStore, compressed: ActivationStore, rows: slice
) -> float | None:
    """As `hidden_divergence`, for any two streams of the same walk after the last block."""
    total, count = 0.0, 0
    for part in walk.batches(rows):
        kl = kl_tokens(walk.logits(reference, part), walk.logits(compressed, part))
        if walk.mask is not None:
            kl = kl[walk.mask[part]]
        total += float(kl.double().sum())
        count += kl.numel()
    return total / count if count else None
