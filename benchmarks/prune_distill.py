"""What pruning costs, what repair and distillation give back: ours, other tools', and from scratch.

    make bench-peers                                       # llm-compressor, once
    python -m benchmarks prune_distill --models reference babyllama-tok361 --seeds 3
    python -m benchmarks prune_distill --only table        # the table again from the results

Calibration and judging rows as in the quality benchmark (`subjects.py`); one seed deals out one
third of the calibration text. Distilled and from-scratch students see the same rows of the training
text in the same order: TinyStories models the calibration text, the project's own model the
library files it was trained on (the evaluated modules are in neither). Everything is scored in
float32 on held-out rows; finished cells are kept in --work and in the results and run only once.
Several processes may fill one --out, each with its --models or --shapes and a --work of its own.

    damage     ln(perplexity / original perplexity) = cross-entropy that was lost, nats a token
    recovered  (pruned - distilled) / (pruned - original), in perplexity
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.jobs import ROOT, last_line
from benchmarks.prune_cases import (
    MASKS,
    PEERS,
    SCRATCH,
    SCRATCH_DISTILLED,
    SHAPES,
    Cell,
    Training,
    recipe_of,
)
from benchmarks.prune_cases import cells as all_cells
from benchmarks.prune_tables import write_tables
from benchmarks.scoring import SCORES, Judge
from benchmarks.subjects import Subject, Tokens, calibration, evaluation, subjects
from compressor.modeling.load import load_model
from compressor.pipeline import RunOptions, run
from compressor.recipe import parse_recipe
from compressor_eval.divergence import score_tokens, summarize
from reference import corpus

# steps, rates of students that lost little or much and of random ones; found on calibration rows
SETTINGS = {
    "reference": (100, 3e-4, 1e-3, 3e-3),
    "babyllama-tok361": (120, 3e-4, 1e-3, 3e-3),
}
BATCH, SEQ_LEN = 16, 192
log = logging.getLogger("benchmarks.prune_distill")


def main(arguments: list[str]) -> None:
    """Run the cells asked for, then write the table."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    options = _parse(arguments)
    known = subjects(options.shared)
    for name in options.models if options.only is None else ():
        _run_subject(known[name], options)
    write_tables(options.out)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks prune_distill")
    parser.add_argument("--models", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--methods", nargs="+", help="only these; default all")
    parser.add_argument("--seeds", type=int, default=1, choices=(1, 2, 3))
    parser.add_argument("--only", choices=("table",))
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--peers", type=Path, default=Path("build"))
    parser.add_argument("--work", type=Path, default=Path("build/prune"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args(arguments)


def _run_subject(subject: Subject, options: argparse.Namespace) -> None:
    work = options.work.absolute()
    held_out = evaluation(subject, work=work)
    samples = [calibration(subject, seed, work=work) for seed in range(options.seeds)]
    training = training_of(subject, work / subject.name)
    file = options.out / f"prune-{subject.name}.json"
    protocol = _protocol(subject, [s.digest for s in samples], held_out.digest, training)
    judge = Judge.of(subject.model, held_out.file)
    for cell in all_cells(options.shapes, options.seeds):
        wanted = options.methods is None or cell.method in options.methods
        if not wanted or cell.label in _read(file):
            continue
        folder = work / subject.name / cell.label
        start = time.monotonic()
        line = make(cell, subject, samples[cell.seed], (training, folder, options.peers))
        if "error" not in line:
            line = {**damage(judge, folder), **line, "wall": round(time.monotonic() - start, 1)}
            _write(file, protocol, cell, line)
        log.info("%s %s: %s", subject.name, cell.label, line.get("error", line.get("damage")))


def training_of(subject: Subject, work: Path) -> Training:
    """Text and length of distillation."""
    steps, *rates = SETTINGS[subject.name]
    text, packing = subject.calibration, subject.packing
    if subject.name == "reference":
        packing = "joined"
        text = work / "training.jsonl"
        library, _ = corpus.split(corpus.library_files())
        lines = [json.dumps({"text": t}) for t in corpus.documents(library)]
        order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0))
        text.write_text("".join(lines[i] + "\n" for i in order), encoding="utf-8")
    return Training(text, packing, int(steps), BATCH, SEQ_LEN, *rates)


def make(
    cell: Cell, subject: Subject, tokens: Tokens, how: tuple[Training, Path, Path]
) -> dict[str, Any]:
    """Make a cell's checkpoint in its folder; seconds of the stages, or an error.

    how: training, the folder, and where the other tools' environments are.
    """
    training, folder, peers = how
    if cell.method in PEERS:
        return _run_peer(cell, subject, tokens, folder, peers)
    student = None
    if cell.method in (SCRATCH, SCRATCH_DISTILLED):
        pruned = Cell(cell.shape, "pruned")
        shape = folder.with_name(pruned.label)
        if not (shape / "config.json").is_file():  # made with another --work
            make(pruned, subject, tokens, (training, shape, peers))
        student = random_student(shape, folder.with_name(folder.name + ".start"))
    text = recipe_of(
        cell, subject.model, folder, data=tokens.data, training=training, student=student
    )
    run_dir = folder.with_name(folder.name + ".run")
    shutil.rmtree(folder, ignore_errors=True)
    run(parse_recipe(text, file=cell.label), RunOptions(run_dir=run_dir))
    events = [json.loads(x) for x in (run_dir / "log.jsonl").read_text("utf-8").splitlines()]
    done = [e for e in events if e.get("event") == "stage finished"]
    shutil.rmtree(run_dir)
    return {"seconds": {e["stage"]: e["s"] for e in done if float(e["s"]) >= 1}}


def random_student(shape: Path, folder: Path) -> Path:
    """Random weights for the configuration of a pruned checkpoint, as transformers draws them."""
    config = AutoConfig.from_pretrained(shape)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    model.save_pretrained(folder)
    for file in shape.glob("*token*"):
        shutil.copy(file, folder / file.name)
    return folder


def _run_peer(
    cell: Cell, subject: Subject, tokens: Tokens, folder: Path, peers: Path
) -> dict[str, Any]:
    python = peers / "peers-a" / "bin" / "python"
    if not python.is_file():
        return {"error": "not installed: run `make bench-peers`"}
    pattern = MASKS[cell.shape].get("pattern")
    job = {"tool": PEERS[cell.method], "pattern": pattern, "model": str(subject.model.resolve())}
    job |= {"tokens": str(tokens.file.resolve()), "out": str(folder)}
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(python.absolute()), "-m", "benchmarks.prune_peers", json.dumps(job)],
        cwd=ROOT, env=kept | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return last_line(done.stdout + "\n" + done.stderr, done.returncode)


