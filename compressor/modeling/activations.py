"""Activations between blocks: in the CPU's memory while small, in a mapped file above a limit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compressor.modeling.device import CPU


class ActivationStore:
    """Rows of activations [N, T, D] fp32 that a block's outputs overwrite in place."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        file: Path,
        limit_bytes: int,
        device: torch.device = CPU,
    ) -> None:
        """Allocate.

        Args:
            shape: rows, tokens, width.
            file: where the memory map goes if the rows are larger than `limit_bytes`.
            limit_bytes: largest size kept in memory.
            device: where rows that are read go.
        """
        self._device = device
        self.file: Path | None = None
        self.passed: int | None = None  # the last block these rows went through
        size = 4 * shape[0] * shape[1] * shape[2]
        if size <= limit_bytes:
            self._array = np.zeros(shape, np.float32)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            self.file = file
            self._array = np.memmap(file, np.float32, mode="w+", shape=shape)

    @property
    def width(self) -> int:
        """D."""
        return int(self._array.shape[-1])

    def read(self, rows: slice) -> Tensor:
        """A copy of some rows [B, T, D]."""
        return torch.from_numpy(np.array(self._array[rows])).to(self._device)

    def write(self, rows: slice, value: Tensor) -> None:
        """Overwrite some rows."""
        self._array[rows] = value.cpu().numpy()
        if self.file is not None:
            self._release()

    def _release(self) -> None:
        """Let go of the pages written so far, so that they do not count as our memory."""
        import mmap

        raw: mmap.mmap | None = getattr(self._array, "_mmap", None)
        if raw is not None and hasattr(mmap, "MADV_DONTNEED"):
            raw.flush()
            raw.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Remove the file, if there is one."""
        del self._array
        if self.file is not None:
            self.file.unlink(missing_ok=True)
