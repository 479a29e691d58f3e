"""Intervals and tests for paired comparisons; every random draw is seeded, so results repeat.

Tokens of one document are correlated: the unit that is resampled is the *block* (a row or a
document), never the token. Letters: B blocks, R resamples, n trials, b and c = items that only
the first or only the second model gets right.

    bootstrap of a mean      Künsch 1989; sum_b w_b s_b / sum_b w_b n_b with w ~ multinomial(B)
    ratio of perplexities    exp(d ± t_{B-1} se(d)), d = sum_b d_b / sum_b n_b   (delta method)
    proportion               Wilson 1927, with n divided by the design effect (Kish 1965)
    paired accuracies        exact McNemar: 2 P[Binomial(b + c, 1/2) <= min(b, c)]
    difference of accuracies Agresti & Min 2005: Wald after adding 1/2 to each of the four cells
    several claims           Holm 1979
    power                    (z_{1-alpha/2} + z_{power}) sqrt(rho / n), rho = disagreement rate
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Interval = tuple[float, float]

UNKNOWN: Interval = (math.nan, math.nan)  # too few blocks for any statement
INFINITE: Interval = (math.inf, math.inf)  # a value was infinite, so is every mean
SEED = 20240229
RESAMPLES = 2000


def block_sums(values: Floats, blocks: Ints) -> tuple[Floats, Floats]:
    """Sum and number of `values` in each block; `blocks` gives the block of every value."""
    _, index = np.unique(blocks, return_inverse=True)
    counts: Floats = np.bincount(index).astype(np.float64)
    sums: Floats = np.bincount(index, weights=values).astype(np.float64)
    return sums, counts


def _block_weights(num_blocks: int, resamples: int) -> Ints:
    """How often each block is drawn in each resample, [R, B]."""
    rng = np.random.default_rng(SEED)
    return rng.multinomial(num_blocks, np.full(num_blocks, 1 / num_blocks), size=resamples)


def _percentiles(draws: Floats, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    return quantile(draws, tail), quantile(draws, 1 - tail)


def bootstrap_mean(values: Floats, blocks: Ints, *, confidence: float = 0.95) -> Interval:
    """Percentile interval of the mean over tokens, whole blocks resampled with replacement."""
    sums, counts = block_sums(values, blocks)
    if len(sums) < 2:
        return UNKNOWN
    if not np.isfinite(sums).all():
        return INFINITE
    weights = _block_weights(len(sums), RESAMPLES)
    return _percentiles((weights @ sums) / (weights @ counts), confidence)


def bootstrap_quantile(
    values: Floats, blocks: Ints, quantile: float, *, confidence: float = 0.95
) -> Interval:
    """Percentile interval of a (linearly interpolated) quantile under the block bootstrap.

    Every resample is a multiset of the sorted values, so its quantile is read from a cumulative
    count; the resampled values are never copied.
    """
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    _, index = np.unique(blocks[order], return_inverse=True)
    num_blocks = int(index.max()) + 1
    if num_blocks < 2:
        return UNKNOWN
    weights = _block_weights(num_blocks, RESAMPLES // 4)
    draws = [_weighted_quantile(ranked, w[index], quantile) for w in weights]
    return _percentiles(np.asarray(draws), confidence)


def _weighted_quantile(ranked: Floats, counts: Ints, quantile: float) -> float:
    """Quantile of the multiset in which ranked[i] appears counts[i] times."""
    cumulative = np.cumsum(counts)
    position = quantile * (cumulative[-1] - 1)
    low, high = math.floor(position), math.ceil(position)
    first, second = ranked[np.searchsorted(cumulative, [low, high], side="right")]
    return float(first if first == second else first + (position - low) * (second - first))


def quantile(values: Floats, q: float) -> float:
    """Linearly interpolated quantile; unlike np.quantile it bears infinite values."""
    return _weighted_quantile(np.sort(values), np.ones(len(values), dtype=np.int64), q)


def ratio_interval(differences: Floats, counts: Floats, *, confidence: float = 0.95) -> Interval:
    """Interval of exp(sum differences / sum counts), e.g. of a ratio of perplexities.

    Args:
        differences: per block, the sum of the paired differences of token losses (nats).
        counts: per block, its number of tokens; unequal blocks make d a ratio estimator, whose
            variance is B / (B - 1) * sum_b (d_b - d n_b)^2 / (sum_b n_b)^2.
    """
    num_blocks = len(differences)
    if num_blocks < 2 or not np.isfinite(differences).all():
        return UNKNOWN
    mean = differences.sum() / counts.sum()
    residual = differences - mean * counts
    variance = num_blocks / (num_blocks - 1) * (residual**2).sum() / counts.sum() ** 2
    reach = stats.t.ppf(0.5 + confidence / 2, num_blocks - 1) * math.sqrt(variance)
    return float(np.exp(mean - reach)), float(np.exp(mean + reach))


def design_effect(hits: Floats, blocks: Ints) -> float:
    """Variance of a proportion under blocks over that of independent trials, at least 1."""
    sums, counts = block_sums(hits, blocks)
    rate = hits.mean()
    if len(sums) < 2 or rate in (0.0, 1.0):
        return 1.0
    clustered = len(sums) / (len(sums) - 1) * ((sums - rate * counts) ** 2).sum()
    return max(1.0, float(clustered / (len(hits) * rate * (1 - rate))))


def wilson(
    successes: float, trials: float, *, design_effect: float = 1.0, confidence: float = 0.95
) -> Interval:
    """Wilson's score interval of a proportion; correlated trials count 1/design_effect each."""
    if trials <= 0:
        return UNKNOWN
    n, rate = trials / design_effect, successes / trials
    z = stats.norm.ppf(0.5 + confidence / 2)
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, float(centre - reach)), min(1.0, float(centre + reach))


