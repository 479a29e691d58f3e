"""One budget for blocks, widths and bits, against the same budget with bits alone.

    python -m benchmarks prune_budget --models babyllama-tok361 [--sizes 3 2.5 2] [--steps 60]

A size of b bits is that of the uniform model in b bits, groups of 32 (2.5: half way). At each size

    bits               a quantize stage with that budget
    shape              a prune stage with that target, then the same quantize stage
    ..., distilled     and a distill stage behind the bits, of scales and norms

see the same calibration rows; `prune_distill` has the text of the training. KL and lost cross-
entropy (damage) are those of held-out rows that nothing was chosen on. Finished cells are kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks.prune_distill import damage, training_of
from benchmarks.scoring import Judge
from benchmarks.subjects import Subject, Tokens, calibration, evaluation, subjects
from compressor.modeling.checkpoint import open_checkpoint
from compressor.modeling.state import ModelState
from compressor.pipeline import RunOptions, run
from compressor.plan import weight_bytes
from compressor.recipe import parse_recipe

Stage = dict[str, Any]
METHODS = ("bits", "shape", "bits, distilled", "shape, distilled")
FORMATS: Stage = {"candidates": ["W2A16", "W3A16", "W4A16", "W8A16"], "group_size": 32}
SHAPES: Stage = {"mlp": [0.875, 0.75, 0.5], "kv_groups": [0.5], "max_dropped": 0.5}
RATE = 2e-4
HEADER = (
    "| model | size | method | bytes | shape | KL | damage |\n|---|---|---|---:|---|---:|---:|\n"
)
log = logging.getLogger("benchmarks.prune_budget")


def main(arguments: list[str]) -> None:
    """Run the cells that are missing, then write the table."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    known = ("babyllama-tok361", "reference")
    parser = argparse.ArgumentParser(prog="python -m benchmarks prune_budget")
    parser.add_argument("--models", nargs="*", default=list(known), choices=known)
    parser.add_argument("--sizes", nargs="+", type=float, default=[3.0, 2.5, 2.0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--work", type=Path, default=Path("build/prune-budget"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    file = options.out / "shape-budget.json"
    for name in options.models:
        _run_subject(subjects(options.shared)[name], options, file)
    _write_table(json.loads(file.read_text("utf-8")), options.out / "shape-budget.md")


def _run_subject(subject: Subject, options: argparse.Namespace, file: Path) -> None:
    work = options.work.absolute()
    tokens = calibration(subject, 0, work=work)
    judge = Judge.of(subject.model, evaluation(subject, work=work).file)
    for size in options.sizes:
        for method in options.methods:
            label = f"{subject.name}, {size:g} bits, {method}"
            rows = json.loads(file.read_text("utf-8")) if file.is_file() else {}
            if label in rows:
                continue
            folder = work / subject.name / f"{size:g}-{METHODS.index(method)}"
            stages = _stages(subject, method, bytes_of(subject, size), options)
            start = time.process_time()
            row = _made(subject, tokens, stages, folder) | damage(judge, folder)
            row |= {"model": subject.name, "size": size, "method": method}
            row["seconds"] = round(time.process_time() - start, 1)
            del row["documents"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(rows | {label: row}, indent=1) + "\n", encoding="utf-8")
            log.info("%s: KL %.4f, %s", label, row["kl_mean"], row["shape"])


def bytes_of(subject: Subject, bits: float) -> int:
    """Bytes of the uniform model; between two widths, of a mixture by share."""
    state = ModelState.of_checkpoint(open_checkpoint(subject.model))
    low = math.floor(bits)
    sizes = []
    for width in (low, low + 1):
        uniform = {"kind": "quantize", "scheme": f"W{width}A16", "group_size": 32, "method": "rtn"}
        stages = [uniform, {"kind": "pack", "kernels_archs": []}]
        recipe = {"name": "size", "model": {"path": str(subject.model)}, "output": "none"}
        sizes.append(weight_bytes(parse_recipe(json.dumps(recipe | {"stages": stages})), state)[0])
    return round(sizes[0] + (bits - low) * (sizes[1] - sizes[0]))


def _stages(subject: Subject, method: str, size: int, options: argparse.Namespace) -> list[Stage]:
    limit = {"size": f"{size}B"}
    bits = [{"kind": "quantize", "budget": limit, "ignore": ["lm_head"], **FORMATS}]
    shape = [{"kind": "prune", "target": limit | FORMATS | SHAPES}]
    training = training_of(subject, options.work / subject.name)
    rows = {"num_samples": 16 * options.steps, "seq_len": 192, "min_fraction": 0.01}
    teach: Stage = {"kind": "distill", "steps": options.steps, "batch_size": 16}
    teach |= {"data": {"source": str(training.text), "packing": training.packing, **rows}}
    teach |= {"checkpoint_steps": max(1, options.steps // 6)}
    teach |= {"train": "scales_and_norms", "learning_rate": RATE}
    parts = [*(shape if method.startswith("shape") else []), *bits]
    return [*parts, teach] if method.endswith("distilled") else parts


def _made(subject: Subject, tokens: Tokens, stages: list[Stage], folder: Path) -> dict[str, Any]:
    """Run the recipe of a cell: shape, average bits and bytes of what it made."""
    parts = [{"kind": "calibrate", "data": tokens.data}, *stages]
    parts += [{"kind": "pack", "kernels_archs": []}, {"kind": "verify"}]
    recipe = {"name": "cell", "model": {"path": str(subject.model)}, "output": str(folder)}
    run_dir = folder.with_name(folder.name + ".run")
    shutil.rmtree(folder, ignore_errors=True)
    text = json.dumps(recipe | {"samples": 0, "stages": parts})
    run(parse_recipe(text, file="cell"), RunOptions(run_dir=run_dir))
    chosen, alone = "whole", None
    for line in (run_dir / "journal.jsonl").read_text("utf-8").splitlines():
        facts = json.loads(line).get("meta", {}).get("facts", {})
        chosen, alone = facts.get("chosen", chosen), facts.get("bits_alone_kl", alone)
    shutil.rmtree(run_dir)
    held = open_checkpoint(folder).tensors.values()
    return {"bytes": sum(info.nbytes for info in held), "shape": chosen, "bits_alone_kl": alone}


def _write_table(rows: dict[str, Any], file: Path) -> None:
    lines = [
        f"| {r['model']} | {r['size']:g} bits | {r['method']} | {r['bytes']:,} | {r['shape']} | "
        f"{r['kl_mean']:.4f} | {r['damage']:.4f} |"
        for r in rows.values()
    ]
    head = "# Blocks, widths and bits for one budget\n\n"
    head += "Written by `python -m benchmarks prune_budget`; do not edit.\n\n"
    file.write_text(head + HEADER + "\n".join(lines) + "\n", encoding="utf-8")
