"""The whole front of bytes against KL as plain data: `pareto.json`, and the report's drawing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compressor.stages.budget import Problem
from compressor.stages.candidates import Labels
from compressor.stages.costs import ENDLESS
from compressor.stages.prediction import Curve

if TYPE_CHECKING:
    from compressor.stages.search import Candidate

DEFINITION = (
    "bytes: codes, scales and zero points of the quantized linears as stored, dense ones included; "
    "average_bits: 8 bytes a weight over the same linears; additive_kl: sum of the units' scores; "
    "predicted_kl: additive_kl corrected by the measured models; measured_kl: held-out rows of the "
    "calibration data; all KL in nats a token"
)


def front_facts(
    problem: Problem, curve: Curve, named: list[tuple[str, Candidate]], chosen: Labels
) -> dict[str, Any]:
    """The predicted front, uniform formats, what was measured, and the chosen allocation."""
    measured = [
        {"name": name, **point(problem, curve, c.labels), "measured_kl": c.kl} for name, c in named
    ]
    uniform = [
        {"name": label, **point(problem, curve, labels)}
        for label, labels in problem.uniform().items()
    ]
    for row, labels in zip(uniform, problem.uniform().values(), strict=True):
        hits = [c.kl for _, c in named if c.labels == labels]
        row["measured_kl"] = hits[0] if hits else None
    most = problem.limits.num_bytes
    limits = {
        "bytes": most if most < ENDLESS else None,
        "milliseconds": problem.limits.milliseconds,
    }
    return {
        "definition": DEFINITION,
        "method": problem.method,
        "limits": limits,
        "points": [
            {**point(problem, curve, labels), "formats": labels}
            for labels in problem.front(limited=False)
        ],
        "uniform": uniform,
        "measured": measured,
        "chosen": {**point(problem, curve, chosen), "formats": chosen},
    }


def point(problem: Problem, curve: Curve, labels: Labels) -> dict[str, Any]:
    """Bytes, bits and predictions of one allocation."""
    size, additive = problem.candidates.num_bytes(labels), problem.additive(labels)
    others = [problem.candidates.others[item] for item in labels.items()]
    times = {"decode_ms": sum(each[0] for each in others)} if others and others[0] else {}
    return {
        "bytes": size,
        "average_bits": 8 * size / problem.num_weights,
        "additive_kl": additive,
        "predicted_kl": curve(additive),
        **times,
    }
