"""Prometheus metrics under the names vLLM uses: dashboards and autoscalers work as they are.

    TTFT = first token - arrival      ITL = time between two tokens of one request
    TPOT = (last token - first token) / (tokens - 1)      E2E = last token - arrival

Labels are a fixed set (model_name, finished_reason): no request can make a new series.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from compressor.serve.engine import LLMEngine
from compressor.serve.sequence import Delta

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
            10.0, 20.0, 40.0, 80.0, 160.0, 640.0)  # fmt: skip
_HISTOGRAMS = {
    "ttft": ("vllm:time_to_first_token_seconds", "Time to first token."),
    "itl": ("vllm:inter_token_latency_seconds", "Time between two tokens."),
    "tpot": ("vllm:request_time_per_output_token_seconds", "Mean time per token after the first."),
    "e2e": ("vllm:e2e_request_latency_seconds", "Arrival to last token."),
}


@dataclass(slots=True)
class _Times:
    arrival: float
    first: float | None = None
    last: float = 0.0
    tokens: int = 0


class Metrics:
    """Counts and times requests (an `Observer`), and reads the engine's state when asked."""

    def __init__(self, engine: LLMEngine, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name}
        self._times: dict[str, _Times] = {}
        names = list(self._labels)
        self._prompt = Counter(
            "vllm:prompt_tokens", "Prompt tokens.", names, registry=self.registry
        ).labels(model_name)
        self._generated = Counter(
            "vllm:generation_tokens", "Produced tokens.", names, registry=self.registry
        ).labels(model_name)
        self._finished = Counter(
            "vllm:request_success",
            "Finished requests.",
            labelnames=[*names, "finished_reason"],
            registry=self.registry,
        )
        self.rejected = Counter(
            "compressor_rejected_requests",
            "Requests refused by reason.",
            labelnames=["reason"],
            registry=self.registry,
        )
        self._histograms = {
            key: Histogram(name, text, names, registry=self.registry, buckets=_SECONDS).labels(
                model_name
            )
            for key, (name, text) in _HISTOGRAMS.items()
        }
        self.registry.register(_EngineState(engine, self._labels))

    def arrived(self, request_id: str, num_prompt_tokens: int) -> None:
        self._times[request_id] = _Times(time.monotonic())
        self._prompt.inc(num_prompt_tokens)

    def produced(self, delta: Delta) -> None:
        times = self._times.get(delta.request_id)
        if times is None:
            return
        now = time.monotonic()
        if delta.token_ids:
            self._generated.inc(len(delta.token_ids))
            if times.first is None:
                times.first = now
                self._histograms["ttft"].observe(now - times.arrival)
            else:
                self._histograms["itl"].observe(now - times.last)
            times.last = now
            times.tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            self._finish(self._times.pop(delta.request_id), delta.finish_reason, now)

    def _finish(self, times: _Times, reason: str, now: float) -> None:
        self._finished.labels(*self._labels.values(), reason).inc()
        self._histograms["e2e"].observe(now - times.arrival)
        if times.first is not None and times.tokens > 1:
            self._histograms["tpot"].observe((times.last - times.first) / (times.tokens - 1))

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)


class _EngineState(Collector):
    """Gauges and counters that live in the engine already."""

    def __init__(self, engine: LLMEngine, labels: dict[str, str]) -> None:
        self._engine = engine
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        engine, scheduler = self._engine, self._engine.scheduler
        cache = engine.runner.cache
        gauges = {
            "vllm:num_requests_running": (len(scheduler.running), "Sequences in the batch."),
            "vllm:num_requests_waiting": (len(scheduler.waiting), "Sequences in the queue."),
            "vllm:kv_cache_usage_perc": (engine.pool.usage, "Used share of the pool, 0 to 1."),
            "compressor_kv_cache_bytes": (cache.nbytes if cache else 0, "Size of the pool."),
        }
        counters = {
            "vllm:num_preemptions": (scheduler.stats.num_preemptions, "Preempted sequences."),
            "vllm:prefix_cache_queries": (scheduler.stats.prefix_queries, "Tokens looked up."),
            "vllm:prefix_cache_hits": (scheduler.stats.prefix_hits, "Tokens found."),
        }
        for name, (value, text) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=list(self._labels))
            gauge.add_metric(list(self._labels.values()), value)
            yield gauge
        for name, (value, text) in counters.items():
            counter = CounterMetricFamily(name, text, labels=list(self._labels))
            counter.add_metric(list(self._labels.values()), value)
            yield counter
