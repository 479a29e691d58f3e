"""How fast is a 4-bit Llama on this CPU: single linears, then whole models against llama.cpp.

    python -m benchmarks cpu [--threads N] [--llama-bench PATH --gguf-py FOLDER] [--inductor]

The process is pinned to as many cores as it has threads. Everything that is compared takes turns in
the same run; numbers are medians. Models have random weights and the shape of TinyLlama 1.1 B
(4.5 bits a weight everywhere, the head included). Writes results/cpu-<name>.json and .md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.cpu_linears import ROWS, SHAPES, measure, turns
from benchmarks.cpu_model import Shape, write_artifact, write_gguf
from compressor_kernels import native

log = logging.getLogger("benchmarks.cpu")
Row = dict[str, Any]


def main(arguments: list[str]) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each shape and row count")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each whole model")
    parser.add_argument("--inductor", action="store_true", help="also torch.compile in bf16")
    parser.add_argument("--only", choices=("linears", "model"))
    parser.add_argument("--model", type=Path, help="folder for the random model (kept)")
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's benchmark")
    parser.add_argument("--gguf-py", type=Path, help="llama.cpp's gguf-py folder")
    parser.add_argument("--dense", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--name", default=platform.machine())
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pin(options.threads)
    body: Row = {"machine": machine(options.threads)}
    if options.only != "model":
        body["linears"] = _linears(options)
    if options.only != "linears":
        body["model"] = _model(options)
    body["machine"]["load_after"] = os.getloadavg()
    file = options.results / f"cpu-{options.name}.json"
    if file.is_file():
        body = {**json.loads(file.read_text(encoding="utf-8")), **body}
    file.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(markdown(body), encoding="utf-8")


def pin(threads: int) -> None:
    """Stay on the last `threads` cores, with as many threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def machine(threads: int) -> Row:
    """What the numbers belong to."""
    names = (line for line in native.processor().splitlines() if line.startswith("model name"))
    return {
        "processor": next(names, platform.processor()).split(":")[-1].strip(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": native.reason(),
        "threads": threads,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "load_before": os.getloadavg(),
    }


def _linears(options: argparse.Namespace) -> list[Row]:
    rows = []
    for shape in SHAPES:
        for count in ROWS:
            rows.append(measure(shape, count, seconds=options.seconds, inductor=options.inductor))
            log.info("%s x %s done", shape, count)
    return rows


# ------------------------------------------------------------------ whole models


def _model(options: argparse.Namespace) -> Row:
    shape = Shape()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or Path(scratch) / "model"
        if not (folder / "config.json").is_file():
            write_artifact(shape, folder)
        gguf = _gguf(options, shape, folder)
        turns_of: dict[str, list[Row]] = {"ours": []}
        for _ in range(options.rounds):
            turns_of["ours"].append({**_ours(folder), **_bandwidth()})
            if gguf is not None:
                theirs = _llama_bench(options.llama_bench, gguf, options.threads)
                turns_of.setdefault("llama.cpp", []).append(theirs)
            for dtype in options.dense:
                turns_of.setdefault(f"transformers {dtype}", []).append(_dense(dtype, options))
            log.info("%s", {name: rows[-1] for name, rows in turns_of.items()})
    return {"read_bytes": shape.read_bytes, "turns": turns_of, "summary": _summary(turns_of, shape)}


def _gguf(options: argparse.Namespace, shape: Shape, folder: Path) -> Path | None:
    if options.llama_bench is None:
        return None
    sys.path.insert(0, str(options.gguf_py))
    file = folder / "q4_0.gguf"
    return file if file.is_file() else write_gguf(shape, file, importlib.import_module("gguf"))


def _ours(folder: Path) -> Row:
    """`compress bench --offline` in a process of its own: one sequence."""
    words = ["bench", str(folder), "--offline", "--json", "--concurrency", "1"]
    words += ["--num-requests", "2", "--prompt-tokens", "128", "--output-tokens", "17"]
    code = "import sys; from compressor.cli.app import main; sys.argv[0] = 'compress'; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    return {"prefill": found["prefill_tokens_per_s"], "decode": found["decode_tokens_per_s"]}


def _llama_bench(binary: Path, gguf: Path, threads: int) -> Row:
    words = ["-m", str(gguf), "-t", str(threads), "-p", "128", "-n", "16", "-r", "2", "-o", "json"]
    done = subprocess.run([str(binary), *words], capture_output=True, text=True, check=True)
    kinds = {"prefill" if row["n_prompt"] else "decode": row for row in json.loads(done.stdout)}
    return {kind: median(row["samples_ts"]) for kind, row in kinds.items()}


def _dense(dtype: str, options: argparse.Namespace) -> Row:
    words = ["-m", "benchmarks.cpu_dense", dtype, str(options.threads)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def _bandwidth() -> Row:
    """Read bandwidth in GB/s, the median and the best of some sums over half a GB."""
    data = torch.ones(1 << 27)
    times = turns({"read": [lambda: data.sum()]}, 1.0)["read"]
    return {
        f"read{k}": data.nbytes / t / 1e9 for k, t in (("", median(times)), ("_best", min(times)))
    }


def _bytes(name: str, shape: Shape) -> float:
    """Of the weights that one token reads."""
    bits = {"transformers bfloat16": 16, "transformers float32": 32}.get(name, 4.5)
    return shape.read_bytes * bits / 4.5


def _summary(turns_of: dict[str, list[Row]], shape: Shape) -> Row:
    found: Row = {}
    for name, rows in turns_of.items():
        decode = median(row["decode"] for row in rows)
        found[name] = {"decode": decode, "gb_per_s": decode * _bytes(name, shape) / 1e9}
        if "prefill" in rows[0]:
            found[name]["prefill"] = median(row["prefill"] for row in rows)
    for kind in ("read", "read_best"):
        found[f"{kind}_gb_per_s"] = median(row[kind] for row in turns_of["ours"])
    if "llama.cpp" in found:
        pairs = list(zip(turns_of["ours"], turns_of["llama.cpp"], strict=True))
        for kind in ("prefill", "decode"):
            found[f"{kind}_ratio"] = median(ours[kind] / theirs[kind] for ours, theirs in pairs)
    return found


# ------------------------------------------------------------------ tables


def markdown(body: Row) -> str:
    """The results as a page."""
    facts = body["machine"]
    parts = [
        "# Speed on a CPU\n",
        "Written by `python -m benchmarks cpu`; do not edit. "
        f"{facts['processor']}, {facts['capability']}, {facts['threads']} pinned thread(s) of "
        f"{facts['cores']} cores, torch {facts['torch']}, kernels {facts['kernels']}; load average "
        f"{facts['load_before'][0]:.1f} before and {facts['load_after'][0]:.1f} after.\n",
    ]
    if "model" in body:
        parts.append(_model_table(body["model"]["summary"]))
    if "linears" in body:
        parts.append(_linear_tables(body["linears"]))
    return "\n".join(parts)


def _model_table(summary: Row) -> str:
    lines = [
        "## Llama 1.1 B, 4.5 bits a weight, one sequence of 128 + 16 tokens\n",
        "| | prefill tok/s | decode tok/s | weights GB/s |\n|---|---:|---:|---:|",
    ]
    for name in ("ours", "llama.cpp", "transformers bfloat16", "transformers float32"):
        if name in summary:
            row = summary[name]
            prefill = f"{row['prefill']:.1f}" if "prefill" in row else ""
            lines.append(f"| {name} | {prefill} | {row['decode']:.1f} | {row['gb_per_s']:.1f} |")
    lines.append(f"| reading alone, median | | | {summary['read_gb_per_s']:.1f} |")
    lines.append(f"| reading alone, best | | | {summary['read_best_gb_per_s']:.1f} |")
    if "decode_ratio" in summary:
        lines.append(
            f"\nOurs / llama.cpp, median of the turns: prefill {summary['prefill_ratio']:.2f}, "
            f"decode {summary['decode_ratio']:.2f}."
        )
    return "\n".join([*lines, ""])


def _linear_tables(rows: list[Row]) -> str:
    parts = [
        "## Linears\n",
        "Microseconds; in brackets the speed-up over fp32, and for one row GB/s of weight bytes. "
        "W4, W8 and W2 have groups of 32; `int8` rounds activations. On AVX2 torch "
        "emulates bf16. `read` sums 8 MB in torch.\n",
        _summary_table(rows),
    ]
    for shape in sorted({tuple(row["shape"]) for row in rows}):
        same = [row for row in rows if tuple(row["shape"]) == shape]
        names = list(dict.fromkeys(name for row in same for name in row["ways"]))
        head = "".join(f" M={row['rows']} |" for row in same)
        parts.append(f"### {shape[0]} x {shape[1]}\n\n| |{head}\n|---|{'---:|' * len(same)}")
        parts += [
            f"| {name} |" + "".join(f" {_cell(row, name)} |" for row in same) for name in names
        ]
        parts.append("")
    return "\n".join(parts)


def _summary_table(rows: list[Row]) -> str:
    """W4 with rounded activations against what issue 4 compares it with."""
    counts = sorted({row["rows"] for row in rows})
    lines = ["| W4 int8 | " + " | ".join(f"M={c}" for c in counts) + " |"]
    lines.append("|---|" + "---:|" * len(counts))
    for shape in sorted({tuple(row["shape"]) for row in rows}):
        ways = [row["ways"] for row in rows if tuple(row["shape"]) == shape]
        cells = " | ".join(f"{w['bf16']['us'] / w['W4 int8']['us']:.1f}x" for w in ways)
        lines.append(f"| {shape[0]} x {shape[1]}, over bf16 | {cells} |")
        share = ways[0]["W4 int8"]["gb_per_s"] / ways[0]["read"]["gb_per_s"]
        lines.append(f"| its share of the read bandwidth | {share:.0%} |" + " |" * (len(ways) - 1))
    return "\n".join([*lines, ""])


def _cell(row: Row, name: str) -> str:
    way = row["ways"].get(name)
    if way is None:
        return ""
    if name == "read":
        return f"{way['gb_per_s']:.1f} GB/s"
    speed = row["ways"]["fp32"]["us"] / way["us"]
    rate = f", {way['gb_per_s']:.1f} GB/s" if row["rows"] == 1 else ""
    return f"{way['us']:.0f} ({speed:.2f}x{rate})"
