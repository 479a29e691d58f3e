"""Run our pipeline on one case in a process of its own, as `peers.py` does with other tools.

    python -m benchmarks.ours '{"model": DIR, "tokens": FILE.pt, "data": {...}, "settings": {...},
                                "out": DIR}'

`settings` are keys of the quantize stage, `data` those of the calibrate stage; the rows it reads
must be `tokens`, which all tools share. The last line on stdout is JSON: `seconds` of the quantize
stage (it reads the blocks from disk, and writes them); of the whole process, packing and verifying
included, `cpu_seconds` and `peak_mib`.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.peers import costs
from compressor.pipeline import RunOptions, run
from compressor.recipe import parse_recipe

SCALES = "float16"  # as other tools store them; the default is the checkpoint's dtype


def main() -> None:
    """Run the job given as the only argument; the artifact's files land in `out`."""
    logging.getLogger("compressor").setLevel(logging.ERROR)
    job: dict[str, Any] = json.loads(sys.argv[1])
    out = Path(job["out"])
    run_dir = out.with_name(out.name + ".run")
    shutil.rmtree(run_dir, ignore_errors=True)
    recipe = parse_recipe(json.dumps(recipe_of(job)), file="case")
    run(recipe, RunOptions(run_dir=run_dir, overwrite=True))
    check_tokens(run_dir, Path(job["tokens"]))
    line = {"seconds": round(stage_seconds(run_dir, "quantize"), 2), **costs()}
    shutil.rmtree(run_dir)
    sys.stdout.write("\n" + json.dumps(line) + "\n")


def recipe_of(job: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a job, as plain data."""
    return {
        "name": "case",
        "model": {"path": job["model"]},
        "output": job["out"],
        "samples": 0,
        "stages": [
            {"kind": "calibrate", "data": job["data"]},
            {"kind": "quantize", "scale_dtype": SCALES, **job["settings"]},
            {"kind": "pack", "kernels_archs": []},
            {"kind": "verify"},
        ],
    }


def check_tokens(run_dir: Path, shared: Path) -> None:
    """Stop if the run was calibrated on other rows than those of the other tools."""
    (unit,) = run_dir.glob("units/*-calibrate/tokens.safetensors")
    if not torch.equal(load_file(unit)["tokens"], torch.load(shared)):
        raise SystemExit("error: the calibrate stage read other rows than the shared token file")


def stage_seconds(run_dir: Path, kind: str) -> float:
    """How long a stage took, from the run's own log."""
    lines = (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    done = [e for e in events if e.get("event") == "stage finished"]
    return sum(float(e["s"]) for e in done if e["stage"].endswith(f"-{kind}"))


if __name__ == "__main__":
    main()
