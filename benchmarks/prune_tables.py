"""The pruning results as one Markdown file, with the goals and whether they are reached."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.prune_cases import DISTILLED, HALF, MASKS, OURS, PEER, SCRATCH, SHAPES

Rows = list[dict[str, Any]]
RESAMPLES = 2000
INTRODUCTION = """# Pruning, repair, distillation

Written by `python -m benchmarks prune_distill`; do not edit. Held-out rows, float32. Damage:
ln(perplexity ratio) = lost cross-entropy, nats a token. Several seeds (other calibration rows) are
one line: mean, and in brackets the smallest and largest damage. Seconds: wall time of a cell with
calibration and scoring on a machine shared with much other work, no measure of speed. Repaired: by
least squares; masks without another name are those of ALPS, the default.
"""
HEADER = (
    "| shape | method | parameters | nonzero | KL | damage | perplexity ratio | top-1 % | s |\n"
    "|---|---|---:|---:|---:|---:|---:|---:|---:|\n"
)


def write_tables(results: Path) -> None:
    """Write results/prune.md from results/prune-*.json."""
    files = sorted(results.glob("prune-*.json"))
    parts = [INTRODUCTION, *(_of_model(json.loads(f.read_text("utf-8"))) for f in files)]
    (results / "prune.md").write_text("\n".join(parts), encoding="utf-8")


def _of_model(body: dict[str, Any]) -> str:
    rows: Rows = list(body["rows"].values())
    teaching = body["protocol"]["training"]
    lines = [_line(group) for group in _groups(rows)]
    about = ", ".join(f"{key} {value}" for key, value in teaching.items())
    head = [f"## {body['protocol']['model']}\n", f"Training: {about}.\n"]
    reached = [f"- {goal}" for goal in goals(rows)]
    return "\n".join([*head, HEADER + "\n".join(lines), "", *reached, ""])


def _groups(rows: Rows) -> list[Rows]:
    """Rows of one shape and method, least damage first within a shape."""
    found: dict[tuple[str, str], Rows] = {}
    for row in rows:
        found.setdefault((row["shape"], row["method"]), []).append(row)
    return sorted(found.values(), key=lambda g: (SHAPES.index(g[0]["shape"]), _mean(g, "damage")))


def _mean(group: Rows, key: str) -> float:
    return fmean(row[key] for row in group)


def _line(group: Rows) -> str:
    first, lost = group[0], [row["damage"] for row in group]
    spread = f" [{min(lost):.3f}, {max(lost):.3f}]" if len(group) > 1 else ""
    cells = [
        first["shape"],
        first["method"],
        f"{first['parameters']:,}",
        f"{first['nonzero']:,}",
        f"{_mean(group, 'kl_mean'):.4f}",
        f"{_mean(group, 'damage'):.4f}{spread}",
        f"{math.exp(_mean(group, 'damage')):.3f}",
        f"{100 * _mean(group, 'top1_agreement'):.1f}",
        f"{_mean(group, 'wall'):.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def goals(rows: Rows) -> list[str]:
    """What was to be shown, as measured; only of shapes that have the rows."""
    found = [_against_peer(rows, shape, method) for shape in MASKS for method in OURS]
    found += [_recovered(rows), *(_against_scratch(rows, shape) for shape in SHAPES)]
    return [text for text in found if text]


def _of(rows: Rows, shape: str, method: str) -> Rows:
    hits = [r for r in rows if (r["shape"], r["method"]) == (shape, method)]
    return sorted(hits, key=lambda r: int(r["seed"]))


def _against_peer(rows: Rows, shape: str, method: str) -> str:
    """Less damage than llm-compressor's SparseGPT, seed by seed, documents resampled in pairs."""
    ours, theirs = _of(rows, shape, method), _of(rows, shape, PEER)
    if not ours or not theirs:
        return ""
    seeds = {r["seed"] for r in ours} & {r["seed"] for r in theirs}
    ours, theirs = ([r for r in group if r["seed"] in seeds] for group in (ours, theirs))
    pairs = [np.array([r["documents"] for r in group]).mean(0) for group in (ours, theirs)]
    draws = np.random.default_rng(0).integers(0, len(pairs[0]), (RESAMPLES, len(pairs[0])))
    ratios = 1 - pairs[0][draws].mean(1) / pairs[1][draws].mean(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    less = 1 - _mean(ours, "damage") / _mean(theirs, "damage")
    kl = 1 - _mean(ours, "kl_mean") / _mean(theirs, "kl_mean")
    verdict = "reached" if less >= 0.4 else "missed"
    return (
        f"{shape}, {method}: {100 * less:.0f} % less damage than {PEER} "
        f"[{100 * low:.0f}, {100 * high:.0f}] (goal 40 %: {verdict}), {100 * kl:.0f} % less KL; "
        f"seeds: {len(ours)}"
    )


def _recovered(rows: Rows) -> str:
    pruned, taught = _of(rows, HALF, "pruned"), _of(rows, HALF, DISTILLED)
    if not pruned or not taught:
        return ""
    before, after = pruned[0]["perplexity_ratio"] - 1, taught[0]["perplexity_ratio"] - 1
    share = 1 - after / before
    in_logs = 1 - taught[0]["damage"] / pruned[0]["damage"]
    verdict = "reached" if share >= 0.8 else "missed"
    return (
        f"{HALF}: distillation recovers {100 * share:.1f} % of the perplexity gap (goal 80 %: "
        f"{verdict}), {100 * in_logs:.0f} % of the cross-entropy gap"
    )


def _against_scratch(rows: Rows, shape: str) -> str:
    taught, fresh = _of(rows, shape, DISTILLED), _of(rows, shape, SCRATCH)
    if not taught or not fresh:
        return ""
    ours, theirs = taught[0]["perplexity_ratio"], fresh[0]["perplexity_ratio"]
    verdict = "reached" if ours < theirs else "missed"
    return (
        f"{shape}: perplexity ratio {ours:.3f} distilled, {theirs:.3f} from scratch with the same "
        f"tokens (goal lower: {verdict})"
    )
