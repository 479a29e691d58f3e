"""Decode steps as CUDA graphs, one for each number of sequences: a replay instead of Python.

A step of n sequences takes the graph of the smallest bucket b >= n out of 1, 2, 4, .. `max_rows`.
Its inputs go into buffers that all graphs share. Rows n .. b-1 are padding: token 0 at position 0,
alone in the pool's trash block, so they neither read nor write what belongs to a request. Contexts
grow without a new graph: the attention kernel has a fixed grid and reads lengths on the device.

Letters: n sequences of a step, b rows of its graph, V vocabulary, W blocks of the longest context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.serve.attention import KVCache, PagedBatch, Rule
from compressor_kernels import gpu
from compressor_kernels.kv_pool import Pages
from compressor_kernels.tuning import M_BUCKETS

Forward = Callable[[Tensor, Tensor, PagedBatch], Tensor]


@dataclass(frozen=True, slots=True)
class Captured:
    """A recorded computation: `replay` repeats it on the buffers of now and refills `output`."""

    replay: Callable[[], object]
    output: Tensor  # [b, V]


Capture = Callable[[Callable[[], Tensor]], Captured]


class DecodeGraphs:
    """Graphs by bucket over shared buffers.

    Args:
        forward: ids [1, b], positions [1, b] and their batch -> logits [b, V].
        cache: the pool.
        max_rows: most sequences of a step.
        max_blocks: W.
        capture: records a computation; `CudaCapture`, or a stand-in where there is no GPU.

    Raises RuntimeError when the model cannot be recorded.
    """

    def __init__(
        self, forward: Forward, cache: KVCache, *, max_rows: int, max_blocks: int, capture: Capture
    ) -> None:
        self._forward, self._cache, self.max_rows = forward, cache, max_rows
        place, wide, narrow = cache.device, torch.int64, torch.int32
        self._ids = torch.zeros(1, max_rows, dtype=wide, device=place)
        self._positions = torch.zeros(1, max_rows, dtype=wide, device=place)
        self._slots = torch.full((max_rows,), cache.trash_slot, dtype=wide, device=place)
        tables = torch.zeros(max_rows, max_blocks, dtype=narrow, device=place)
        tables[:, 0] = cache.trash_block
        lengths = torch.ones(max_rows, dtype=narrow, device=place)
        self._pages = Pages(tables, lengths, cache.block_size)
        # the largest first: the smaller ones fit into its memory
        wanted = buckets(max_rows)[::-1]
        self._graphs = {rows: capture(partial(self._compute, rows)) for rows in wanted}

    def __call__(self, ids: list[int], positions: list[int], slots: Tensor, pages: Pages) -> Tensor:
        """Logits [n, V] of one token a sequence; they are overwritten by the next call.

        Args:
            ids: the tokens.
            positions: theirs.
            slots: int64 [n] on the CPU, where their keys and values go.
            pages: on the CPU.
        """
        rows = next(b for b in reversed(self._graphs) if b >= len(ids))
        more = rows - len(ids)
        self._ids[0, :rows] = torch.tensor(ids + [0] * more)
        self._positions[0, :rows] = torch.tensor(positions + [0] * more)
        self._slots[:rows] = F.pad(slots, (0, more), value=self._cache.trash_slot)
        self._pages.lengths[:rows] = F.pad(pages.lengths, (0, more), value=1)
        tables = F.pad(pages.tables, (0, 0, 0, more), value=self._cache.trash_block)
        self._pages.tables[:rows, : tables.shape[1]] = tables
        captured = self._graphs[rows]
        captured.replay()
        return captured.output[: len(ids)]

    def _compute(self, rows: int) -> Tensor:
        pages = Pages(self._pages.tables[:rows], self._pages.lengths[:rows], self._pages.page)
        batch = PagedBatch(self._cache, self._slots[:rows], pages, [])
        return self._forward(self._ids[:, :rows], self._positions[:, :rows], batch)


def buckets(most: int) -> list[int]:
    """1, 2, 4, .. and `most`, ascending."""
    return sorted({min(1 << power, most) for power in range(most.bit_length() + 1)})


def warm_sizes(most: int) -> list[int]:
    """Numbers of tokens, at most `most`, that between them run every configuration of a product.

    Configurations change with the bucket of M and, above 64 rows, with the number of row tiles;
    Triton compiles another kernel where a size is not a multiple of 16.
    """
    edges = {*M_BUCKETS, *range(128, most + 1, 128), most}
    return sorted(n for edge in edges for n in {edge - 1, edge} if 0 < n <= most)


def obstacle(q: Tensor, cache: KVCache, rules: Iterable[tuple[int, Rule]]) -> str:
    """Why decode steps cannot be recorded ("" when they can); q: empty, as a layer has them."""
    for layer, rule in rules:
        size = cache.pools[layer][0].data.shape[2] * cache.pools[layer][0].planes
        fits = gpu.attends(q.new_empty(0, size), *cache.pools[layer])
        if not fits or rule.softcap is not None or rule.sinks is not None:
            return f"attention of layer {layer} has no kernel for pools of {cache.kept}"
    return ""


class CudaCapture:
    """Records with `torch.cuda.graph`; all graphs share one memory pool."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor]) -> Captured:
        """Run twice, so that every kernel is compiled and every library ready, then record."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = compute()
        return Captured(graph.replay, output)
