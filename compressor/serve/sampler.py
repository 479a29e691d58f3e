"""Choose the next token of each row: penalties, temperature, top-k, top-p, min-p, one draw.

    logits' = logits + bias - presence * [count > 0] - frequency * count
    p       = softmax(logits' / temperature)
    keep      the top_k largest, then the smallest set of mass >= top_p, then p >= min_p * max p
    token   = first index whose cumulative p exceeds u * total

`u` is a function of (seed, position) alone, so a seeded request gives the same text in any batch,
after preemption too. Log-probabilities are those of the raw logits, as OpenAI and vLLM report them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compressor.serve.sequence import SamplingParams, Sequence, TokenLogprob

_MASK = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from a seed and a position (SplitMix64, Steele et al. 2014)."""
    state = _mix((seed & _MASK) + 0x9E3779B97F4A7C15)
    return (_mix(state + (position + 1) * 0x9E3779B97F4A7C15) >> 11) / 2**53


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def sample(logits: Tensor, sequences: list[Sequence], eos_ids: frozenset[int]) -> list[int]:
    """One token per row of logits [R, V]."""
    if any(s.params.changes_logits or s.num_output < s.params.min_tokens for s in sequences):
        logits = logits.clone()
        for row, sequence in zip(logits, sequences, strict=True):
            edit_logits(row, sequence, eos_ids)
    chosen: list[int] = logits.argmax(dim=-1).tolist()
    for index, sequence in enumerate(sequences):
        if sequence.params.temperature > 0:
            draw = uniform(sequence.seed, len(sequence.tokens))
            chosen[index] = draw_token(logits[index], sequence.params, draw)
    return chosen


def edit_logits(row: Tensor, sequence: Sequence, eos_ids: frozenset[int]) -> None:
    """Apply bias, penalties and the minimum length to one row [V], in place."""
    params = sequence.params
    for token, value in params.logit_bias:
        row[token] += value
    if params.presence_penalty or params.frequency_penalty:
        produced = torch.tensor(sequence.tokens[len(sequence.prompt) :], dtype=torch.int64)
        counts = torch.bincount(produced, minlength=row.shape[0]).to(row)
        row -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    if sequence.num_output < params.min_tokens:
        for token in eos_ids | set(params.stop_token_ids):
            row[token] = -math.inf


def draw_token(row: Tensor, params: SamplingParams, u: float) -> int:
    """The token at quantile `u` of the filtered distribution of one row [V]."""
    probabilities = torch.softmax((row - row.max()).double() / params.temperature, dim=-1)
    index: Tensor | None = None
    if 0 < params.top_k < row.shape[0]:
        probabilities, index = probabilities.topk(params.top_k)
    elif params.top_p < 1:
        probabilities, index = probabilities.sort(descending=True)
    if params.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.where(before < params.top_p * probabilities.sum(), 0)
    if params.min_p > 0:
        probabilities = probabilities.where(probabilities >= params.min_p * probabilities.max(), 0)
    cumulative = probabilities.cumsum(-1)
    target = cumulative[-1:] * u
    place = min(int(torch.searchsorted(cumulative, target, right=True)), row.shape[0] - 1)
    place = min(place, cumulative.shape[0] - 1)
    return int(place if index is None else index[place])


def token_logprobs(logits: Tensor, tokens: list[int], num_top: int) -> list[TokenLogprob]:
    """Log-probability of `tokens` under logits [R, V], with the `num_top` most likely ones."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    picked = torch.tensor(tokens, dtype=torch.int64, device=logits.device)[:, None]
    own = logprobs.gather(1, picked)[:, 0].tolist()
    top = logprobs.topk(min(num_top, logprobs.shape[1]), dim=-1)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        TokenLogprob(token, value, tuple(zip(ids, values, strict=True)))
        for token, value, (ids, values) in zip(tokens, own, pairs, strict=True)
    ]