def damage(judge: Judge, folder: Path) -> dict[str, Any]:
    """Parameters and damage of a checkpoint; `documents`: lost cross-entropy by row."""
    model = load_model(folder, packed=False, dtype=torch.float32).model
    model.config.use_cache = False
    scores = score_tokens(judge.base, model, judge.tokens)
    found = summarize(scores, judge.tokens).as_json()
    lost = np.bincount(scores.row, weights=scores.loss - scores.base_loss)
    parameters = {id(p): p for p in model.parameters()}.values()
    return {
        "parameters": sum(p.numel() for p in parameters),
        "nonzero": sum(int(p.count_nonzero()) for p in parameters),
        "damage": math.log(found["perplexity_ratio"]),
        "base_perplexity": found["base_perplexity"],
        **{key: found[key] for key in SCORES},
        "documents": [round(float(x), 4) for x in lost / np.bincount(scores.row)],
    }


def _protocol(
    subject: Subject, samples: list[str], held_out: str, training: Training
) -> dict[str, Any]:
    return {
        "model": subject.name,
        "python": platform.python_version(),
        "calibration": [subject.calibration.name, *(digest[:16] for digest in samples)],
        "evaluation": [subject.evaluation.name, held_out[:16]],
        "training": {
            "text": training.text.name,
            "packing": training.packing,
            "tokens": training.tokens,
            "steps": training.steps,
            "rows of a step": training.batch_size,
            "tokens of a row": training.seq_len,
            "rate where little is lost": training.light_rate,
            "rate": training.rate,
            "rate from scratch": training.scratch_rate,
        },
    }


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    rows: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return rows


def _write(file: Path, protocol: dict[str, Any], cell: Cell, line: dict[str, Any]) -> None:
    row = {"shape": cell.shape, "method": cell.method, "seed": cell.seed, **line}
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        rows = {**_read(file), cell.label: row}
        lines = ",\n  ".join(f"{json.dumps(k)}: {json.dumps(rows[k])}" for k in sorted(rows))
        text = f'{{\n "protocol": {json.dumps(protocol)},\n "rows": {{\n  {lines}\n }}\n}}\n'
        file.write_text(text, encoding="utf-8")
