"""How far two models are apart, token by token.

    KL(p || q) = sum_v p_v (log p_v - log q_v)      in nats, p = original, q = compressed

Logits come in any floating dtype. Each chunk of rows is turned into fp32 log-probabilities (fp64
stays fp64), so only a few chunk-sized temporaries exist beside the logits.

# T tokens, V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22  # logits widened at once: 16 MB in fp32


def kl_tokens(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) of each token in nats: two [..., V] -> [...] in fp32 (fp64 for fp64 logits).

    Never negative: what rounding leaves below 0 (about -1e-7) is set to 0. NaN stays NaN.
    """
    vocabulary = p_logits.shape[-1]
    rows = max(1, CHUNK_ELEMENTS // vocabulary)
    pairs = zip(
        torch.split(p_logits.reshape(-1, vocabulary), rows),
        torch.split(q_logits.reshape(-1, vocabulary), rows),
        strict=True,
    )
    parts = [_kl(p, q) for p, q in pairs]
    return torch.cat(parts).reshape(p_logits.shape[:-1])


def top1_agreement(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Where both [..., V] prefer the same token: bool [...]; equal logits: the lower id."""
    return p_logits.argmax(dim=-1) == q_logits.argmax(dim=-1)


def _kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL of a chunk [T, V] -> [T]. In place: this reads and writes memory, and little else."""
    p, q = (_log_probabilities(logits) for logits in (p_logits, q_logits))
    # p = 0 contributes 0, also where log p is minus infinity
    difference = (p - q).masked_fill_(p == -torch.inf, 0.0)
    return difference.mul_(p.exp_()).sum(dim=-1).clamp(min=0)


def _log_probabilities(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
