"""A few numbers instead of a teacher's whole distribution, small enough to keep on disk.

    top_k    the K likeliest tokens, their log-probabilities, and that of all the others together:
             a distribution over K + 1 outcomes. Merging outcomes never raises a KL, so the loss is
             a lower bound of the full one, and equal to it where the student agrees on the rest.
    sampled  n tokens drawn from p with replacement, and the entropy H(p):
             loss = -(1/n) sum_i log q(token_i) - H(p), whose mean is KL(p || q) and whose mean
             gradient is that of KL(p || q) (random sampling KD, arXiv 2503.16870).

Top-k alone, renormalised, would teach a student to be too sure; the rest as one outcome does not.
On disk a token id takes 2 bytes (4 if V > 65536), a log-probability and an entropy fp16: rounding
p by less than 1e-4. For V <= 65536, top_k takes 4 K + 2 bytes a token and sampled 2 n + 2.

# V vocabulary, K kept tokens, n draws, [...] tokens
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.algorithms.distillation import Divergence, wide

SMALL_IDS = 1 << 16  # vocabularies up to here have ids of 2 bytes


@dataclass(frozen=True, slots=True)
class TopK:
    """ids int64 [..., K]; log_p fp32 [..., K + 1], the last one that of all other tokens."""

    ids: Tensor
    log_p: Tensor

    def __getitem__(self, rows: slice) -> TopK:
        return TopK(self.ids[rows], self.log_p[rows])


@dataclass(frozen=True, slots=True)
class Sampled:
    """ids int64 [..., n], drawn independently; entropy fp32 [...] in nats."""

    ids: Tensor
    entropy: Tensor

    def __getitem__(self, rows: slice) -> Sampled:
        return Sampled(self.ids[rows], self.entropy[rows])


Target = Tensor | TopK | Sampled


def top_k(logits: Tensor, count: int, divergence: Divergence) -> TopK:
    """The `count` likeliest tokens (fewer than V) of logits [..., V], and the rest as one."""
    if not 0 < count < logits.shape[-1]:
        raise ValueError(f"{count} of {logits.shape[-1]} tokens leave no rest")
    log_p = divergence.log_probabilities(logits)
    ids = log_p.topk(count, dim=-1).indices
    return TopK(ids, _merged(log_p, ids))


def sample(
    logits: Tensor, count: int, divergence: Divergence, generator: torch.Generator
) -> Sampled:
    """`count` draws for each row of logits [t, V], in ascending order, and the entropy."""
    log_p = divergence.log_probabilities(logits)
    p = log_p.exp()
    ids = torch.multinomial(p, count, replacement=True, generator=generator)
    terms = (p * log_p).masked_fill(p == 0, 0)
    return Sampled(ids.sort(dim=-1).values, -terms.sum(-1))


def token_losses(logits: Tensor, target: Target, divergence: Divergence) -> Tensor:
    """Distance of a student's logits [..., V] from what is known of the teacher: [...]."""
    if isinstance(target, Tensor):
        return divergence.of_logits(logits, target)
    log_q = divergence.log_probabilities(logits)
    if isinstance(target, TopK):
        return divergence.between(_merged(log_q, target.ids), target.log_p)
    loss = -log_q.gather(-1, target.ids).mean(-1) - target.entropy
    return loss * divergence.temperature**2


def _merged(log_p: Tensor, ids: Tensor) -> Tensor:
    """[..., V] -> [..., K + 1]: the log-probabilities of ids, and of all other tokens together."""
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, ids), rest], dim=-1)


def bytes_per_token(kind: str, count: int, vocabulary: int) -> int:
    """Exact bytes of one token's target on disk."""
    id_bytes = 2 if vocabulary <= SMALL_IDS else 4
    return count * id_bytes + (2 * (count + 1) if kind == "top_k" else 2)


def encode(target: TopK | Sampled, vocabulary: int) -> dict[str, Tensor]:
    """The tensors to be stored."""
    ids = target.ids.to(torch.int32)
    if vocabulary <= SMALL_IDS:  # int16 holds the bits of an unsigned number
        ids = torch.where(ids >= SMALL_IDS // 2, ids - SMALL_IDS, ids).to(torch.int16)
    if isinstance(target, TopK):
        return {"ids": ids, "log_p": target.log_p.half()}
    return {"ids": ids, "entropy": target.entropy.half()}


def decode(tensors: dict[str, Tensor]) -> TopK | Sampled:
    """What `encode` stored; log-probabilities add up to one again."""
    stored = tensors["ids"]
    ids = stored.long() & (SMALL_IDS - 1) if stored.dtype == torch.int16 else stored.long()
    if "log_p" in tensors:
        return TopK(ids, torch.log_softmax(wide(tensors["log_p"]), dim=-1))
    return Sampled(ids, wide(tensors["entropy"]))
