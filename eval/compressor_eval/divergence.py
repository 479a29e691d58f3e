"""How far a model's next-token distributions are from the original's, on the same tokens.

For every predicted token t with context x_<t, original p and compressed q (natural logarithms):

    loss             -ln p(x_t), -ln q(x_t)           perplexity = exp(mean loss)
    KL divergence    sum_v p(v) (ln p(v) - ln q(v))    0 = same distribution, unit nat
    top-1 agreement  argmax p = argmax q
    delta p          q(x_t) - p(x_t)                   reported as root mean square

N rows, T tokens a row, V vocabulary. The two models' logits of one micro-batch, [batch, T, V],
exist together once; of them only a few numbers per token are kept. Sums run in float64: a KL of
1e-6 is the difference of logarithms near 10, which float32 cannot hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.errors import DataError, NumericError, UnsupportedError
from compressor_eval import statistics
from compressor_eval.statistics import Floats, Interval, Ints

_CHUNK_ELEMENTS = 1 << 22  # float64 numbers of one [tokens, V] chunk: 32 MiB a tensor
_NUM_WORST = 10
_CONTEXT_TOKENS = 48
# KL bins: four a decade between 1e-8 and 100 nats; what is smaller lands in the first bin.
_EDGES = [0.0, *(10.0 ** (i / 4) for i in range(-32, 9))]


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Numbers of every predicted token, all of shape [tokens]."""

    row: Ints
    position: Ints  # of the predicted token in its row
    base_loss: Floats  # nats
    loss: Floats
    kl: Floats
    delta_p: Floats
    base_top: Ints  # token ids
    top: Ints
    target: Ints


@dataclass(frozen=True, slots=True)
class WorstContext:
    """One of the predictions that moved most."""

    kl: float
    row: int
    position: int
    context_ids: list[int]  # the tokens before, the last one nearest
    target_id: int
    base_top_id: int
    top_id: int


@dataclass(frozen=True, slots=True)
class Histogram:
    """counts[i] values lie in [edges[i], edges[i + 1]); the last bin is open above."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of `compare`; `*_ci` are 95 % intervals, (nan, nan) for a single row."""

    num_tokens: int
    num_rows: int
    base_perplexity: float
    perplexity: float
    perplexity_ratio: float
    perplexity_ratio_ci: Interval
    kl_mean: float
    kl_mean_ci: Interval
    kl_median: float
    kl_median_ci: Interval
    kl_p90: float
    kl_p90_ci: Interval
    kl_p99: float
    kl_p99_ci: Interval
    kl_p999: float
    kl_p999_ci: Interval
    kl_max: float
    top1_agreement: float
    top1_agreement_ci: Interval
    top1_lost: int  # the original's first choice was the true token, the compressed model's is not
    top1_won: int  # the reverse
    delta_p_rms: float
    delta_p_rms_ci: Interval
    kl_histogram: Histogram
    worst: list[WorstContext]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data: numbers that are not finite become null."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return asdict(value) if isinstance(value, (Histogram, WorstContext)) else value


def compare(
    base: nn.Module,
    model: nn.Module,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    batch_size: int = 8,
) -> Comparison:
    """Compare a model with its original on the same rows of tokens.

    Args:
        base, model: causal models called as model(input_ids=...).logits, [N, T, V] each.
        tokens: int64 [N, T]. Padding must be at the end of a row (attention is causal).
        mask: bool [N, T], False = padding; a token is scored if it and the one before are real.
        batch_size: rows a micro-batch; it bounds the memory for logits.

    Raises:
        DataError: fewer than one scored token. UnsupportedError: vocabularies differ.
        NumericError: a model gave a logit that is not a number.
    """
    return summarize(score_tokens(base, model, tokens, mask=mask, batch_size=batch_size), tokens)


