"""Times of GPU calls without launch gaps and without cached weights.

Calls on at least eight copies of the weights, together four times the L2 cache, are captured in one
CUDA graph; the median replay divided by the number of calls is the time of one.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

ROTATED_BYTES = 240_000_000
REPLAYS = 20


def copies(nbytes: int) -> int:
    """How many copies of something of `nbytes` to rotate over."""
    return max(8, -(-ROTATED_BYTES // max(nbytes, 1)))


def graph_us(calls: Sequence[Callable[[], object]], replays: int = REPLAYS) -> float:
    """Median microseconds of a call in a CUDA graph that makes all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)
