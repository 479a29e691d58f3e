"""Independent computations at once, each on few threads, instead of one after another on all.

Dividing every small product and every step between two products among all threads costs more
forking and joining than it gains. Micro-batches do not depend on each other: as many of them run
at once as there are threads, and each is computed as if there were no other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import islice
from typing import TypeVar

import torch

CPU = torch.device("cpu")
AT_ONCE = 8  # bounds the memory of what runs at once; more threads share each computation

T = TypeVar("T")


def at_once(device: torch.device = CPU) -> int:
    """How many computations run at once: torch's threads, no more than cores this thread may use.

    On an accelerator one: each fills the device by itself. A thread that is pinned to one core
    (OMP_PROC_BIND, GOMP_CPU_AFFINITY) passes that on to every thread it starts; all threads of
    torch then share the one computation.
    """
    if device.type != "cpu":
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
    """Results in order. Pieces are taken one window ahead; whatever a piece raises is raised.

    The mode of gradients is that of the caller.
    """
    count, grad = at_once(device), torch.is_grad_enabled()
    pieces = iter(work)
    if count == 1:
        yield from (piece() for piece in pieces)
        return

    def run(piece: Callable[[], T], share: int) -> T:
        torch.set_num_threads(share)  # of this thread
        with torch.set_grad_enabled(grad):
            return piece()

    while window := list(islice(pieces, count)):
        with shared_threads(count) as share:
            running = [_pool(count).submit(run, piece, share) for piece in window]
            found = [task.result() for task in running]
        yield from found


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="side-by-side")