def score_tokens(
    base: nn.Module,
    model: nn.Module,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    batch_size: int = 8,
) -> TokenScores:
    """The per-token numbers behind `compare`, in row order."""
    scored = _scored_positions(tokens, mask)
    parts = []
    with _evaluating(base), _evaluating(model):
        for rows, keep in zip(
            torch.split(tokens, batch_size), torch.split(scored, batch_size), strict=True
        ):
            base_logits, logits = _logits(base, rows, keep), _logits(model, rows, keep)
            if base_logits.shape != logits.shape:
                raise _vocabulary_error(base_logits.shape[-1], logits.shape[-1])
            parts.append(_score_batch(base_logits, logits, rows[:, 1:][keep]))
    columns = [torch.cat(column).numpy() for column in zip(*parts, strict=True)]
    row, position = scored.nonzero().numpy().T
    return TokenScores(row, position + 1, *columns)


def perplexity(
    model: nn.Module, tokens: Tensor, *, mask: Tensor | None = None, batch_size: int = 8
) -> float:
    """exp(mean loss) of one model over the tokens [N, T]; arguments as in `compare`."""
    scored = _scored_positions(tokens, mask)
    total = 0.0
    with _evaluating(model):
        for rows, keep in zip(
            torch.split(tokens, batch_size), torch.split(scored, batch_size), strict=True
        ):
            logits, targets = _logits(model, rows, keep), rows[:, 1:][keep]
            for chunk, target in _pieces(_chunk_size(logits), logits, targets):
                chosen = _log_softmax(chunk).gather(1, target[:, None].to(chunk.device))
                total -= float(chosen.sum())
    return math.exp(total / int(scored.sum()))


def summarize(scores: TokenScores, tokens: Tensor) -> Comparison:
    """Aggregate per-token numbers; rows are the blocks of every interval."""
    kl, rows = scores.kl, scores.row
    differences, counts = statistics.block_sums(scores.loss - scores.base_loss, rows)
    same = (scores.base_top == scores.top).astype(np.float64)
    was_right, is_right = scores.base_top == scores.target, scores.top == scores.target
    square_ci = statistics.bootstrap_mean(scores.delta_p**2, rows)
    return Comparison(
        num_tokens=len(kl),
        num_rows=len(counts),
        base_perplexity=float(np.exp(scores.base_loss.mean())),
        perplexity=float(np.exp(scores.loss.mean())),
        perplexity_ratio=float(np.exp((scores.loss - scores.base_loss).mean())),
        perplexity_ratio_ci=statistics.ratio_interval(differences, counts),
        kl_mean=float(kl.mean()),
        kl_mean_ci=statistics.bootstrap_mean(kl, rows),
        kl_max=float(kl.max()),
        top1_agreement=float(same.mean()),
        top1_agreement_ci=statistics.wilson(
            float(same.sum()), len(same), design_effect=statistics.design_effect(same, rows)
        ),
        top1_lost=int((was_right & ~is_right).sum()),
        top1_won=int((is_right & ~was_right).sum()),
        delta_p_rms=float(np.sqrt((scores.delta_p**2).mean())),
        delta_p_rms_ci=(math.sqrt(square_ci[0]), math.sqrt(square_ci[1])),
        kl_histogram=kl_histogram(kl),
        worst=_worst(scores, tokens),
        **_quantiles(kl, rows),
    )


def _quantiles(kl: Floats, rows: Ints) -> dict[str, Any]:
    names = {"kl_median": 0.5, "kl_p90": 0.9, "kl_p99": 0.99, "kl_p999": 0.999}
    values = {name: statistics.quantile(kl, q) for name, q in names.items()}
    intervals = {f"{n}_ci": statistics.bootstrap_quantile(kl, rows, q) for n, q in names.items()}
    return values | intervals


def kl_histogram(kl: Floats) -> Histogram:
    """Count KL values [tokens] in logarithmic bins; no value is left out."""
    counts, _ = np.histogram(np.minimum(kl, _EDGES[-1]), bins=_EDGES)
    return Histogram([float(e) for e in _EDGES], [int(c) for c in counts])


