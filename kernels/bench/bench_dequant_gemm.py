"""Bench of packed linears on a CPU; for GPUs see `bench_gpu.py`.

    python kernels/bench/bench_dequant_gemm.py --cpu --out cpu.json

Microseconds, best of the repeats of `--rounds` passes, one thread (`--threads`) pinned by
OMP_PROC_BIND.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_PROC_BIND", "true")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor_kernels import cpu
from compressor_kernels.dispatch import LinearSpec, plan_for
from compressor_kernels.reference import num_groups, pack_codes, pack_zero_point

Row = dict[str, Any]


CPU_SHAPES = ((2048, 2048), (256, 768))
CPU_ROWS = (1, 8, 64)
CPU_FORMATS = (
    (4, 128, True, torch.float32),
    (4, 128, False, torch.float32),
    (4, 128, True, torch.bfloat16),
    (8, -1, True, torch.float32),
    (8, -1, True, torch.bfloat16),
    (3, 128, True, torch.float32),
    (2, 64, True, torch.float32),
)


def best_us(call: Callable[[], object], repeats: int = 7) -> float:
    """Shortest of the repeats after one warm-up, microseconds."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return round(min(times) * 1e6, 1)


def checkpoint(spec: LinearSpec) -> dict[str, Tensor]:
    """Random tensors of a checkpoint layer."""
    groups = num_groups(spec.shape[1], spec.group_size)
    codes = torch.randint(0, 1 << spec.bits, spec.shape, dtype=torch.uint8)
    tensors = {
        "weight_packed": pack_codes(codes, spec.bits),
        "weight_scale": torch.rand(spec.shape[0], groups).bfloat16(),
        "weight_shape": torch.tensor(spec.shape),
    }
    if not spec.symmetric:
        zero = torch.randint(0, 1 << spec.bits, (spec.shape[0], groups), dtype=torch.uint8)
        tensors["weight_zero_point"] = pack_zero_point(zero, spec.bits)
    return tensors


def raw_ops(shape: tuple[int, int], rows: int) -> Row:
    """Dense products and torch's packed products in both activation dtypes, for the choice."""
    x, weight = torch.randn(rows, shape[1]), torch.randn(shape)
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    packed = cpu.pack_int4_op(codes, torch.rand(shape[0], shape[1] // 128))
    signed = codes.to(torch.int8)
    row: Row = {"float32 dense": best_us(lambda: F.linear(x, weight))}
    for dtype in (torch.bfloat16, torch.float32):
        if dtype == torch.float32 and rows > 8:
            continue  # a reference loop: half a second a call
        x_cast, name = x.to(dtype), str(dtype).removeprefix("torch.")
        pairs, factor = packed["scale"].to(dtype), torch.rand(shape[0]).to(dtype)
        row[f"int4 op, {name}"] = best_us(
            lambda x=x_cast, s=pairs: torch.ops.aten._weight_int4pack_mm_for_cpu(
                x, packed["words"], 128, s
            ),
            3,
        )
        row[f"int8 op, {name}"] = best_us(
            lambda x=x_cast, s=factor: torch._weight_int8pack_mm(x, signed, s), 3
        )
    if rows <= 8:
        x_half, half = x.bfloat16(), weight.bfloat16()
        row["bfloat16 dense"] = best_us(lambda: F.linear(x_half, half), 3)
    return row


def plan_rows(shape: tuple[int, int], rows: int) -> Row:
    """Every format of `CPU_FORMATS` through its plan."""
    row: Row = {}
    for bits, group, symmetric, dtype in CPU_FORMATS:
        plan = plan_for("cpu", LinearSpec(bits, group, symmetric, shape, dtype))
        resident = plan.prepare(checkpoint(plan.spec))
        x = torch.randn(rows, shape[1]).to(dtype)
        name = f"W{bits} g{group} {'sym' if symmetric else 'asym'} "
        name += f"{str(dtype).removeprefix('torch.')}: {plan.name}"
        row[name] = best_us(lambda p=plan, x=x, r=resident: p.apply(x, r))
    return row


def bench_cpu(out: Path, threads: int, rounds: int) -> None:
    """Dense products against the plans of `dispatch.py`; the least of the rounds."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    parts: dict[str, Row] = {}
    report = {"machine": cpu_machine(threads), "unit": "us", "rounds": rounds, "parts": parts}
    for _ in range(rounds):
        for shape in CPU_SHAPES:
            for rows in CPU_ROWS:
                kept = parts.setdefault(f"{shape[0]}x{shape[1]}/M{rows}", {})
                for name, value in (raw_ops(shape, rows) | plan_rows(shape, rows)).items():
                    kept[name] = min(value, kept.get(name, value))
        write(out, report)


def cpu_machine(threads: int) -> dict[str, Any]:
    """What the numbers belong to."""
    return {
        "processor": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "fast_bf16": cpu.has_fast_bf16(),
        "threads": threads,
        "torch": torch.__version__,
    }


def write(out: Path, report: dict[str, Any]) -> None:
    """Write whole or not at all."""
    part = out.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    part.replace(out)


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description="bench of dequant_gemm")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="CPU: passes over everything")
    options = parser.parse_args()
    if not options.cpu:
        raise SystemExit("use --cpu, or bench_gpu.py on a GPU")
    bench_cpu(options.out, options.threads, options.rounds)


if __name__ == "__main__":
    main()
