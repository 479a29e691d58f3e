"""Measure candidates on the rows that calibrated nothing, and compare two of them row by row.

    d_r = KL_r(a) - KL_r(b)          t = mean(d) / (s_d / sqrt(R))

`a` is better than `b` if t lies below the 5 % quantile of Student's t with R - 1 degrees of freedom
(one-sided; rows are documents, so they are independent of each other, tokens are not).

Legend: R held-out rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from scipy.stats import t as student_t

from compressor.algorithms.divergence import kl_tokens
from compressor.data import TokenRows
from compressor.modeling.activations import ActivationStore
from compressor.modeling.state import ModelState
from compressor.modeling.walk import Walk
from compressor.stages.context import StageContext
from compressor.stages.statistics import calibration_rows

LEVEL = 0.05


@dataclass(frozen=True, slots=True)
class RowDivergence:
    """KL of each held-out row in nats a token [R], and tokens of each row [R]."""

    kl: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean over tokens."""
        return math.fsum(k * n for k, n in zip(self.kl, self.tokens, strict=True)) / sum(
            self.tokens
        )


class HeldOut:
    """The original's last activations on the held-out rows, kept to measure candidates against."""

    def __init__(self, context: StageContext) -> None:
        """Run the stage's input model over the held-out rows once."""
        assert context.tokens is not None, "a budget needs calibration rows"
        whole = Walk(context.state, context.tokens, context.walk_options())
        rows = slice(calibration_rows(whole).stop, whole.tokens.shape[0])
        rows = rows if rows.start < rows.stop else slice(0, rows.stop)  # a single row
        source = context.tokens
        self._context = context
        self._rows = _some_rows(source, rows)
        self._walk = Walk(context.state, self._rows, context.walk_options())
        self._final = _final(self._walk, "held-out")

    @property
    def num_rows(self) -> int:
        """R."""
        return self._rows.tokens.shape[0]

    @torch.no_grad()
    def measure(self, state: ModelState) -> RowDivergence:
        """KL(original || state), row by row."""
        walk = Walk(state, self._rows, self._context.walk_options())
        final = _final(walk, "candidate")
        mask = self._rows.mask
        kl: list[float] = []
        for rows in walk.batches():
            each = kl_tokens(self._walk.logits(self._final, rows), walk.logits(final, rows))
            each = each.double().cpu() * mask[rows]
            kl += (each.sum(1) / mask[rows].sum(1).clamp(min=1)).tolist()
        final.close()
        return RowDivergence(tuple(kl), tuple(mask.sum(1).tolist()))


def _some_rows(rows: TokenRows, chosen: slice) -> TokenRows:
    places = None if rows.positions is None else rows.positions[chosen]
    return replace(rows, tokens=rows.tokens[chosen], mask=rows.mask[chosen], positions=places)


def _final(walk: Walk, name: str) -> ActivationStore:
    stream = walk.open_stream(name)
    for position in range(walk.num_blocks):
        walk.advance(stream, walk.load(position), position)
    return stream


def is_better(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether the first candidate's KL [R] is lower than the second's by the paired test."""
    count = len(first)
    differences = torch.tensor(first, dtype=torch.float64) - torch.tensor(second).double()
    mean = float(differences.mean())
    if count < 2:
        return False  # one row proves nothing
    spread = float(differences.std()) / math.sqrt(count)
    if spread == 0.0:
        return mean < 0
    return mean / spread < float(student_t.ppf(LEVEL, count - 1))
