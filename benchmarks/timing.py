"""How long ours and the others take, back to back: median of three alternating runs.

    OMP_NUM_THREADS=2 python -m benchmarks quality --only timing --threads 2 [--models NAME ...]

For a quiet machine. Each pair takes turns, A B A B A B, so that a slow minute hits both; all
processes get the same number of threads. Seconds are those of the tool's own call.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases import Case
from benchmarks.jobs import Place, forget, run_case
from benchmarks.subjects import Subject, calibration

PAIRS = (("ours-default", "llmc-gptq"), ("ours-high", "autoround"))
REPETITIONS = 3
BITS = 4
log = logging.getLogger("benchmarks.quality")


def measure(subjects: list[Subject], place: Place, results: Path) -> None:
    """Write results/timing.json: one row for each model and pair."""
    rows = []
    for subject in subjects:
        for pair in PAIRS:
            rows.append({"model": subject.name, **_pair(pair, subject, place)})
            log.info("%s", rows[-1])
            body = {"threads": place.threads, "rows": rows}
            text = json.dumps(body, indent=1) + "\n"
            (results / "timing.json").write_text(text, encoding="utf-8")


def _pair(pair: tuple[str, str], subject: Subject, place: Place) -> dict[str, Any]:
    scratch = replace(place, work=place.work / "timing")
    tokens = calibration(subject, 0, work=scratch.work)
    seconds: dict[str, list[float]] = {tool: [] for tool in pair}
    for _ in range(REPETITIONS):
        for tool in pair:
            case = Case(tool, BITS, subject.groups[0], symmetric=True)
            line = run_case(case, subject, tokens, place=scratch)
            forget(case, subject, place=scratch)
            if "error" in line:
                return {"pair": list(pair), "error": f"{tool}: {line['error']}"}
            seconds[tool].append(line["seconds"])
    ours, theirs = (median(seconds[tool]) for tool in pair)
    return {"pair": list(pair), "seconds": seconds, "ratio": round(theirs / max(ours, 1e-9), 2)}
