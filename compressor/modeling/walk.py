"""Tokens through a model whose blocks are in memory one at a time.

    walk = Walk(state, tokens, options)
    stream = walk.open_stream("reference")        # embeddings of all rows
    for position in range(walk.num_blocks):
        block = walk.load(position)
        walk.advance(stream, block, position)     # outputs overwrite inputs, batch by batch
    walk.logits(stream, rows)                     # final norm and head

What surrounds the blocks (embedding, masks, rotary tables, final norm, head) is transformers' own
code, run on the skeleton.

Legend: N rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.algorithms.finite import is_finite
from compressor.algorithms.side_by_side import side_by_side
from compressor.data import TokenRows
from compressor.errors import NumericError, Where
from compressor.modeling.activations import ActivationStore
from compressor.modeling.block import Block, load_block
from compressor.modeling.device import CPU
from compressor.modeling.state import ModelState

PAUSE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class WalkOptions:
    """How much to hold at once.

    Args:
        workdir: folder for memory-mapped activations.
        tokens_per_batch: tokens in one micro-batch.
        limit_bytes: activations larger than this live in a file.
        pause_bytes: micro-batches wait inside a block while what they hold is not larger; above
            it, the block is run again for each of its linears. The result is the same.
        device: computes everything; activations wait in the CPU's memory.
    """

    workdir: Path
    tokens_per_batch: int = 2048
    limit_bytes: int = 512 << 20
    pause_bytes: int = PAUSE_BYTES
    device: torch.device = CPU


class Walk:
    """A model's skeleton with its outer part filled, and the token rows that go through it."""

    def __init__(self, state: ModelState, tokens: TokenRows, options: WalkOptions) -> None:
        self.state = state
        self.tokens = tokens.tokens
        self.mask = None if bool(tokens.mask.all()) else tokens.mask
        self.positions = tokens.positions
        self.options = options
        self.skeleton = state.skeleton(options.device)
        self.skeleton.fill_outer(state.read_outer(self.skeleton), torch.float32)
        self.rows_per_batch = max(1, options.tokens_per_batch // self.tokens.shape[1])
        self._kwargs: dict[tuple[int, int], list[dict[str, Any]]] = {}  # by batch
        masks = 4 * self.tokens.shape[0] * self.tokens.shape[1] ** 2  # fp32, of all rows
        self._keeps_kwargs = not self.has_row_masks or masks <= options.limit_bytes

    @property
    def num_blocks(self) -> int:
        """Decoder blocks of the model."""
        return self.skeleton.num_blocks

    @property
    def has_row_masks(self) -> bool:
        """Whether attention masks differ from row to row."""
        return self.mask is not None or self.positions is not None

    def block_name(self, position: int) -> str:
        """The module name of a block, e.g. "model.layers.3"."""
        return f"{self.skeleton.blocks_name}.{position}"

    def batches(self, rows: slice | None = None) -> Iterator[slice]:
        """Row ranges of the micro-batches that cover `rows` (all by default)."""
        chosen = rows or slice(0, self.tokens.shape[0])
        for start in range(chosen.start, chosen.stop, self.rows_per_batch):
            yield slice(start, min(start + self.rows_per_batch, chosen.stop))

    def real_tokens(self, rows: slice, x: Tensor) -> Tensor:
        """[t, D] of x [B, T, D] of these rows without padding; [t, D] in, if experts chose them."""
        flat = x.reshape(-1, x.shape[-1])
        mask = None if self.mask is None else self.mask[rows].flatten()
        return flat if mask is None or len(mask) != len(flat) else flat[mask]

    def open_stream(self, name: str) -> ActivationStore:
        """Embed all rows: the input of the first block."""
        count, length = self.tokens.shape
        store: ActivationStore | None = None
        for rows in self.batches():
            hidden, _ = self._enter(rows)
            if store is None:
                shape = (count, length, hidden.shape[-1])
                store = self.open_store(shape, name)
            store.write(rows, hidden.float())
        assert store is not None, "token rows are never empty"
        return store

    @property
    def device(self) -> torch.device:
        """Where blocks compute."""
        return self.options.device

    def open_store(
        self, shape: tuple[int, int, int], name: str, *, limit_bytes: int | None = None
    ) -> ActivationStore:
        """Room for activations [N, T, D] of this walk, by default as many bytes as its streams."""
        return ActivationStore(
            shape,
            file=self.options.workdir / f"{name}.activations",
            limit_bytes=self.options.limit_bytes if limit_bytes is None else limit_bytes,
            device=self.device,
        )

    def kwargs(self, rows: slice, position: int) -> dict[str, Any]:
        """What transformers passes to block `position` besides the hidden states."""
        start = rows.start if self.has_row_masks else 0
        batch = (start, start + rows.stop - rows.start)
        if batch not in self._kwargs:
            found = self._enter(rows)[1]
            if not self._keeps_kwargs:
                return found[position]
            self._kwargs[batch] = found
        return self._kwargs[batch][position]

    def load(self, position: int) -> Block:
        """Read one block of the state and build it."""
        return load_block(self.skeleton, position, self.state.read_block(position, self.skeleton))

    @torch.no_grad()
    def advance(self, stream: ActivationStore, block: Block, position: int) -> None:
        """Replace the stream's rows by the block's outputs, unless they are that already.

        Raises:
            NumericError: a non-finite output (NU01), naming block and row.
        """
        if stream.passed == position:
            return
        passes = (
            partial(block.run, stream.read(rows), self.kwargs(rows, position))
            for rows in self.batches()
        )
        with block.holding():
            self.take_outputs(stream, side_by_side(passes, device=self.device), position)

    @torch.no_grad()
    def through(self, block: Block, position: int, hidden: Tensor) -> Tensor:
        """The first rows [R, T, D] of the walk through a block, in micro-batches.

        What comes back is on the CPU: many variants of these rows may wait at once.
        """
        outputs = (
            block.run(hidden[rows].to(self.device), self.kwargs(rows, position))
            for rows in self.batches(slice(0, hidden.shape[0]))
        )
        return torch.cat([out.cpu() for out in outputs])

    def take_outputs(
        self, stream: ActivationStore, outputs: Iterable[Tensor], position: int
    ) -> None:
        """Replace the rows by outputs of block `position`, one for each of `batches()`.

        Raises:
            NumericError: a non-finite output (NU01), naming block and row.
        """
        for rows, out in zip(self.batches(), outputs, strict=True):
            self._check_finite(out, rows, position)
            stream.write(rows, out)
        stream.passed = position

    @torch.no_grad()
    def logits(self, stream: ActivationStore, rows: slice) -> Tensor:
        """Logits [B, T, V] of some rows after the last block."""
        return self.skeleton.leave(stream.read(rows), self.tokens[rows])

    def _enter(self, rows: slice) -> tuple[Tensor, list[dict[str, Any]]]:
        positions = None if self.positions is None else self.positions[rows]
        return self.skeleton.enter(self.tokens[rows], self._mask(rows), positions=positions)

    def _mask(self, rows: slice) -> Tensor | None:
        return None if self.mask is None else self.mask[rows].long()

    def _check_finite(self, out: Tensor, rows: slice, position: int) -> None:
        if is_finite(out):
            return
        row = rows.start + int((~torch.isfinite(out)).flatten(1).any(1).nonzero()[0])
        raise NumericError(
            f"activations are not finite after {self.block_name(position)} (calibration row {row})",
            code="NU01",
            where=Where(key=self.block_name(position)),
            why="Units finished before this one are kept.",
            fix="look at the weights of this block, or remove the row from the calibration data",
        )
