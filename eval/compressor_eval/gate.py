"""Judge measured values against limits: three states, never two.

A metric passes only if its *whole* confidence interval is on the right side of the limit, fails
only if the whole interval is beyond it, and is inconclusive in between: then more tokens or more
items are needed, not a coin. The verdict is the worst of its metrics' states.

The tiers name what figures like these usually mean for models of a billion weights and more.
Tiny models have a larger KL at the same bits, so a tier describes; only the gate decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from compressor_eval.statistics import UNKNOWN, Interval

if TYPE_CHECKING:
    from compressor_eval.divergence import Comparison
    from compressor_eval.tasks import TaskComparison

Status = Literal["pass", "inconclusive", "fail"]


@dataclass(frozen=True, slots=True)
class Gate:
    """Limits; None = not asked for."""

    max_kl: float | None = None  # nats, mean over tokens
    max_kl_p99: float | None = None  # nats
    max_perplexity_ratio: float | None = None
    min_top1_agreement: float | None = None  # fraction
    max_task_drop: float | None = None  # fraction of items, for every task and the pool
    min_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Reason:
    """One metric against its limit."""

    metric: str
    value: float | None  # None = was not measured
    ci: Interval
    limit: float
    sense: Literal["<=", ">="]
    status: Status

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data; an unknown interval becomes nulls."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return plain | {"ci": [c if math.isfinite(c) else None for c in self.ci]}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The state of the whole, and of each metric that had a limit; "none" = no limits given."""

    status: Literal["pass", "fail", "inconclusive", "none"]
    reasons: list[Reason]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"status": self.status, "reasons": [r.as_json() for r in self.reasons]}


# field of Gate -> field of Comparison
_METRICS = {
    "max_kl": "kl_mean",
    "max_kl_p99": "kl_p99",
    "max_perplexity_ratio": "perplexity_ratio",
    "min_top1_agreement": "top1_agreement",
}


def judge(
    comparison: Comparison | None, tasks: Mapping[str, TaskComparison] | None, gate: Gate
) -> Verdict:
    """Hold a comparison, and accuracies per task, against the gate's limits.

    A limit on something that was not measured makes the verdict inconclusive.
    """
    reasons = [*_divergence_reasons(comparison, gate), *_task_reasons(tasks or {}, gate)]
    if not reasons:
        return Verdict("none", [])
    states = {r.status for r in reasons}
    worst = next(s for s in reversed(get_args(Status)) if s in states)
    return Verdict(worst, reasons)


def _divergence_reasons(comparison: Comparison | None, gate: Gate) -> Iterator[Reason]:
    for field, metric in _METRICS.items():
        limit = getattr(gate, field)
        if limit is None:
            continue
        sense: Literal["<=", ">="] = "<=" if field.startswith("max_") else ">="
        if comparison is None:
            yield Reason(metric, None, UNKNOWN, limit, sense, "inconclusive")
            continue
        ci: Interval = getattr(comparison, f"{metric}_ci")
        status = _status(ci, limit, sense)
        yield Reason(metric, getattr(comparison, metric), ci, limit, sense, status)
    if gate.min_tokens is not None:
        count = comparison.num_tokens if comparison else 0
        enough: Status = "pass" if count >= gate.min_tokens else "inconclusive"
        yield Reason("num_tokens", count, (count, count), gate.min_tokens, ">=", enough)


def _task_reasons(tasks: Mapping[str, TaskComparison], gate: Gate) -> Iterator[Reason]:
    limit = gate.max_task_drop
    if limit is None:
        return
    if not tasks:
        yield Reason("task_drop", None, UNKNOWN, limit, "<=", "inconclusive")
    for name, task in tasks.items():
        drop = (-task.delta_ci[1], -task.delta_ci[0])
        status = _status(drop, limit, "<=")
        yield Reason(f"task_drop:{name}", -task.delta, drop, limit, "<=", status)


def _status(ci: Interval, limit: float, sense: Literal["<=", ">="]) -> Status:
    low, high = ci if sense == "<=" else (-ci[1], -ci[0])
    bound = limit if sense == "<=" else -limit
    if high <= bound:
        return "pass"
    return "fail" if low > bound else "inconclusive"  # comparisons with nan are False


def tier(comparison: Comparison) -> str:
    """A word for the point estimates: transparent, near-lossless, good, degraded or research."""
    kl, ratio = comparison.kl_mean, comparison.perplexity_ratio
    if kl < 0.002 and comparison.top1_agreement > 0.99:
        return "transparent"
    if kl < 0.02 and ratio < 1.01:
        return "near-lossless"
    if kl < 0.06:
        return "good"
    return "degraded" if kl < 0.2 else "research"
