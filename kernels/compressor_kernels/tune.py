"""Measure launch configurations for the layers of a model and write them into a table.

For every weight and bucket of M the configuration of the rule (`tuning.heuristic`) and its
neighbours are timed by graph replay over rotated copies (`graph_time.py`); the fastest goes into
the table with its time. The runtime reads the package's table and, over it, the user's own
(`tuning.user_table_path`); nothing is measured while serving.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compressor_kernels.graph_time import copies, graph_us
from compressor_kernels.layout import PlanarWeight, to_planar
from compressor_kernels.reference import num_groups
from compressor_kernels.tuning import FORMS, GemmSpec, KernelConfig, heuristic, table_key
from compressor_kernels.words import LAYOUTS

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
Measure = Callable[[GemmSpec, int, Sequence[KernelConfig]], list[float]]


def candidates(arch: str, spec: GemmSpec, rows: int) -> list[KernelConfig]:
    """The rule's configuration first, then its neighbours in split-K, stages, warps and form."""
    base = heuristic(arch, spec, rows)
    fused = base if base.form != "dense" else replace(base, form="element")
    forms = [form for form in FORMS if form != "dense" or rows >= 128]
    found = [base]
    for split in sorted({max(1, fused.split_k // 2), fused.split_k, min(16, fused.split_k * 2)}):
        found += [replace(fused, split_k=split, num_stages=stages) for stages in (2, 3, 4, 5)]
    found += [replace(fused, num_warps=warps) for warps in (2, 4, 8)]
    found += [replace(fused, form=form) for form in forms if _has(spec, form)]
    return list(dict.fromkeys(found))


def _has(spec: GemmSpec, form: str) -> bool:
    """`raw` exists for integers."""
    return form != "raw" or spec.kind.startswith("int")


def tune_layers(
    arch: str, specs: Sequence[GemmSpec], measure: Measure, *, buckets: Sequence[int] = BUCKETS
) -> dict[str, dict[str, Any]]:
    """Table entries of every weight and bucket: the fastest configuration, `us` beside it."""
    entries = {}
    for spec in specs:
        for rows in buckets:
            options = candidates(arch, spec, rows)
            times = measure(spec, rows, options)
            best = min(range(len(options)), key=lambda index: times[index])
            facts = {"us": round(times[best], 3), "rule_us": round(times[0], 3)}
            entries[table_key(arch, spec, rows)] = {"config": asdict(options[best])} | facts
    return entries


def measure_on_gpu(spec: GemmSpec, rows: int, options: Sequence[KernelConfig]) -> list[float]:
    """Microseconds of each configuration; one that does not fit the GPU counts as infinite."""
    from compressor_kernels.dequant_gemm import dequant_gemm

    device = torch.device("cuda")
    weights = random_weights(spec, device)
    x = torch.randn(rows, spec.shape[1], device=device, dtype=torch.bfloat16)
    times = []
    for config in options:
        calls = [partial(dequant_gemm, x, weight, config=config) for weight in weights]
        try:
            times.append(graph_us(calls))
        except (RuntimeError, torch.cuda.OutOfMemoryError):
            times.append(float("inf"))
    return times


def random_weights(spec: GemmSpec, device: torch.device) -> list[PlanarWeight]:
    """As many random weights as timing rotates over."""
    bits, size = (
        LAYOUTS[spec.kind].bits,
        (spec.shape[0], num_groups(spec.shape[1], spec.group_size)),
    )
    codes = torch.randint(0, (1 << bits) - 1, spec.shape, device=device).to(torch.uint8)
    if spec.kind == "e4m3":
        codes = torch.where((codes & 127) == 127, codes - 1, codes)  # no NaN
    scale = torch.rand(size, device=device).bfloat16()
    if spec.scale_kind != "float":
        scale = torch.randint(100, 120, size, device=device).to(torch.uint8)
    zeros = torch.randint(0, 1 << bits, size, device=device).to(torch.uint8)
    one = to_planar(codes, scale, zeros if spec.has_zeros else None, spec.group_size, spec.kind)
    if spec.scale_kind == "e5m3":
        one = replace(one, factor=torch.ones(1, device=device))
    rest = copies(one.nbytes) - 1
    return [one] + [replace(one, words=one.words.clone()) for _ in range(rest)]


def write_table(path: Path, entries: dict[str, dict[str, Any]], *, about: str) -> None:
    """Add entries to a table file, whole or not at all; entries of other keys stay."""
    known = json.loads(path.read_text(encoding="utf-8"))["configs"] if path.is_file() else {}
    table = {"about": about, "configs": dict(sorted((known | entries).items()))}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