def mcnemar(only_first: int, only_second: int, *, one_sided: bool = False) -> float:
    """Exact p-value that both models are right equally often, from the discordant items.

    One-sided asks for a regression: P[X >= only_first], small when the second model lost items.
    """
    discordant = only_first + only_second
    if discordant == 0:
        return 1.0
    if one_sided:
        return float(stats.binom.sf(only_first - 1, discordant, 0.5))
    tail = stats.binom.cdf(min(only_first, only_second), discordant, 0.5)
    return min(1.0, float(2 * tail))


def accuracy_difference(
    only_first: int, only_second: int, trials: int, *, confidence: float = 0.95
) -> Interval:
    """Interval of accuracy(second) - accuracy(first) on the same items (Agresti & Min 2005)."""
    if trials <= 0:
        return UNKNOWN
    b, c, n = only_first + 0.5, only_second + 0.5, trials + 2.0
    centre = (c - b) / n
    reach = stats.norm.ppf(0.5 + confidence / 2) * math.sqrt((b + c) / n - centre**2) / math.sqrt(n)
    return max(-1.0, float(centre - reach)), min(1.0, float(centre + reach))


def recovery_interval(
    first: Sequence[bool], second: Sequence[bool], *, confidence: float = 0.95
) -> Interval:
    """Interval of accuracy(second) / accuracy(first): items resampled in pairs."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(a) < 2 or a.sum() == 0:
        return UNKNOWN
    cells = [int(((a == x) & (b == y)).sum()) for x, y in ((1, 1), (1, 0), (0, 1), (0, 0))]
    rng = np.random.default_rng(SEED)
    both, lost, won, _ = rng.multinomial(len(a), np.asarray(cells) / len(a), size=5 * RESAMPLES).T
    usable = both + lost > 0
    return _percentiles(((both + won)[usable]) / ((both + lost)[usable]), confidence)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for as many claims as there are values, in the given order."""
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def minimum_detectable_effect(
    disagreement: float, trials: int, *, alpha: float = 0.05, power: float = 0.8
) -> float:
    """Smallest true change of accuracy that `trials` paired items would show (arXiv 2605.28873)."""
    if trials <= 0:
        return math.nan
    z = stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)
    return float(z * math.sqrt(disagreement / trials))
