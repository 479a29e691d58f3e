"""What every stage is given, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compressor.data import TokenRows
from compressor.modeling.device import CPU
from compressor.modeling.state import ModelState
from compressor.modeling.walk import WalkOptions
from compressor.run_dir import StageRun

if TYPE_CHECKING:
    from compressor.stages.repair import Repair


@dataclass(frozen=True, slots=True)
class StageContext:
    """The model before the stage, the teacher, the calibration tokens and the stage's journal.

    Args:
        state: the model as the stages before this one left it.
        original: the model the recipe starts from; the teacher of every distillation.
        run: journal of this stage's finished units.
        tokens: rows of the last calibrate stage; None before one.
        artifact: folder of the artifact being built.
        source: folder of the original checkpoint (tokenizer, licence, templates).
        seed: the recipe's seed.
        facts: reports of the stages before this one, by unit of the pipeline ("1-quantize").
        recipe_text: the resolved recipe, as it goes into the artifact.
        repair: in a repair round, what failed; the quantize stage then raises some units.
        device: computes whatever goes through blocks, that many tokens at once.
    """

    state: ModelState
    original: ModelState
    run: StageRun
    tokens: TokenRows | None
    artifact: Path
    source: Path
    seed: int
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    recipe_text: str = ""
    repair: Repair | None = None
    device: torch.device = CPU
    tokens_per_batch: int = 2048

    def walk_options(self) -> WalkOptions:
        """Where activations go; small enough ones stay in memory."""
        workdir = self.run.path / "activations"
        return WalkOptions(workdir, tokens_per_batch=self.tokens_per_batch, device=self.device)


@dataclass(frozen=True, slots=True)
class StageReport:
    """The model after the stage and the facts the report shows; `tokens` if it made new ones."""

    state: ModelState
    facts: dict[str, Any] = field(default_factory=dict)
    tokens: TokenRows | None = None
