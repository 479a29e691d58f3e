"""Run one case in a process of its own, and keep what it made so that it can be scored again.

work/<model>/<case>/            the checkpoint
work/<model>/<case>.json        seconds, peak MiB, commit, processor; its presence = finished
work/<model>/<case>.log         everything the tool said
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import NEEDS_ACCELERATOR, OURS, PEERS, Case
from benchmarks.subjects import Subject, Tokens
from compressor.idle_threads import sleep_early

ROOT = Path(__file__).parent.parent
TIME_LIMIT = 7200  # seconds
MAX_ERROR = 160  # characters


@dataclass(frozen=True, slots=True)
class Place:
    """Where things are: environments of other tools, finished work, and how many threads to use."""

    peers: Path
    work: Path
    threads: int = 1

    def python_of(self, tool: str) -> Path:
        """The interpreter that holds another tool."""
        return self.peers / f"peers-{PEERS[tool]}" / "bin" / "python"


def run_case(case: Case, subject: Subject, tokens: Tokens, *, place: Place) -> dict[str, Any]:
    """The case's line: `seconds`, `peak_mib`, `threads`, `commit` and `capability`, or `error`.

    A finished case is not run again; one that failed is.
    """
    folder = place.work / subject.name / case.label
    record = folder.with_name(folder.name + ".json")
    if record.is_file():
        found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        return found
    line = _start(command(case, subject, tokens, place=place, out=folder), folder, place)
    if "error" not in line:
        capability = torch.backends.cpu.get_cpu_capability()
        line |= {"threads": place.threads, "commit": commit(), "capability": capability}
        record.write_text(json.dumps(line) + "\n", encoding="utf-8")
    return line


@cache
def commit() -> str | None:
    """The commit of the code, "-dirty" if the code was changed since; None without git.

    It tells rows of older code from newer ones. Results do not count as code.
    """
    head = _git("rev-parse", "--short", "HEAD").strip()
    changed = _git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"
    )
    return (head + ("-dirty" if changed else "")) or None


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    asked = ["git", *arguments]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False).stdout


def is_done(case: Case, subject: Subject, place: Place) -> bool:
    """Whether the checkpoint of a case is there."""
    return (place.work / subject.name / f"{case.label}.json").is_file()


def forget(case: Case, subject: Subject, *, place: Place) -> None:
    """Remove all that a case left."""
    folder = place.work / subject.name
    for suffix in (".json", ".log"):
        (folder / f"{case.label}{suffix}").unlink(missing_ok=True)
    for name in (case.label, f"{case.label}.run"):
        shutil.rmtree(folder / name, ignore_errors=True)


def command(
    case: Case, subject: Subject, tokens: Tokens, *, place: Place, out: Path
) -> list[str] | str:
    """The command line of a case, or why there is none."""
    if case.tool in NEEDS_ACCELERATOR:
        return NEEDS_ACCELERATOR[case.tool]
    if case.tool in OURS:
        where = {"model": str(subject.model), "tokens": str(tokens.file), "out": str(out)}
        own = {**where, "data": tokens.data, "settings": settings_of(case)}
        return [sys.executable, "-m", "benchmarks.ours", json.dumps(own)]
    if not place.python_of(case.tool).is_file():
        return "not installed: run `make bench-peers`"
    job = {
        "tool": case.tool,
        "model": str(subject.model.resolve()),
        "tokens": str(tokens.file.resolve()),
        "bits": case.bits,
        "group": case.group,
        "symmetric": case.symmetric,
        "out": str(out.resolve()),
    }
    driver = ROOT / "benchmarks" / "peers.py"
    return [str(place.python_of(case.tool)), str(driver), json.dumps(job)]


def settings_of(case: Case) -> dict[str, Any]:
    """Keys of our quantize stage for a case."""
    common = {"group_size": case.group, **OURS[case.tool]}
    if case.budget is not None:
        return common | {"budget": {"average_bits": case.budget}}
    return common | {"bits": case.bits, "symmetric": case.symmetric}


def _start(arguments: list[str] | str, folder: Path, place: Place) -> dict[str, Any]:
    if isinstance(arguments, str):
        return {"error": arguments}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".log").open("w+", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                arguments,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT if "-m" in arguments else folder.parent,
                env=_environment(place.threads, own="-m" in arguments),
                timeout=TIME_LIMIT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"stopped after {TIME_LIMIT} s"}
        log.seek(0)
        return last_line(log.read(), done.returncode)


def last_line(text: str, code: int) -> dict[str, Any]:
    """The JSON line a process ended with, or its last words as an error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    answers = [line for line in lines if line.startswith('{"seconds"')]
    if code == 0 and answers:
        found: dict[str, Any] = json.loads(answers[-1])
        return found
    errors = [line for line in lines if "rror" in line] or lines or [f"exit code {code}"]
    return {"error": errors[-1][:MAX_ERROR]}


def _environment(threads: int, *, own: bool) -> dict[str, str]:
    """The same number of threads for all; other tools see no path of ours and no network."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    changes = dict.fromkeys(names, str(threads))
    changes |= {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
    kept = {k: v for k, v in os.environ.items() if own or k != "PYTHONPATH"}
    if own:  # as the `compress` command does
        sleep_early(kept)
    return kept | changes
