"""One linear of a 1 B Llama in every way that this machine has, taking turns.

Without instructions for bf16 torch emulates it: compare with `fp32` there, too.

Copies of each weight are rotated (at least `ROTATED` bytes), so that no cache holds them. `read` is
the sum of as many bytes of a dense tensor: the read bandwidth under the same conditions. One thread
is timed by its own clock, which stands still while other processes have the core.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from statistics import median
from typing import Any

import torch
from torch import Tensor

from compressor_kernels import cpu
from compressor_kernels.dispatch import LinearSpec, plan_for
from compressor_kernels.reference import num_groups

SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632))  # (out, in)
ROWS = (1, 8, 64, 512)
ROTATED = 160_000_000
GROUP = 32
Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to compute: bytes of one weight, and the product with each copy."""

    nbytes: int
    calls: list[Call]


def measure(shape: tuple[int, int], rows: int, *, seconds: float, inductor: bool) -> dict[str, Any]:
    """Microseconds (median and best tenth), GB/s and GFLOP/s of every way."""
    out_features, columns = shape
    found = candidates(shape, rows, inductor=inductor)
    times = turns({name: c.calls for name, c in found.items()}, seconds)
    ways = {}
    for name, values in times.items():
        middle = median(values)
        flops = 2 * rows * out_features * columns / middle / 1e9
        ways[name] = {
            "us": middle * 1e6,
            "us_best_tenth": sorted(values)[len(values) // 10] * 1e6,
            "gb_per_s": found[name].nbytes / middle / 1e9,
            "gflops": 0.0 if name == "read" else flops,
            "calls": len(values),
        }
    return {"shape": list(shape), "rows": rows, "ways": ways}


def turns(calls: dict[str, list[Call]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call; all take turns for at least `seconds` and three rounds."""
    for own in calls.values():
        own[0]()
    times: dict[str, list[float]] = {name: [] for name in calls}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    end = time.perf_counter() + seconds
    for turn in count():
        if turn >= 3 and time.perf_counter() > end:
            return times
        for name, own in calls.items():
            started = clock()
            own[turn % len(own)]()
            times[name].append(clock() - started)
    raise AssertionError("unreachable")


def candidates(shape: tuple[int, int], rows: int, *, inductor: bool) -> dict[str, Candidate]:
    """Everything that can compute this product here."""
    x = torch.randn(rows, shape[1])
    half = x.bfloat16()
    found = {"read": _read(), "fp32": _dense(shape, x)}
    found["bf16"] = _dense(shape, half)
    if inductor:
        found["bf16 inductor"] = _compiled(shape, half)
    if cpu.int4_op_takes(GROUP, shape):
        found["torch int4"] = _torch_int4(shape, half)
    found["torch int8"] = _torch_int8(shape, half)
    for bits in (4, 8, 2):
        found[f"W{bits}"] = _ours(bits, shape, x, rounds=False)
        found[f"W{bits} int8"] = _ours(bits, shape, x, rounds=True)
    return found


def _copies(nbytes: int) -> int:
    return max(2, -(-ROTATED // nbytes))


def _read() -> Candidate:
    size = 8 << 20
    data = torch.ones(_copies(size), size // 4)
    return Candidate(size, [lambda row=row: row.sum() for row in data])


def _dense(shape: tuple[int, int], x: Tensor) -> Candidate:
    size = shape[0] * shape[1] * x.itemsize
    weights = [torch.randn(shape).to(x.dtype) for _ in range(_copies(size))]
    return Candidate(size, [lambda w=w: torch.nn.functional.linear(x, w) for w in weights])


def _compiled(shape: tuple[int, int], x: Tensor) -> Candidate:
    """Inductor with weights frozen into oneDNN's packed form."""
    import torch._inductor.config as config

    config.freezing = True
    torch.compiler.reset()  # or the ninth shape is no longer compiled
    calls: list[Call] = []
    for _ in range(2):
        linear = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=x.dtype).eval()
        compiled = torch.compile(linear)
        calls.append(torch.no_grad()(lambda f=compiled: f(x)))
    for call in calls:
        call()
    return Candidate(shape[0] * shape[1] * x.itemsize, calls)


def _torch_int4(shape: tuple[int, int], x: Tensor) -> Candidate:
    size = shape[0] * shape[1] // 2
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    packed = cpu.pack_int4_op(codes, torch.full((shape[0], shape[1] // GROUP), 0.003))
    copies = [{n: t.clone() for n, t in packed.items()} for _ in range(_copies(size))]
    op = torch.ops.aten._weight_int4pack_mm_for_cpu
    nbytes = sum(t.nbytes for t in packed.values())
    return Candidate(nbytes, [lambda c=c: op(x, c["words"], GROUP, c["scale"]) for c in copies])


def _torch_int8(shape: tuple[int, int], x: Tensor) -> Candidate:
    size = shape[0] * shape[1]
    scale = torch.full((shape[0],), 0.003, dtype=torch.bfloat16)
    copies = [torch.randint(-128, 128, shape, dtype=torch.int8) for _ in range(_copies(size))]
    op = torch._weight_int8pack_mm
    return Candidate(size, [lambda w=w: op(x, w, scale) for w in copies])


def _ours(bits: int, shape: tuple[int, int], x: Tensor, *, rounds: bool) -> Candidate:
    plan = plan_for("cpu", LinearSpec(bits, GROUP, True, shape, torch.float32, rounds=rounds))
    words = torch.randint(-(2**31), 2**31, (shape[0], shape[1] * bits // 32)).to(torch.int32)
    groups = num_groups(shape[1], GROUP)
    resident = plan.prepare(
        {
            "weight_packed": words,
            "weight_scale": torch.full((shape[0], groups), 0.003, dtype=torch.float16),
            "weight_shape": torch.tensor(shape),
        }
    )
    nbytes = plan.resident_bytes(resident)
    copies = [{n: t.clone() for n, t in resident.items()} for _ in range(_copies(nbytes))]
    products = [plan.bind(copy) for copy in copies]
    return Candidate(nbytes, [lambda p=p: p(x) for p in products])
