"""The results as one Markdown file: for each model and setting, tools from least to most damage.

Rows of several seeds are one line: the mean, and KL's smallest and largest value. The intervals
are those of the first seed: 95 %, by bootstrap over documents. `/ llmc-gptq` is the quotient of the
mean KLs; the same documents are drawn for both tools, so that a hard document harms neither.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.cases import Case

Row = dict[str, Any]
HEADER = (
    "| tool | bytes | bits | KL mean [95 %] | seeds | / llmc-gptq [95 %] | KL p99 "
    "| perplexity ratio [95 %] | top-1 % | s | CPU s | MiB |\n"
    "|---|---:|---:|---|---|---|---:|---|---:|---:|---:|---:|\n"
)
YARDSTICK = "llmc-gptq"
RESAMPLES = 2000
Documents = dict[str, list[float]]
INTRODUCTION = """# Quality: damage for each byte

Written by `python -m benchmarks quality`; do not edit. KL(original || compressed) in nats for each
token, on held-out rows; bytes of all weights as they would be stored. Seconds: the tool's own call,
on a machine shared with other work (an upper bound that may be many times too high; `--only timing`
measures speed). CPU seconds: the whole process with its imports and saving, one thread.
"""


def write_tables(results: Path) -> None:
    """Write results/quality.md from results/quality-*.json."""
    bodies = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(results.glob("quality-*"))]
    parts = [_of_model(body, _documents(results, body["protocol"]["model"])) for body in bodies]
    text = "\n".join([INTRODUCTION, *parts])
    (results / "quality.md").write_text(text, encoding="utf-8")


def documents_file(results: Path, model: str) -> Path:
    """Mean KL of each document, by case."""
    return results / f"kl-by-document-{model}.json"


def _documents(results: Path, model: str) -> Documents:
    file = documents_file(results, model)
    found: Documents = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _of_model(body: dict[str, Any], documents: Documents) -> str:
    protocol, rows = body["protocol"], body["rows"]
    scored = [r for r in rows if "error" not in r]
    parts = [
        f"## {protocol['model']}\n",
        f"Calibration and evaluation: {protocol['rows']} x {protocol['seq_len']} tokens of "
        f"{protocol['calibration'][0]} and {protocol['evaluation'][0]}. Rows of commits: "
        f"{commits(scored)}.\n",
    ]
    for setting in sorted({_setting(r) for r in scored}, key=lambda s: (str(s[1]), not s[2], s[0])):
        same = [r for r in scored if _setting(r) == setting]
        parts.append(f"### {_title(setting)}\n\n{table(same, documents)}")
    parts.append(f"### Nothing smaller is closer\n\n{front_table(scored)}")
    failed = sorted({f"- {_case(r)}: {r['error']}" for r in rows if "error" in r})
    return "\n".join([*parts, *(["### What did not run\n", *failed, ""] if failed else [])])


def commits(rows: list[Row]) -> str:
    """How many rows come from which state of the code on which kind of processor, most first.

    "unknown" = not recorded.
    """
    found = Counter(
        f"{r.get('commit') or 'unknown'} on {r.get('capability', 'unknown')}" for r in rows
    )
    return ", ".join(f"{name} ({count})" for name, count in found.most_common())


def _setting(row: Row) -> tuple[float, int, bool]:
    """(bits, group, symmetric); all budgets of a group size share one table, at bits 99."""
    return (99 if row["bits"] is None else row["bits"], row["group"], row["symmetric"])


def _title(setting: tuple[float, int, bool]) -> str:
    bits, group, symmetric = setting
    name = "one scale for each channel" if group == -1 else f"groups of {group}"
    if bits == 99:
        return f"Budgets, {name}"
    return f"{bits} bits, {name}, {'symmetric' if symmetric else 'asymmetric'}"


def _case(row: Row) -> str:
    width = f"{row['bits']} bits" if row["bits"] else f"budget {row['budget']}"
    kind = "symmetric" if row["symmetric"] else "asymmetric"
    group = "channel" if row["group"] == -1 else f"g{row['group']}"
    return f"{row['tool']}, {width} {group} {kind}"


def front(rows: list[Row]) -> list[Row]:
    """Rows of the first seed such that no smaller checkpoint has less KL."""
    kept: list[Row] = []
    first = [r for r in rows if r["seed"] == 0]
    for row in sorted(first, key=lambda r: (r["bytes"], r["kl_mean"])):
        if not kept or row["kl_mean"] < kept[-1]["kl_mean"]:
            kept.append(row)
    return kept


def front_table(rows: list[Row]) -> str:
    """The rows of `front` from the smallest to the closest."""
    head = "| bytes | bits | tool | KL mean |\n|---:|---:|---|---:|\n"
    return head + "".join(
        f"| {r['bytes']:,} | {r['average_bits']:.2f} | {_case(r)} | {r['kl_mean']:.4g} |\n"
        for r in front(rows)
    )


def table(rows: list[Row], documents: Documents) -> str:
    """One line for each tool (and budget), least damage first."""
    names = sorted({(r["tool"], r["budget"] or 0.0) for r in rows})
    lines = [[r for r in rows if (r["tool"], r["budget"] or 0.0) == name] for name in names]
    lines.sort(key=lambda same: (same[0]["budget"] or 0.0, fmean(r["kl_mean"] for r in same)))
    return HEADER + "".join(_line(same, documents) for same in lines)


def quotient(row: Row, documents: Documents) -> str:
    """Mean KL of a row over that of the yardstick in the same setting, with its paired interval."""
    own = documents.get(_label(row, row["tool"]))
    other = documents.get(_label(row, YARDSTICK))
    if own is None or other is None or row["tool"] == YARDSTICK:
        return ""
    draws = np.random.default_rng(0).integers(len(own), size=(RESAMPLES, len(own)))
    means = [np.asarray(values)[draws].mean(1) for values in (own, other)]
    low, high = np.quantile(means[0] / means[1], [0.025, 0.975])
    return f"{fmean(own) / fmean(other):.3f} {_interval([float(low), float(high)])}"


def _label(row: Row, tool: str) -> str:
    """The case of another tool in the setting of this row."""
    setting = {key: row[key] for key in ("bits", "group", "symmetric", "seed", "budget")}
    return Case(tool, **setting).label


def _line(same: list[Row], documents: Documents) -> str:
    first = min(same, key=lambda r: r["seed"])
    budget = f", {first['budget']:g} bits" if first["budget"] else ""
    kls = [r["kl_mean"] for r in same]
    spread = f"{min(kls):.4g} - {max(kls):.4g}" if len(same) > 1 else "1"
    cells = [
        first["tool"] + budget,
        f"{first['bytes']:,}",
        f"{first['average_bits']:.2f}",
        f"{fmean(kls):.4g} {_interval(first['kl_mean_ci'])}",
        spread,
        quotient(first, documents),
        f"{fmean(r['kl_p99'] for r in same):.3g}",
        f"{fmean(r['perplexity_ratio'] for r in same):.4f} "
        f"{_interval(first['perplexity_ratio_ci'], digits=5)}",
        f"{100 * fmean(r['top1_agreement'] for r in same):.1f}",
        f"{fmean(r['seconds'] for r in same):.1f}",
        f"{first['cpu_seconds']:.0f}" if "cpu_seconds" in first else "",
        f"{max(r['peak_mib'] for r in same):.0f}",
    ]
    return "| " + " | ".join(cells) + " |\n"


def _interval(bounds: list[float], *, digits: int = 3) -> str:
    return f"[{bounds[0]:.{digits}g}, {bounds[1]:.{digits}g}]"
