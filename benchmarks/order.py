"""Which order of stages gives less damage for each byte?

    python -m benchmarks order --model DIR --calibration TEXT --evaluation TEXT [--out FILE]

The same parts in different orders: 4-bit quantization, 30 % unstructured sparsity, distillation
of a fixed number of tokens; and, at a comparable size, a narrower network and plain 3 bits. Zeros
of an unstructured mask save no bytes in the stored format: the rows say what they cost.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from compressor.pipeline import RunOptions, run
from compressor.recipe import parse_recipe

QUANTIZE_4: dict[str, Any] = {"kind": "quantize", "scheme": "W4A16", "group_size": 32}
QUANTIZE_3: dict[str, Any] = {"kind": "quantize", "scheme": "W3A16", "group_size": 32}
PRUNE: dict[str, Any] = {"kind": "prune", "method": "sparsegpt", "sparsity": 0.3}
NARROW: dict[str, Any] = {"kind": "prune", "width": {"mlp": 0.75}}
DISTILL_SCALES: dict[str, Any] = {"kind": "distill", "learning_rate": 0.0005}
DISTILL_WEIGHTS: dict[str, Any] = {"kind": "distill", "learning_rate": 0.0003}

ORDERS: dict[str, list[dict[str, Any]]] = {
    "quantize 4": [QUANTIZE_4],
    "quantize 4 > distill": [QUANTIZE_4, DISTILL_SCALES],
    "quantize 4 > prune 30 % > distill": [QUANTIZE_4, PRUNE, DISTILL_SCALES],
    "prune 30 % > distill > quantize 4": [PRUNE, DISTILL_WEIGHTS, QUANTIZE_4],
    "MLP width 75 % > distill > quantize 4": [NARROW, DISTILL_WEIGHTS, QUANTIZE_4],
    "quantize 3": [QUANTIZE_3],
    "quantize 3 > distill": [QUANTIZE_3, DISTILL_SCALES],
}


def main(arguments: list[str]) -> None:
    """Run every order and write one JSON object with a row for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks order")
    parser.add_argument("--model", default="reference")
    parser.add_argument("--calibration", default="reference")
    parser.add_argument("--evaluation", default="reference-eval")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--seq-len", type=int, default=192)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/order.json"))
    options = parser.parse_args(arguments)
    rows = []
    for name, middle in ORDERS.items():
        rows.append({"order": name, **_measure(middle, options)})
        options.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {k: str(v) for k, v in vars(options).items() if k != "out"}
        settings["model"] = Path(options.model).name
        settings |= {k: Path(settings[k]).name for k in ("calibration", "evaluation")}
        text = json.dumps({"settings": settings, "rows": rows}, indent=1)
        options.out.write_text(text + "\n", encoding="utf-8")


def _measure(middle: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    calibration = _data(options.calibration, options)
    stages: list[dict[str, Any]] = [{"kind": "calibrate", "data": calibration}]
    for stage in middle:
        extra = {"steps": options.steps, "data": calibration} if stage["kind"] == "distill" else {}
        stages.append({**stage, **extra})
    stages += [{"kind": "pack", "kernels_archs": []}, {"kind": "verify"}]
    stages.append({"kind": "evaluate", "data": _data(options.evaluation, options)})
    with tempfile.TemporaryDirectory() as folder:
        recipe = {
            "name": "order",
            "model": {"path": options.model},
            "output": f"{folder}/out",
            "samples": 0,
            "stages": stages,
        }
        start = time.monotonic()
        result = run(parse_recipe(json.dumps(recipe), file="order"), RunOptions())
    keys = ("artifact_bytes", "kl_mean", "kl_p99", "perplexity_ratio", "top1_agreement")
    row = {key: result.summary[key] for key in keys}
    return row | {"seconds": round(time.monotonic() - start, 1)}


def _data(source: str, options: argparse.Namespace) -> dict[str, Any]:
    return {"source": source, "num_samples": options.rows, "seq_len": options.seq_len}
