"""Whole artifacts of tiny models: stages run in order in one run folder, built once a session."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from compressor.data import TokenRows
from compressor.errors import Interrupted
from compressor.modeling.checkpoint import open_checkpoint
from compressor.modeling.state import ModelState
from compressor.recipe.models import STAGE_CONFIGS
from compressor.run_dir import RunDir, StageRun
from compressor.stages import calibrate, evaluate, pack, quantize, transform, verify
from compressor.stages.context import StageContext, StageReport

_APPLY: dict[str, Any] = {
    "calibrate": calibrate.apply,
    "quantize": quantize.apply,
    "transform": transform.apply,
    "pack": pack.apply,
    "verify": verify.apply,
    "evaluate": evaluate.apply,
}
W4 = {"kind": "quantize", "scheme": "W4A16", "group_size": 32}
PACK = {"kind": "pack", "kernels_archs": []}


def random_rows(count: int = 9, length: int = 24, *, padded: bool = False) -> TokenRows:
    """Token rows that every tiny model understands; `padded` hides a part of each row's end."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(3, 320, (count, length), generator=generator)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if padded:
        for row in range(count):
            mask[row, length - 1 - row % 5 :] = False
    return TokenRows(tokens, mask, "random")


@dataclass
class Bench:
    """One run folder over one checkpoint: `run` applies a stage and moves the state on."""

    model: Path
    folder: Path
    tokens: TokenRows | None = None
    identity: str = "test"
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.original = ModelState.of_checkpoint(open_checkpoint(self.model))
        self.state = self.original
        self.index = 0

    @property
    def artifact(self) -> Path:
        return self.folder / "artifact"

    def run(self, stage: dict[str, Any], *, stop_at: int = 0) -> StageReport:
        """Apply the next stage; with `stop_at`, interrupt it at that progress event."""
        with RunDir.open(self.folder, identity={"test": self.identity}) as folder:
            context = self.context(folder, stage["kind"])
            if stop_at:
                context = replace(context, run=_Stopping(context.run, stop_at))  # type: ignore[arg-type]
            report = self.apply(stage, context)
        self.index += 1
        self.state = report.state
        self.tokens = report.tokens or self.tokens
        return report

    def context(self, folder: RunDir, kind: str) -> StageContext:
        return StageContext(
            state=self.state,
            original=self.original,
            run=folder.stage(self.index, kind),
            tokens=self.tokens,
            artifact=folder.artifact,
            source=self.model,
            seed=0,
            facts=self.facts,
            recipe_text="name: test\n",
        )

    @staticmethod
    def apply(stage: dict[str, Any], context: StageContext) -> StageReport:
        config = STAGE_CONFIGS[stage["kind"]](**stage)
        report: StageReport = _APPLY[stage["kind"]](config, context)
        return report


@dataclass(frozen=True)
class Built:
    """A packed artifact, the state it was made of, and the reports of its stages."""

    artifact: Path
    model: Path
    state: ModelState
    reports: list[StageReport]


def build_artifact(model: Path, folder: Path, *stages: dict[str, Any], rows: bool = True) -> Built:
    """Run quantize stages and pack."""
    bench = Bench(model, folder, random_rows() if rows else None)
    reports = [bench.run(stage) for stage in (*stages, PACK)]
    return Built(bench.artifact, model, bench.state, reports)


class _Stopping:
    """A stage's journal that raises Interrupted at the n-th progress event."""

    def __init__(self, run: StageRun, after: int) -> None:
        self._run, self._after = run, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)

    def progress(self, event: dict[str, Any]) -> None:
        self._after -= 1
        if self._after == 0:
            raise Interrupted("stopped by the test")


def unit_files(folder: Path) -> dict[str, bytes]:
    """Every unit file of a run by name."""
    root = folder / "units"
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*.safetensors"))}
