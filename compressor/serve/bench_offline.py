"""How fast does the engine itself go: prefill and decode without HTTP, in this process.

    prefill = prompt tokens of the batch / time until each request has its first token
    decode  = tokens after the first     / time they take

A step of decoding reads every weight once, so `weight_bytes` times steps per second is the
bandwidth that the model gets out of the memory.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from compressor.errors import UsageError
from compressor.modeling.packed_linear import PackedLinear
from compressor.serve.bench import BenchOptions
from compressor.serve.engine import LLMEngine
from compressor.serve.options import ServeOptions
from compressor.serve.packed_experts import resident_bytes
from compressor.serve.sequence import SamplingParams


def run_offline(
    path: Path, options: BenchOptions | None = None, *, serve: ServeOptions | None = None
) -> dict[str, Any]:
    """Load a folder and measure batches of `concurrency` requests, `num_requests` in all.

    Raises UsageError (SV33) for options that need a server, and what loading the folder raises.
    """
    from compressor.serve.server import open_engine

    options = options or BenchOptions()
    if options.request_rate is not None or options.api_key is not None:
        raise UsageError("arrivals and keys belong to a server, not to --offline", code="SV33")
    engine = open_engine(path, serve or ServeOptions())
    try:
        return {**measure_engine(engine, options), **facts(engine)}
    finally:
        engine.close()


def measure_engine(engine: LLMEngine, options: BenchOptions) -> dict[str, Any]:
    """Rates of the median batch."""
    rng = random.Random(options.seed)
    rounds = max(1, options.num_requests // options.concurrency)
    for _ in range(options.num_warmup):
        _batch(engine, options, rng)
    times = [_batch(engine, options, rng) for _ in range(rounds)]
    prefill, decode = (median(column) for column in zip(*times, strict=True))
    steps = options.output_tokens - 1
    return {
        "batch": options.concurrency,
        "rounds": rounds,
        "prompt_tokens": options.prompt_tokens,
        "output_tokens": options.output_tokens,
        "prefill_tokens_per_s": options.concurrency * options.prompt_tokens / prefill,
        "decode_tokens_per_s": options.concurrency * steps / decode if steps else None,
        "decode_steps_per_s": steps / decode if steps else None,
        "seconds": [{"prefill": p, "decode": d} for p, d in times],
    }


def _batch(engine: LLMEngine, options: BenchOptions, rng: random.Random) -> tuple[float, float]:
    """Seconds until all have a first token, and from there until all are done."""
    params = SamplingParams(max_tokens=options.output_tokens, temperature=0.0, ignore_eos=True)
    names = {f"bench-{i}" for i in range(options.concurrency)}
    for name in names:
        prompt = rng.choices(range(engine.vocab_size), k=options.prompt_tokens)
        engine.add_request(name, prompt, params)
    started, waiting, first = time.perf_counter(), set(names), 0.0
    while engine.has_work:
        waiting -= {delta.request_id for delta in engine.step() if delta.token_ids}
        first = first or (0.0 if waiting else time.perf_counter())
    return first - started, time.perf_counter() - first


def facts(engine: LLMEngine) -> dict[str, Any]:
    """What was measured: bytes that a step reads, kernels, threads."""
    modules = list(engine.runner.model.modules())
    packed = [m for m in modules if isinstance(m, PackedLinear)]
    dense = [m for m in modules if isinstance(m, nn.Linear)]
    stack = engine.runner.stack
    held = sum(m.resident_bytes for m in packed) + resident_bytes(engine.runner.model)
    return {
        "weight_bytes": held + sum(m.weight.nbytes for m in dense),
        "kernels": sorted({m.plan.name for m in packed} | ({"dense"} if dense else set())),
        "blocks": "transformers" if stack is None else "C",
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "notes": engine.notes,
    }
