"""Independent computations at once, each on few threads, instead of one after another on all.

Dividing every small product and every step between two products among all threads costs more
forking and joining than it gains. Micro-batches do not depend on each other: as many of them run
at once as there are threads, and each is computed as if there were no other.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

CPU = torch.device("cpu")
AT_ONCE = 8  # bounds the memory of what runs at once; more threads share each computation

T = TypeVar("T")
_here = threading.local()  # whether this thread computes one of several pieces


def at_once(device: torch.device = CPU) -> int:
    """How many computations run at once: torch's threads, no more than cores this thread may use.

    On an accelerator one: each fills the device by itself; and one inside of a piece. A thread that
    is pinned to one core (OMP_PROC_BIND, GOMP_CPU_AFFINITY) passes that on to every thread it
    starts; all threads of torch then share the one computation.
    """
    if device.type != "cpu" or getattr(_here, "is_piece", False):
        return 1
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), cores, AT_ONCE))


@contextmanager
def shared_threads(among: int) -> Iterator[int]:
    """Give each of `among` computations its share of torch's threads meanwhile; yields it."""
    threads = torch.get_num_threads()
    share = max(1, threads // among)
    torch.set_num_threads(share)
    try:
        yield share
    finally:
        torch.set_num_threads(threads)


def side_by_side(work: Iterable[Callable[[], T]], *, device: torch.device = CPU) -> Iterator[T]:
    """Results in order. One piece more is taken than run at once; what a piece raises is raised.

    The mode of gradients is that of the caller, who has one piece's share of torch's threads
    between two results.
    """
    count, grad = at_once(device), torch.is_grad_enabled()
    if count == 1:
        yield from (piece() for piece in work)
        return

    def run(piece: Callable[[], T], share: int) -> T:
        _here.is_piece = True
        torch.set_num_threads(share)  # of this thread
        with torch.set_grad_enabled(grad):
            return piece()

    running = deque[Future[T]]()
    with shared_threads(count) as share:
        try:
            for piece in work:
                running.append(_pool(count).submit(run, piece, share))
                if len(running) > count:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            wait([task for task in running if not task.cancel()])


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="side-by-side")
