"""How the time of quantizing grows: with layers, with tokens, and on a block of a 1 B model.

    OMP_NUM_THREADS=2 python -m benchmarks growth [--peer PYTHON] [--out FILE]

Random Llamas (time does not depend on what they say). Seconds are those of the quantize stage;
every point is the median of `--repetitions` runs. With the interpreter of an environment that holds
llm-compressor, its GPTQ takes turns with ours on one block of a 1 B Llama (2048, 8192 wide).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compressor.reference_model import base_path, text_path

SMALL = {"hidden_size": 256, "intermediate_size": 704, "heads": 8, "kv_heads": 4}
BLOCK_1B = {"hidden_size": 2048, "intermediate_size": 8192, "heads": 32, "kv_heads": 8}
LAYERS, ROWS, LENGTH = (2, 4, 8, 16), (32, 64, 128, 256), 128


def main(arguments: list[str]) -> None:
    """Measure everything and write one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks growth")
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--block-rows", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/growth.json"))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        body: dict[str, Any] = {"threads": os.environ.get("OMP_NUM_THREADS", "")}
        times = options.repetitions
        body["repetitions"] = times
        body["layers"] = {n: _median(work, n, 64, times) for n in LAYERS}
        body["rows"] = {n: _median(work, 4, n, times) for n in ROWS}
        if options.peer is not None:
            body["block_1b"] = _block(work, options, times)
    options.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def _median(work: Path, layers: int, rows: int, times: int) -> float:
    model = _model(work / f"small-{layers}", SMALL, layers)
    return median(_ours(work, model, rows) for _ in range(times))


def _block(work: Path, options: argparse.Namespace, times: int) -> dict[str, Any]:
    """Ours and llm-compressor's GPTQ in turns on one block; the same number of tokens."""
    rows = options.block_rows
    model = _model(work / "block", BLOCK_1B, 1)
    tokens = torch.randint(6, 4096, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    torch.save(tokens, work / "tokens.pt")
    seconds: dict[str, list[float]] = {"ours-default": [], "llmc-gptq": []}
    for _ in range(times):
        seconds["ours-default"].append(_ours(work, model, rows))
        seconds["llmc-gptq"].append(_theirs(work, model, options.peer))
    ratio = median(seconds["llmc-gptq"]) / median(seconds["ours-default"])
    return {"rows": rows, "length": LENGTH, "seconds": seconds, "ratio": round(ratio, 2)}


def _model(path: Path, sizes: dict[str, int], layers: int) -> Path:
    """A random checkpoint with the reference model's tokenizer; made once."""
    if path.is_dir():
        return path
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        num_hidden_layers=layers,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base_path() / file, path / file)
    return path


def _ours(work: Path, model: Path, rows: int) -> float:
    """Seconds of our quantize stage at its defaults, in a process of its own."""
    data = {"source": str(text_path("calibration")), "num_samples": rows, "seq_len": LENGTH}
    recipe = {
        "name": "growth",
        "model": {"path": str(model)},
        "output": str(work / "out"),
        "samples": 0,
        "stages": [
            {"kind": "calibrate", "data": data | {"packing": "joined"}},
            {"kind": "quantize", "scheme": "W4A16", "group_size": 32, "engines": ["ours"]},
            {"kind": "pack", "kernels_archs": []},
        ],
    }
    (work / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-m", "compressor", "run", str(work / "recipe.yaml")]
    command += ["--overwrite", "--run-dir", str(run)]
    subprocess.run(command, check=True, capture_output=True)
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    done = [e for e in map(json.loads, lines) if e.get("event") == "stage finished"]
    return next(float(e["s"]) for e in done if e["stage"].endswith("-quantize"))


def _theirs(work: Path, model: Path, peer: Path) -> float:
    job = {"tool": "llmc-gptq", "model": str(model), "tokens": str(work / "tokens.pt")}
    job |= {"bits": 4, "group": 32, "symmetric": True, "out": str(work / "theirs")}
    driver = Path(__file__).with_name("peers.py")
    found = subprocess.run(
        [peer, driver, json.dumps(job)], check=True, capture_output=True, text=True
    )
    shutil.rmtree(work / "theirs")
    line: dict[str, float] = json.loads(found.stdout.strip().splitlines()[-1])
    return line["seconds"]
