"""Everything about the GPU kernels in one call of at most eight minutes, resumable by part.

    python kernels/bench/bench_gpu.py --out build/gpu --wheels DIR
    TRITON_INTERPRET=1 python kernels/bench/bench_gpu.py --dry-run --out build/dry

Parts: correctness of every op against `reference.py` in float64; decoding of a random 8B-shaped
model at batch 1, 8, 32; attention at 4k .. 128k; layers of Llama-3 8B and 70B at M = 1 .. 4096
(ours, bf16, w4a8, w8a8, torch's int4 op, GemLite from a folder of wheels). Times are CUDA-graph
replays over rotated copies (`graph_time.py`). OUT/gpu.json is written after every part and a part
that is in it is not run again; the same call continues after the limit. OUT/gpu.md and
OUT/roofline.png follow from it. `--dry-run` runs every part at tiny shapes in Triton's
interpreter: it times nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from gpu_correctness import checks
from gpu_decode import decode_step
from gpu_report import write_report
from gpu_subjects import (
    FULL,
    PEERS,
    TINY,
    Call,
    Scale,
    dense_calls,
    install_wheels,
    packed_calls,
    w4a8_calls,
    w8a8_calls,
)

from compressor_kernels.graph_time import copies, graph_us
from compressor_kernels.kv_pool import KVPool, Pages
from compressor_kernels.paged_attention import paged_attention
from compressor_kernels.tuning import GemmSpec, device_arch

TIME_LIMIT_S = 480.0
Row = dict[str, Any]
Part = tuple[str, Callable[[], Row]]


def microseconds(calls: Sequence[Call] | None, scale: Scale) -> float | None:
    """Time of one call; in the dry run the calls are made and nothing is timed."""
    if calls is None:
        return None
    if scale.device == "cuda":
        return graph_us(calls)
    for call in calls:
        call()
    return None


def layer_row(shape: tuple[int, int], rows: int, scale: Scale) -> Row:
    """All ways of one layer at one number of rows."""
    x = torch.randn(rows, shape[1], device=scale.device, dtype=torch.bfloat16)
    calls, nbytes = packed_calls(GemmSpec("int4", 128, shape), x, scale)
    row: Row = {"shape": list(shape), "rows": rows, "weight_bytes": nbytes}
    row["ours"] = microseconds(calls, scale)
    del calls
    others = {"bf16": dense_calls, "w4a8": w4a8_calls, "w8a8": w8a8_calls, **PEERS}
    for name, make in others.items():
        try:
            row[name] = microseconds(make(shape, x, scale), scale)
        except (RuntimeError, TypeError, AttributeError) as error:  # a peer's own refusal
            row[name], row[f"{name} error"] = None, str(error)[:200]
    return row


def decode_row(batch: int, scale: Scale) -> Row:
    """Microseconds of one step, packed and dense."""
    row: Row = {"batch": batch}
    for name, packed in (("W4", True), ("bf16", False)):
        row[name] = microseconds([decode_step(scale, batch, packed=packed)], scale)
        if scale.device == "cuda":
            torch.cuda.empty_cache()
    return row


def attention_row(context: int, scale: Scale) -> Row:
    """Decode attention of one sequence over pools of every kind."""
    heads, kv_heads, size = scale.heads
    blocks = -(-context // 16)
    device = torch.device(scale.device)
    tables = torch.arange(blocks, device=device, dtype=torch.int32).view(1, -1)
    pages = Pages(tables, torch.tensor([context], device=device, dtype=torch.int32), 16)
    q = torch.randn(1, heads, size, device=device, dtype=torch.bfloat16)
    row: Row = {"context": context}
    for kind in (None, "e4m3", "int8", "int4"):
        one = KVPool.empty((blocks * 16, kv_heads, size), kind, dtype=q.dtype, device=device)
        count = copies(2 * one.nbytes) if scale.device == "cuda" else 1
        pools = [
            tuple(KVPool.empty((blocks * 16, kv_heads, size), kind, dtype=q.dtype, device=device)
                  for _ in range(2))
            for _ in range(count)
        ]  # fmt: skip
        splits = 64 if scale.device == "cuda" else 2
        attend = partial(paged_attention, q, scale=size**-0.5, splits=splits)
        calls = [partial(attend, pool, pages) for pool in pools]
        name = kind or "bf16"
        row[name], row[f"{name} bytes"] = microseconds(calls, scale), 2 * one.nbytes
    return row


def parts(scale: Scale) -> Iterator[Part]:
    """Every part's name and what computes it, correctness first, the long list last."""
    for name, check in checks(scale.device):
        yield f"correctness/{name}", check
    for batch in scale.batches:
        yield f"decode/{batch}", lambda batch=batch: decode_row(batch, scale)
    for context in scale.contexts:
        yield f"attention/{context}", lambda context=context: attention_row(context, scale)
    for model, layers in scale.models.items():
        for layer, shape in layers.items():
            for rows in scale.rows:
                name = f"layers/{model}/{layer}/{rows}"
                yield name, lambda shape=shape, rows=rows: layer_row(shape, rows, scale)


def machine(scale: Scale) -> Row:
    """What the numbers belong to."""
    import triton

    name = torch.cuda.get_device_name() if scale.device == "cuda" else "interpreter, dry run"
    arch = device_arch(torch.device(scale.device))
    return {"gpu": name, "arch": arch, "torch": torch.__version__, "triton": triton.__version__}


def run(out: Path, scale: Scale, *, limit_s: float, wheels: list[str]) -> Row:
    """Run what is not in OUT/gpu.json yet, until the limit; returns the report."""
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    file = out / "gpu.json"
    report: Row = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"parts": {}}
    report |= {"machine": machine(scale), "wheels": wheels, "command": " ".join(sys.argv)}
    for name, compute in parts(scale):
        if name in report["parts"]:
            continue
        if time.monotonic() - started > limit_s:
            break
        report["parts"][name] = compute()
        write_json(file, report)
        if scale.device == "cuda":
            torch.cuda.empty_cache()
    write_report(report, out)
    return report


def write_json(file: Path, report: Row) -> None:
    """Write whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description="bench of the GPU kernels")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json, .md and plot")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, interpreter, no times")
    parser.add_argument("--wheels", type=Path, help="folder with wheels of peers")
    parser.add_argument("--limit", type=float, default=TIME_LIMIT_S, help="seconds")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit(
            "no GPU here: --dry-run checks the bench, compressor_kernels.budget counts"
        )
    wheels = []
    if options.wheels is not None:
        wheels = install_wheels(options.wheels, options.out / "wheels")
    scale = TINY if options.dry_run else FULL
    report = run(options.out, scale, limit_s=options.limit, wheels=wheels)
    wrong = [n for n, row in report["parts"].items() if row.get("ok") is False]
    if wrong:
        raise SystemExit(f"wrong results: {', '.join(wrong)}; see {options.out / 'gpu.md'}")


if __name__ == "__main__":
    main()
