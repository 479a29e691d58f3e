"""What every stage is given, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.data import TokenRows
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

    def walk_options(self) -> WalkOptions:
        """Where activations go; small enough ones stay in memory."""
        return WalkOptions(workdir=self.run.path / "activations")


@dataclass(frozen=True, slots=True)
class StageReport:
    """The model after the stage and the facts the report shows; `tokens` if it made new ones."""

    state: ModelState
    facts: dict[str, Any] = field(default_factory=dict)
    tokens: TokenRows | None = None