def _worst(scores: TokenScores, tokens: Tensor) -> list[WorstContext]:
    """The predictions of largest KL, largest first; earlier ones win ties."""
    worst = []
    for i in np.argsort(-scores.kl, kind="stable")[:_NUM_WORST]:
        row, position = int(scores.row[i]), int(scores.position[i])
        context = tokens[row, max(0, position - _CONTEXT_TOKENS) : position].tolist()
        ids = (int(scores.target[i]), int(scores.base_top[i]), int(scores.top[i]))
        worst.append(WorstContext(float(scores.kl[i]), row, position, context, *ids))
    return worst


def decode_worst(comparison: Comparison, tokenizer: Any) -> list[dict[str, Any]]:
    """The worst contexts as text: context, true token, both models' first choices, KL."""
    return [
        {
            "kl": w.kl,
            "row": w.row,
            "position": w.position,
            "context": tokenizer.decode(w.context_ids),
            "true": tokenizer.decode([w.target_id]),
            "base": tokenizer.decode([w.base_top_id]),
            "model": tokenizer.decode([w.top_id]),
        }
        for w in comparison.worst
    ]


def _scored_positions(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """bool [N, T - 1]: which next-token predictions count."""
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool().cpu()
    if tokens.ndim != 2 or real.shape != tokens.shape or tokens.dtype != torch.int64:
        message = (
            f"tokens must be int64 [rows, length] with a mask of that shape; got {tokens.dtype}"
        )
        raise DataError(f"{message} {tuple(tokens.shape)}, mask {tuple(real.shape)}")
    scored = real[:, 1:] & real[:, :-1]
    if not scored.any():
        raise DataError(
            "the evaluation data holds no token to predict",
            code="CA02",
            why="every row has fewer than two real tokens",
            fix="give longer texts, or a larger seq_len",
        )
    return scored


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) without gradients, and back."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def _logits(model: nn.Module, rows: Tensor, keep: Tensor) -> Tensor:
    """Logits of the predictions that count, [kept tokens, V], in the model's own dtype."""
    weights = next(model.parameters(), None)
    device = rows.device if weights is None else weights.device
    logits: Tensor = model(input_ids=rows.to(device)).logits[:, :-1]
    return logits[keep.to(logits.device)]


def _pieces(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors side by side, `size` rows at a time."""
    return zip(*(torch.split(t, size) for t in tensors), strict=True)


def _chunk_size(logits: Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // logits.shape[-1])


def _score_batch(base_logits: Tensor, logits: Tensor, targets: Tensor) -> list[Tensor]:
    chunks = _pieces(_chunk_size(logits), base_logits, logits, targets)
    parts = [_score_chunk(*chunk) for chunk in chunks]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _score_chunk(base_logits: Tensor, logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Columns of TokenScores from `base_loss` on, for [tokens, V] logits, on the CPU."""
    log_q = _log_softmax(logits)
    log_p = _log_softmax(base_logits).to(log_q.device)
    p = log_p.exp()
    # 0 ln 0 = 0; rounding can leave -1e-17 where the two distributions are the same
    terms = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p))
    index = target[:, None].to(log_q.device)
    base_true, true = log_p.gather(1, index)[:, 0], log_q.gather(1, index)[:, 0]
    kl, delta_p = terms.sum(-1).clamp_min(0.0), true.exp() - base_true.exp()
    tops = (log_p.argmax(-1), log_q.argmax(-1))
    return tuple(c.cpu() for c in (-base_true, -true, kl, delta_p, *tops, target))


def _log_softmax(logits: Tensor) -> Tensor:
    """ln softmax in float64, refusing what is not a number."""
    if torch.isnan(logits).any():
        raise NumericError(
            "a model gave logits that are not numbers (NaN)",
            code="NU01",
            why="no quality figure can be computed from them",
            fix="look for infinities in the weights with `compress verify`, or compute in float32",
        )
    return torch.log_softmax(logits.double(), -1)


def _vocabulary_error(base: int, other: int) -> UnsupportedError:
    return UnsupportedError(
        f"the two models have different vocabularies ({base} and {other} entries)",
        code="CA12",
        why="their distributions cannot be compared token by token",
        fix="compare an artifact with the checkpoint it was made from",
    )
