"""The gate: three states, decided by whole intervals."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from compressor.errors import UsageError
from compressor_eval.gate import Gate, judge, tier
from compressor_eval.suites import load_suite, suite_names


def comparison(**changes: Any) -> Any:
    values = {
        "num_tokens": 1000,
        "kl_mean": 0.02,
        "kl_mean_ci": (0.018, 0.022),
        "kl_p99": 0.2,
        "kl_p99_ci": (0.15, 0.25),
        "perplexity_ratio": 1.01,
        "perplexity_ratio_ci": (1.005, 1.015),
        "top1_agreement": 0.95,
        "top1_agreement_ci": (0.94, 0.96),
    }
    return SimpleNamespace(**(values | changes))


@pytest.mark.parametrize(
    ("gate", "status"),
    [
        (Gate(max_kl=0.022), "pass"),
        (Gate(max_kl=0.021), "inconclusive"),
        (Gate(max_kl=0.018), "inconclusive"),
        (Gate(max_kl=0.017), "fail"),
        (Gate(min_top1_agreement=0.94), "pass"),
        (Gate(min_top1_agreement=0.95), "inconclusive"),
        (Gate(min_top1_agreement=0.97), "fail"),
        (Gate(max_perplexity_ratio=1.02, max_kl_p99=0.1), "fail"),
        (Gate(max_perplexity_ratio=1.02, max_kl_p99=0.2), "inconclusive"),
        (Gate(min_tokens=1000), "pass"),
        (Gate(min_tokens=1001), "inconclusive"),
        (Gate(), "none"),
    ],
)
def test_only_whole_intervals_decide(gate: Gate, status: str) -> None:
    assert judge(comparison(), None, gate).status == status


def test_an_unknown_interval_is_inconclusive() -> None:
    verdict = judge(comparison(kl_mean_ci=(math.nan, math.nan)), None, Gate(max_kl=1.0))
    assert verdict.status == "inconclusive"
    assert verdict.as_json()["reasons"][0]["ci"] == [None, None]


def test_an_infinite_divergence_fails() -> None:
    bad = comparison(kl_mean=math.inf, kl_mean_ci=(math.inf, math.inf))
    assert judge(bad, None, Gate(max_kl=1.0)).status == "fail"


def test_every_task_is_held_against_the_allowed_drop() -> None:
    tasks: Any = {
        "a": SimpleNamespace(delta=-0.005, delta_ci=(-0.01, 0.0)),
        "b": SimpleNamespace(delta=-0.05, delta_ci=(-0.07, -0.03)),
    }
    verdict = judge(None, tasks, Gate(max_task_drop=0.02))
    assert [r.status for r in verdict.reasons] == ["pass", "fail"]
    assert verdict.reasons[1].metric == "task_drop:b"
    assert verdict.reasons[1].ci == (0.03, 0.07)


def test_a_limit_on_something_not_measured_is_inconclusive() -> None:
    assert judge(None, None, Gate(max_kl=1.0)).status == "inconclusive"
    assert judge(comparison(), {}, Gate(max_task_drop=0.1)).status == "inconclusive"


def test_tiers_go_down_with_divergence() -> None:
    kls = (0.001, 0.01, 0.05, 0.1, 1.0)
    words = [tier(comparison(kl_mean=kl, top1_agreement=0.999, perplexity_ratio=1.0)) for kl in kls]
    assert words == ["transparent", "near-lossless", "good", "degraded", "research"]


def test_every_shipped_suite_loads() -> None:
    assert {"quick", "standard", "strict"} <= set(suite_names())
    for name in suite_names():
        assert load_suite(name).gate != Gate()


def test_an_unknown_suite_is_refused_with_the_known_names() -> None:
    with pytest.raises(UsageError, match="quick"):
        load_suite("nope")
