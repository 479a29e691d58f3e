"""Damage for each byte: KL divergence of our artifacts on models that others trained.

    python -m benchmarks quality --model DIR --calibration TEXT --evaluation TEXT --rows 128

Protocol: symmetric, group 32, all linears of the blocks, head and embeddings untouched; rows of 192
tokens for calibration and as many for evaluation, each row one document from its BOS. Every
figure is taken from the saved artifact, loaded again from disk. `mixed-3` may use as many bytes as
uniform 3 bits. Nothing is tuned on the evaluation text.
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

VARIANTS: dict[str, dict[str, Any]] = {
    "rtn-4": {"bits": 4, "method": "rtn"},
    "gptq-4": {"bits": 4, "asymmetric_target": False},
    "ours-4": {"bits": 4},
    "rtn-3": {"bits": 3, "method": "rtn"},
    "gptq-3": {"bits": 3, "asymmetric_target": False},
    "ours-3": {"bits": 3},
    "ours-2": {"bits": 2},
    "mixed-3": {
        "budget": {},
        "candidates": ["W2A16", "W3A16", "W4A16", "W5A16"],
        "scores": "swap_in_kl",
    },
}


def main(arguments: list[str]) -> None:
    """Run the variants and write one JSON object with a row for each."""
    options = _parse(arguments)
    rows: list[dict[str, Any]] = []
    chosen = options.variants or list(VARIANTS)
    for name in chosen:
        settings = dict(VARIANTS[name])
        if "budget" in settings:
            settings["budget"] = {"size": f"{_uniform_bytes(rows)}B"}
        rows.append({"variant": name, **_measure(settings, options)})
        options.out.parent.mkdir(parents=True, exist_ok=True)
        body = {"protocol": _protocol(options), "rows": rows}
        options.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks quality")
    parser.add_argument("--model", default="reference")
    parser.add_argument("--calibration", default="reference")
    parser.add_argument("--evaluation", default="reference-eval")
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--seq-len", type=int, default=192)
    parser.add_argument("--variants", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.json"))
    return parser.parse_args(arguments)


def _uniform_bytes(rows: list[dict[str, Any]]) -> int:
    """Weight bytes of the uniform 3-bit artifact of this run."""
    size: int = next(r for r in rows if r["variant"] == "ours-3")["weight_bytes"]
    return size


def _measure(settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        recipe = {
            "name": "quality",
            "model": {"path": options.model},
            "output": f"{folder}/out",
            "samples": 0,
            "stages": [
                {"kind": "calibrate", "data": _data(options.calibration, options)},
                {"kind": "quantize", "scheme": "W4A16", "group_size": options.group, **settings},
                {"kind": "pack", "kernels_archs": []},
                {"kind": "verify"},
                {"kind": "evaluate", "data": _data(options.evaluation, options)},
            ],
        }
        start = time.monotonic()
        result = run(parse_recipe(json.dumps(recipe), file="quality"), RunOptions())
        report = json.loads((result.output / "report.json").read_bytes())
        comparison = report["comparison"]
        return {
            "weight_bytes": result.summary["artifact_bytes"],
            "kl_mean": comparison["kl_mean"],
            "kl_mean_ci": comparison["kl_mean_ci"],
            "kl_p99": comparison["kl_p99"],
            "perplexity_ratio": comparison["perplexity_ratio"],
            "top1_agreement": comparison["top1_agreement"],
            "seconds": round(time.monotonic() - start, 1),
        }


def _data(source: str, options: argparse.Namespace) -> dict[str, Any]:
    return {"source": source, "num_samples": options.rows, "seq_len": options.seq_len}


def _protocol(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": Path(options.model).name,
        "calibration": Path(options.calibration).name,
        "evaluation": Path(options.evaluation).name,
        "rows": options.rows,
        "seq_len": options.seq_len,
        "group_size": options.group,
        "symmetric": True,
    }
