"""Does a document start the way the model was trained to see it? A probe on the original model.

A missing BOS token (or a doubled one) shifts every quality figure, and not equally for both
models; harnesses and tokenizers disagree about who adds it. The probe scores the same tokens of
the same rows twice, with BOS in front and without:

    row with BOS     b x_1 x_2 ... x_n      scored: x_2 ... x_n
    row without        x_1 x_2 ... x_n      scored: x_2 ... x_n
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor_eval.divergence import perplexity

_ROWS, _TOKENS = 16, 128  # a probe, not an evaluation
_WORSE = 1.02  # BOS may not cost more than this factor in perplexity


@dataclass(frozen=True, slots=True)
class BosProbe:
    """Perplexities with and without BOS (nan where there is nothing to compare), and warnings."""

    with_bos: float
    without_bos: float
    rows_with_bos: float  # fraction of the evaluated rows
    warnings: list[str]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        plain = asdict(self)
        return {k: None if v != v else v for k, v in plain.items()}


def probe_bos(
    model: nn.Module,
    tokens: Tensor,
    bos_token_id: int | None,
    *,
    mask: Tensor | None = None,
    tokenizer: Any = None,
) -> BosProbe:
    """Score up to 16 rows of tokens [N, T] with and without BOS.

    Args:
        bos_token_id: the tokenizer's; None = the tokenizer has none, and there is no comparison.
        tokenizer: if given, it is asked whether it adds BOS by itself.
    """
    if bos_token_id is None:
        note = "the tokenizer has no BOS token: rows start with their first word"
        return BosProbe(math.nan, math.nan, 0.0, [note])
    starts = tokens[:, 0] == bos_token_id
    rows, real = tokens[:_ROWS, :_TOKENS], _real(tokens, mask)[:_ROWS, :_TOKENS]
    begin = starts[:_ROWS].all()
    if not begin:
        column = torch.full_like(rows[:, :1], bos_token_id)
        rows = torch.cat([column, rows], dim=1)
        real = torch.cat([torch.ones_like(real[:, :1]), real], dim=1)
    scored = real.clone()
    scored[:, 0] = False  # so that both runs score the same tokens
    if not (scored[:, 2:] & scored[:, 1:-1]).any():
        return BosProbe(math.nan, math.nan, float(starts.float().mean()), ["rows too short"])
    with_bos = perplexity(model, rows, mask=scored)
    without = perplexity(model, rows[:, 1:].contiguous(), mask=real[:, 1:])
    fraction = float(starts.float().mean())
    return BosProbe(with_bos, without, fraction, _warnings(fraction, with_bos / without, tokenizer))


def _real(tokens: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool().cpu()


def _warnings(fraction: float, ratio: float, tokenizer: Any) -> list[str]:
    notes = []
    if tokenizer is not None and tokenizer("a").input_ids[:1] != [tokenizer.bos_token_id]:
        notes.append("the tokenizer does not add BOS by itself: other tools may score without it")
    if fraction < 1:
        notes.append(f"{1 - fraction:.0%} of the evaluated rows do not start with BOS")
    if ratio > _WORSE:
        notes.append(f"BOS makes the original worse (perplexity x {ratio:.3f}); wrong id?")
    return notes
