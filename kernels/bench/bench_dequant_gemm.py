"""Bench of `dequant_gemm`: correctness first, then time, in one call of at most eight minutes.

    python kernels/bench/bench_dequant_gemm.py --out gpu.json             # on a GPU
    python kernels/bench/bench_dequant_gemm.py --cpu --out cpu.json       # packed linears on a CPU

GPU: each number is the median replay of a CUDA graph that holds one call on each of at least eight
weight copies (together four times the L2 cache), divided by the copies: no launch gaps, no cached
weights. Compared with torch.mm in bf16 and torch's own int4 product, timed the same way. The output
file is written after every layer, and a part that is already in it is not run again.

CPU: microseconds, best of the repeats of `--rounds` passes, one thread (`--threads`) pinned by
OMP_PROC_BIND.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
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
from compressor_kernels.layout import to_planar
from compressor_kernels.reference import dequantize, num_groups, pack_codes, pack_zero_point

LLAMA_3_8B = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BANDWIDTH = {"sm_90": 4.3e12, "sm_80": 1.9e12}  # measured copy rates; others get no roofline
TIME_LIMIT_S = 450.0
Row = dict[str, Any]


# ------------------------------------------------------------------ GPU


def check_correctness() -> list[Row]:
    """Relative error against float64 for every format, odd shapes and split-K included."""
    from compressor_kernels.dequant_gemm import dequant_gemm
    from compressor_kernels.tuning import KernelConfig

    rows = []
    for group in (32, 64, 128, -1):
        for symmetric in (True, False):
            for dtype in (torch.bfloat16, torch.float16):
                for m, n, k, split in ((1, 4096, 4096, 8), (17, 200, 300, 1), (70, 136, 1416, 4)):
                    torch.manual_seed(0)
                    codes = torch.randint(0, 16, (n, k), device="cuda").to(torch.uint8)
                    scale = (torch.rand(n, num_groups(k, group), device="cuda") + 0.5).to(dtype)
                    zero = None if symmetric else torch.randint_like(scale, 0, 16).to(torch.uint8)
                    x = torch.randn(m, k, device="cuda").to(dtype)
                    dense = dequantize(codes, scale.double(), 8.0 if zero is None else zero, group)
                    exact = x.double() @ dense.t()
                    weight = to_planar(codes, scale, zero, group)
                    block = next((size for size in (8, 16, 32, 64) if m <= size), 64)
                    config = KernelConfig(block, split, 4, 3)
                    y = dequant_gemm(x, weight, config=config, out_dtype=torch.float32)
                    error = float((y.double() - exact).norm() / exact.norm())
                    rows.append({"group": group, "symmetric": symmetric, "dtype": str(dtype),
                                 "shape": [m, n, k], "split_k": split, "relative_error": error,
                                 "ok": error < 1e-4})  # fmt: skip
    return rows


def graph_us(calls: list[Callable[[], object]]) -> float:
    """Median microseconds a call of a CUDA graph that makes all of them, 20 replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def candidates(arch: str, shape: tuple[int, int], rows: int) -> list[Any]:
    """The rule's configuration and its neighbours in split-K, stages and warps."""
    from compressor_kernels.tuning import KernelConfig, heuristic

    base = heuristic(arch, shape, rows)
    found = {base}
    for split in {max(1, base.split_k // 2), base.split_k, min(16, base.split_k * 2)}:
        for stages in (3, 4, 5):
            found.add(KernelConfig(base.block_m, split, base.num_warps, stages))
    return sorted(found, key=lambda config: (config != base, str(config)))


def time_layer(shape: tuple[int, int], rows: int, group: int, *, tune: bool) -> Row:
    """One layer at one number of rows: ours, bf16 torch.mm, torch's int4 product."""
    from compressor_kernels.dequant_gemm import dequant_gemm
    from compressor_kernels.tuning import device_arch, table_key

    n, k = shape
    arch = device_arch(torch.device("cuda"))
    copies = max(8, -(-240_000_000 // (n * k // 2)))
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    codes = torch.randint(0, 16, shape, device="cuda", dtype=torch.uint8)
    scale = torch.rand(n, num_groups(k, group), device="cuda").bfloat16()
    weights = [to_planar(codes, scale, None, group) for _ in range(copies)]
    timed = {
        config: graph_us([lambda w=w, c=config: dequant_gemm(x, w, config=c) for w in weights])
        for config in candidates(arch, shape, rows)[: None if tune else 1]
    }
    best = min(timed, key=lambda config: timed[config])
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    row: Row = {"shape": list(shape), "rows": rows, "group": group, "us": timed[best]}
    row["config"] = {name: getattr(best, name) for name in best.__slots__}
    row["key"] = table_key(arch, group, shape, rows)
    row["bf16_us"] = graph_us([lambda w=w: torch.mm(x, w.t()) for w in dense])
    row["int4_op_us"] = int4_op_us(x, codes, group) if group != -1 else None
    if arch in BANDWIDTH:
        row["fraction_of_bandwidth"] = weights[0].nbytes / BANDWIDTH[arch] / (row["us"] * 1e-6)
    return row


def int4_op_us(x: Tensor, codes: Tensor, group: int) -> float | None:
    """torch's own int4 product (tinygemm), None where this build refuses it."""
    n, k = codes.shape
    try:
        packed = ((codes[:, ::2] << 4) | codes[:, 1::2]).contiguous()
        words = torch.ops.aten._convert_weight_to_int4pack(packed, 8)
        pairs = torch.rand(k // group, n, 2, device="cuda").bfloat16()
        copies = [words.clone() for _ in range(max(8, -(-240_000_000 // (n * k // 2))))]
        product = torch.ops.aten._weight_int4pack_mm
        return graph_us([lambda w=w: product(x, w, group, pairs) for w in copies])
    except RuntimeError:
        return None


def bench_gpu(out: Path, *, tune: bool) -> None:
    """Correctness, then every layer, one part a layer; stops at the time limit."""
    started = time.monotonic()
    report = json.loads(out.read_text()) if out.exists() else {"parts": {}}
    report["machine"] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    if "correctness" not in report["parts"]:
        report["parts"]["correctness"] = check_correctness()
        write(out, report)
    if not all(row["ok"] for row in report["parts"]["correctness"]):
        raise SystemExit(f"wrong results, nothing timed: see {out}")
    for name, shape in LLAMA_3_8B.items():
        for rows in ROWS:
            part = f"{name}/{rows}"
            if part in report["parts"] or time.monotonic() - started > TIME_LIMIT_S:
                continue
            report["parts"][part] = time_layer(shape, rows, 128, tune=tune)
            write(out, report)
            torch.cuda.empty_cache()


# ------------------------------------------------------------------ CPU

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
    """Parse the options and run one of the two benches."""
    parser = argparse.ArgumentParser(description="bench of dequant_gemm")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--tune", action="store_true", help="try neighbours of the rule's config")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="CPU: passes over everything")
    options = parser.parse_args()
    if options.cpu:
        bench_cpu(options.out, options.threads, options.rounds)
    elif torch.cuda.is_available():
        bench_gpu(options.out, tune=options.tune)
    else:
        raise SystemExit("no GPU here: use --cpu, or compressor_kernels.aot for instruction counts")


if __name__ == "__main__":
    main()
