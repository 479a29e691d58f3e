"""Statistics against slow oracles and textbook values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from compressor_eval import statistics as st


def blocks_of(values_per_block: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    values = np.array([v for block in values_per_block for v in block])
    ids = np.array([i for i, block in enumerate(values_per_block) for _ in block])
    return values, ids


@pytest.fixture
def clustered() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return blocks_of([list(rng.normal(rng.normal(), 1, rng.integers(3, 9))) for _ in range(12)])


def test_wilson_agrees_with_scipy() -> None:
    for successes, trials in ((0, 10), (7, 10), (10, 10), (913, 1000)):
        expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
        assert st.wilson(successes, trials) == pytest.approx((expected.low, expected.high))


def test_wilson_widens_with_correlated_trials() -> None:
    assert st.wilson(90, 100, design_effect=4) == pytest.approx(st.wilson(22.5, 25))


def test_mcnemar_agrees_with_the_exact_binomial_test() -> None:
    for b in range(12):
        for c in range(12 - b):
            if b + c:
                assert st.mcnemar(b, c) == pytest.approx(stats.binomtest(b, b + c).pvalue)
                one = stats.binomtest(b, b + c, alternative="greater").pvalue
                assert st.mcnemar(b, c, one_sided=True) == pytest.approx(one)
    assert st.mcnemar(0, 0) == 1.0


def test_holm_matches_a_worked_example() -> None:
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([]) == []


def test_minimum_detectable_effect_matches_the_published_figures() -> None:
    assert st.minimum_detectable_effect(0.05, 1319) == pytest.approx(0.017, abs=5e-4)
    assert st.minimum_detectable_effect(0.05, 14042) == pytest.approx(0.0053, abs=5e-5)


def test_bootstrap_mean_equals_resampling_blocks_one_by_one(clustered) -> None:
    values, ids = clustered
    weights = st._block_weights(12, st.RESAMPLES)
    draws = []
    for counts in weights:
        sample = np.concatenate([values[ids == b] for b in range(12) for _ in range(counts[b])])
        draws.append(sample.mean())
    expected = np.quantile(draws, [0.025, 0.975])
    assert st.bootstrap_mean(values, ids) == pytest.approx(tuple(expected))


def test_bootstrap_quantile_equals_resampling_blocks_one_by_one(clustered) -> None:
    values, ids = clustered
    draws = []
    for counts in st._block_weights(12, st.RESAMPLES // 4):
        sample = np.concatenate([values[ids == b] for b in range(12) for _ in range(counts[b])])
        draws.append(np.quantile(sample, 0.9))
    expected = np.quantile(draws, [0.025, 0.975])
    assert st.bootstrap_quantile(values, ids, 0.9) == pytest.approx(tuple(expected))


def test_intervals_repeat_exactly(clustered) -> None:
    assert st.bootstrap_mean(*clustered) == st.bootstrap_mean(*clustered)


def test_one_block_gives_no_interval() -> None:
    values, ids = blocks_of([[1.0, 2.0]])
    assert all(math.isnan(x) for x in st.bootstrap_mean(values, ids))
    assert all(math.isnan(x) for x in st.bootstrap_quantile(values, ids, 0.5))
    assert all(math.isnan(x) for x in st.ratio_interval(np.ones(1), np.ones(1)))


def test_ratio_interval_of_equal_blocks_is_the_paired_t_interval() -> None:
    d = np.random.default_rng(0).normal(0.1, 0.3, 20)
    reach = stats.t.ppf(0.975, 19) * d.std(ddof=1) / math.sqrt(20)
    expected = (math.exp(d.mean() - reach), math.exp(d.mean() + reach))
    assert st.ratio_interval(d * 7, np.full(20, 7.0)) == pytest.approx(expected)


def test_ratio_interval_covers_the_truth_about_as_often_as_promised() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(400):
        counts = rng.integers(5, 50, 25).astype(float)
        low, high = st.ratio_interval(counts * rng.normal(0.05, 0.2, 25), counts)
        hits += low <= math.exp(0.05) <= high
    assert 0.90 <= hits / 400 <= 0.98


def test_design_effect_counts_copies_as_one() -> None:
    hits = np.repeat(np.random.default_rng(0).integers(0, 2, 200), 5).astype(float)
    assert st.design_effect(hits, np.repeat(np.arange(200), 5)) == pytest.approx(5, rel=0.05)
    assert st.design_effect(hits, np.arange(1000)) == pytest.approx(1, rel=0.01)


def test_accuracy_difference_is_not_certain_without_disagreement() -> None:
    low, high = st.accuracy_difference(0, 0, 50)
    assert low < 0 < high
    assert low == pytest.approx(-high)


def test_recovery_interval_holds_the_ratio() -> None:
    rng = np.random.default_rng(0)
    first = rng.random(300) < 0.7
    second = first & (rng.random(300) < 0.95)
    low, high = st.recovery_interval(list(first), list(second))
    assert low < second.sum() / first.sum() < high <= 1.0
