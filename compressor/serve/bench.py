"""How fast is a server, as its users see it: latencies, throughput, goodput.

    TTFT = first token - request sent          ITL = time between two chunks
    TPOT = (last token - first token) / (tokens - 1)      E2EL = last token - request sent
    goodput = requests per second that meet every limit of the service level

Requests have fixed lengths (`ignore_eos`), random but repeatable prompts, and arrive either as soon
as one of `concurrency` workers is free, or as a Poisson process of `request_rate` per second.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from compressor.errors import CompressError, ResourceError, UsageError
from compressor.serve.client import Client
from compressor.serve.options import ServeOptions

_TEXT = "The quick brown fox jumps over the lazy dog; 0123456789 numbers and (some) code = x + y."


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to send, and what counts as good.

    Attributes:
        num_requests: requests measured (`num_warmup` more go before).
        concurrency: requests at once (with `request_rate`: at most).
        request_rate: arrivals per second; None sends as fast as workers are free.
        prompt_tokens, output_tokens: lengths of every request.
        max_ttft_ms, max_tpot_ms: the service level; None is no limit.
        seed: of prompts and arrivals.
    """

    num_requests: int = 32
    num_warmup: int = 1
    concurrency: int = 8
    request_rate: float | None = None
    prompt_tokens: int = 128
    output_tokens: int = 64
    max_ttft_ms: float | None = None
    max_tpot_ms: float | None = None
    seed: int = 0
    api_key: str | None = None

    def __post_init__(self) -> None:
        counts = (self.num_requests, self.concurrency, self.prompt_tokens, self.output_tokens)
        if min(counts) < 1 or self.num_warmup < 0:
            raise UsageError("counts and lengths of a benchmark must be at least 1", code="SV33")
        if self.request_rate is not None and not self.request_rate > 0:
            raise UsageError("request_rate must be above 0", code="SV33")


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: times in milliseconds, or why it failed."""

    ttft_ms: float = math.nan
    tpot_ms: float = math.nan
    e2el_ms: float = math.nan
    itl_ms: tuple[float, ...] = ()
    num_tokens: int = 0
    error: str = ""


def run_bench(
    target: str | Path, options: BenchOptions | None = None, *, serve: ServeOptions | None = None
) -> dict[str, Any]:
    """Measure a server (a URL), or serve a folder in a process of its own and measure that.

    Raises UsageError, ResourceError, and what serving the folder raises.
    """
    options = options or BenchOptions()
    if str(target).startswith(("http://", "https://")):
        return measure(Client.from_url(str(target), options.api_key), options)
    own = replace(serve or ServeOptions(), host="127.0.0.1", port=0, api_key=options.api_key)
    with served(Path(target), own) as port:
        return measure(Client("127.0.0.1", port, options.api_key), options)


def measure(client: Client, options: BenchOptions) -> dict[str, Any]:
    """Send the requests and sum up."""
    card = client.get("/v1/models")["data"][0]
    limit = card.get("max_model_len")
    asked = options.prompt_tokens + options.output_tokens
    if limit is not None and asked > limit:
        raise UsageError(f"{asked} tokens per request, the model holds {limit}", code="SV09")
    ids = client.post("/tokenize", {"prompt": _TEXT, "add_special_tokens": False})["tokens"]
    rng = random.Random(options.seed)
    prompts = [
        rng.choices(ids, k=options.prompt_tokens)
        for _ in range(options.num_warmup + options.num_requests)
    ]
    body = {"model": card["id"], "max_tokens": options.output_tokens}
    for prompt in prompts[: options.num_warmup]:
        _send(client, {**body, "prompt": prompt})
    started = time.monotonic()
    bodies = [{**body, "prompt": p} for p in prompts[options.num_warmup :]]
    samples = _send_all(client, bodies, options)
    return summary(samples, time.monotonic() - started, options)


def _send_all(client: Client, bodies: list[dict[str, Any]], options: BenchOptions) -> list[Sample]:
    rng = random.Random(options.seed + 1)
    with ThreadPoolExecutor(options.concurrency) as pool:
        futures = []
        for body in bodies:
            if options.request_rate is not None:
                time.sleep(rng.expovariate(options.request_rate))
            futures.append(pool.submit(_send, client, body))
        return [f.result() for f in futures]


def _send(client: Client, body: dict[str, Any]) -> Sample:
    """One streamed request, timed."""
    fixed = {"temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}
    started, arrivals, num_tokens = time.monotonic(), [], 0
    try:
        for arrival, event in client.stream("/v1/completions", {**body, **fixed}):
            if "error" in event:
                return Sample(error=str(event["error"].get("message")))
            if event.get("choices"):
                arrivals.append(arrival)
            elif event.get("usage"):
                num_tokens = event["usage"]["completion_tokens"]
    except (CompressError, OSError, ValueError) as error:
        return Sample(error=getattr(error, "message", str(error)))
    if not arrivals:
        return Sample(error="the stream held no token")
    gaps = tuple((b - a) * 1e3 for a, b in itertools.pairwise(arrivals))
    num_tokens = num_tokens or len(arrivals)
    span = (arrivals[-1] - arrivals[0]) * 1e3
    return Sample(
        ttft_ms=(arrivals[0] - started) * 1e3,
        tpot_ms=span / (num_tokens - 1) if num_tokens > 1 else 0.0,
        e2el_ms=(arrivals[-1] - started) * 1e3,
        itl_ms=gaps,
        num_tokens=num_tokens,
    )


def summary(samples: list[Sample], duration_s: float, options: BenchOptions) -> dict[str, Any]:
    """Percentiles and rates of the samples; failed ones count as not good."""
    good = [s for s in samples if not s.error]
    errors = [s.error for s in samples if s.error]
    produced = sum(s.num_tokens for s in good)
    return {
        "num_requests": len(samples),
        "num_failed": len(errors),
        "first_error": errors[0][:500] if errors else None,
        "duration_s": duration_s,
        "request_throughput": len(good) / duration_s,
        "output_tokens_per_s": produced / duration_s,
        "total_tokens_per_s": (produced + options.prompt_tokens * len(good)) / duration_s,
        "goodput": sum(_meets(s, options) for s in good) / duration_s,
        "ttft_ms": spread([s.ttft_ms for s in good]),
        "tpot_ms": spread([s.tpot_ms for s in good if s.num_tokens > 1]),
        "itl_ms": spread([gap for s in good for gap in s.itl_ms]),
        "e2el_ms": spread([s.e2el_ms for s in good]),
        "definitions": {"tpot_ms": "(last token - first token) / (tokens - 1)"},
    }


def _meets(sample: Sample, options: BenchOptions) -> bool:
    limits = ((sample.ttft_ms, options.max_ttft_ms), (sample.tpot_ms, options.max_tpot_ms))
    return all(limit is None or value <= limit for value, limit in limits)


def spread(values: list[float]) -> dict[str, float] | None:
    """Mean and percentiles (nearest rank); None of nothing."""
    if not values:
        return None
    ranked = sorted(values)
    ranks = {f"p{q}": ranked[math.ceil(q / 100 * len(ranked)) - 1] for q in (50, 90, 99)}
    return {"mean": sum(ranked) / len(ranked), **ranks, "max": ranked[-1]}


@contextlib.contextmanager
def served(path: Path, options: ServeOptions) -> Iterator[int]:
    """A server of this folder in a process of its own; yields its port.

    Raises what the server raises before it listens.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_in_child, args=(path, options, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield _port_from(ours)
    finally:
        process.terminate()
        process.join(options.drain_timeout_s + 10)
        if process.is_alive():
            process.kill()
            process.join()


def _port_from(connection: Connection) -> int:
    try:
        message = connection.recv()
    except EOFError:
        raise ResourceError("the server's process ended while starting", code="SV33") from None
    if isinstance(message, CompressError):
        raise message
    return int(message)


def _serve_in_child(path: Path, options: ServeOptions, connection: Connection) -> None:
    from compressor.serve.server import serve

    try:
        serve(path, options, on_ready=connection.send)
    except CompressError as error:
        connection.send(error)
