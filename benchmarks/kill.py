"""Runs killed with SIGKILL at random moments and resumed: is the artifact the same, byte for byte?

    python -m benchmarks kill [--model DIR] [--kills 20] [--steps 6] [--depth N] [--out FILE]

One run goes through undisturbed. Then fresh runs of the same recipe are killed again and again
after a random delay, until one gets through; every file of its artifact except the two reports
(they hold times) must equal the undisturbed one's. That is repeated until enough kills were made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

TIMED = ("report.html", "report.json")
MOST_KILLS = 8  # in one run; then it may finish


def main(arguments: list[str]) -> None:
    """Make the kills and write one JSON object; exits 1 if anything differs."""
    options = _parse(arguments)
    work = (options.work or Path(tempfile.mkdtemp(prefix="compressor-kill-"))).absolute()
    recipe = work / "recipe.yaml"
    work.mkdir(parents=True, exist_ok=True)
    recipe.write_text(json.dumps(make_recipe(options)), encoding="utf-8")
    result: dict[str, Any] = {"identical": False}
    for result in torture(recipe, work, kills=options.kills, seed=options.seed):
        text = json.dumps(result, indent=1) + "\n"
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(text, encoding="utf-8")
        sys.stdout.write(text)
    if options.work is None:
        shutil.rmtree(work)
    if not result["identical"]:
        sys.exit(1)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks kill")
    parser.add_argument("--model", default="reference")
    parser.add_argument("--text", default="reference", help="text for calibration and evaluation")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6, help="of distillation; 0 = none")
    parser.add_argument("--pattern", default="", help="of pruning, such as 2:4; empty = none")
    parser.add_argument("--depth", type=int, default=0, help="see `_chain`; 0 = not that recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def make_recipe(options: argparse.Namespace) -> dict[str, Any]:
    """calibrate, what the options ask for, pack, verify, evaluate."""
    data = {"source": options.text, "num_samples": options.rows, "seq_len": options.length}
    stages = _chain(options, data) if options.depth else _budgeted(options, data)
    return {
        "name": "kill",
        "model": {"path": options.model},
        "output": "out",
        "samples": 0,
        "stages": [
            {"kind": "calibrate", "data": data},
            *stages,
            {"kind": "pack", "kernels_archs": []},
            {"kind": "verify", "tokens": 8},
            {"kind": "evaluate", "data": data},
        ],
    }


def _distill(options: argparse.Namespace, data: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "distill", "data": data, "steps": options.steps, "batch_size": 2,
        "checkpoint_steps": 2,
    }  # fmt: skip


def _chain(options: argparse.Namespace, data: dict[str, Any]) -> list[dict[str, Any]]:
    """Prune to so many blocks, distill from a cache, quantize by statistics of what came out."""
    teacher = {"targets": "top_k", "cache": "teacher"}  # in the folder of each run
    return [
        {"kind": "prune", "depth": options.depth},
        _distill(options, data) | {"teacher": teacher, "learning_rate": 5e-4},
        {"kind": "calibrate", "data": data},
        {"kind": "quantize", "scheme": "W4A16", "group_size": 32},
    ]


def _budgeted(options: argparse.Namespace, data: dict[str, Any]) -> list[dict[str, Any]]:
    """Prune if wanted, quantize within a budget, train the scales."""
    prune = [{"kind": "prune", "pattern": options.pattern}] if options.pattern else []
    quantize = {
        "kind": "quantize", "group_size": 32, "budget": {"average_bits": 4.75}, "grid": "minmax",
        "candidates": ["W3A16", "W4A16", "W8A16"], "scores": "output_fisher",
    }  # fmt: skip
    return [*prune, quantize, *([_distill(options, data)] if options.steps else [])]


def torture(recipe: Path, work: Path, *, kills: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Run once undisturbed, then until `kills` kills were made; the result after each run.

    Delays are at most a third of the undisturbed time, so that one run meets several kills.
    """
    chance = random.Random(seed)
    seconds = time.monotonic()
    if _run(recipe, work / "plain", None):
        raise SystemExit(f"the undisturbed run failed: {work / 'plain' / 'log'}")
    seconds = time.monotonic() - seconds
    wanted = digests(work / "plain" / "out")
    made: list[float] = []
    differences: list[str] = []
    runs = 0
    while len(made) < kills:
        runs += 1
        made += _killed_run(recipe, work / f"run-{runs}", min(MOST_KILLS, kills - len(made)),
                            lambda: chance.uniform(0.0, seconds / 3))  # fmt: skip
        differences += compare(wanted, digests(work / f"run-{runs}" / "out"))
        shutil.rmtree(work / f"run-{runs}")
        yield {
            "kills": len(made),
            "runs": runs,
            "identical": not differences,
            "differences": differences,
            "files": len(wanted),
            "undisturbed_s": round(seconds, 1),
            "killed_after_s": [round(m, 2) for m in made],
        }


def _killed_run(recipe: Path, folder: Path, kills: int, delay: Any) -> list[float]:
    """Kill and resume until `kills` kills hit a living process, then let it finish."""
    made: list[float] = []
    while len(made) < kills:
        after = delay()
        code = _run(recipe, folder, after)
        if code != -signal.SIGKILL:
            if code:
                raise SystemExit(f"a resumed run failed: {folder / 'log'}")
            return made
        made.append(after)
    if _run(recipe, folder, None):
        raise SystemExit(f"a resumed run failed: {folder / 'log'}")
    return made


def _run(recipe: Path, folder: Path, kill_after: float | None) -> int:
    folder.mkdir(exist_ok=True)
    root = Path(__file__).resolve().parent.parent
    paths = [str(root), str(root / "kernels"), str(root / "eval")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command: Sequence[str] = [sys.executable, "-m", "compressor", "run", str(recipe), "-o", "out"]
    with (folder / "log").open("ab") as log:
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            return child.wait(timeout=kill_after)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of an artifact that holds no times."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in TIMED)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def compare(wanted: dict[str, str], found: dict[str, str]) -> list[str]:
    """Names of files that differ or are in one of the two only."""
    return [n for n in sorted({*wanted, *found}) if wanted.get(n) != found.get(n)]
