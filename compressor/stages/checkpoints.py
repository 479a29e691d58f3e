"""Checkpoints of a training in the stage's journal, and the way back to the newest.

    step-0000050   every `checkpoint_steps`, behind a validation: the same in every run
    timed-0000073  every `checkpoint_minutes`, wherever training is; gone with the next step-*

Only the newest file is kept; the journal remembers the losses of all.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.recipe import DistillConfig
from compressor.run_dir import StageRun
from compressor.stages.training import Training

Resume = tuple[Path, dict[str, Any]]
LAST_GOOD = "last-good"  # what a diverged training leaves


class Checkpoints:
    """Writes and finds the checkpoints of one stage."""

    def __init__(self, config: DistillConfig, run: StageRun) -> None:
        self.config, self.run = config, run
        self._saved = time.monotonic()

    @property
    def steps(self) -> list[int]:
        """Steps at which every run has a checkpoint."""
        every = self.config.checkpoint_steps
        return sorted({*range(every, self.config.steps + 1, every), self.config.steps})

    def newest(self, *, timed: bool = True) -> Resume | None:
        """File and meta of the last whole checkpoint.

        Asked from the end: older files are deleted on purpose.
        """
        found = [(step, _name("step", step)) for step in self.steps]
        found += [(int(p.stem.rpartition("-")[2]), p.stem) for p in self._timed() if timed]
        for _, unit in sorted(found, reverse=True):
            if self.run.file(unit).exists() and self.run.is_done(unit):
                return self.run.file(unit), self.run.meta(unit)
        return None

    def save(self, training: Training, tensors: dict[str, Tensor]) -> None:
        """Commit a checkpoint of this step; older ones are not needed any more."""
        step = training.progress.step
        self._commit(_name("step", step), training, tensors)
        for older in (s for s in self.steps if s < step):
            self.run.file(_name("step", older)).unlink(missing_ok=True)
        self.forget_timed()

    def save_if_due(self, training: Training) -> None:
        """Commit a timed checkpoint if the last one of any kind is too long ago."""
        minutes, is_new = self.config.checkpoint_minutes, bool(training.progress.losses)
        if minutes is None or not is_new or time.monotonic() - self._saved < 60 * minutes:
            return
        older = self._timed()
        self._commit(_name("timed", training.progress.step), training, training.tensors())
        for file in older:
            file.unlink(missing_ok=True)

    def save_last_good(self, training: Training) -> None:
        """Commit what a diverged training had before its last step."""
        self._commit(LAST_GOOD, training, training.tensors())

    def forget_timed(self) -> None:
        """Delete timed checkpoints."""
        for file in self._timed():
            file.unlink(missing_ok=True)

    def losses(self) -> list[float]:
        """Loss of every step, from the journal of the checkpoints (their files may be gone)."""
        losses: list[float] = []
        for step in self.steps:
            try:
                losses += self.run.meta(_name("step", step))["progress"]["losses"]
            except KeyError:  # training stopped early
                break
        return losses

    def _commit(self, unit: str, training: Training, tensors: dict[str, Tensor]) -> None:
        progress = asdict(training.progress)
        self.run.commit(unit, tensors, {"progress": progress})
        self._saved = time.monotonic()

    def _timed(self) -> list[Path]:
        return sorted(self.run.path.glob("timed-*.safetensors"))


def _name(kind: str, step: int) -> str:
    return f"{kind}-{step:07d}"
