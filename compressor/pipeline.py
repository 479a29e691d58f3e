"""The loop over stages: from a recipe to a published artifact.

    open model (headers) -> preflight -> lock the run folder -> stages in order -> card and report
    -> publish with one rename, or keep aside if the quality gate does not pass

Everything that is finished is in the run folder's journal; running the same recipe again goes on
where it stopped.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import compressor
from compressor.allocator import keep_freed_memory
from compressor.errors import GateError, ResourceError
from compressor.modeling.checkpoint import open_checkpoint
from compressor.modeling.device import AUTO, choose_device
from compressor.modeling.hub import ResolvedModel, resolve_model
from compressor.modeling.state import ModelState
from compressor.plan import preflight, repairing_gate
from compressor.recipe import Recipe, dump_recipe
from compressor.report import Outcome, shown_source, write_outcome
from compressor.run_dir import (
    RunDir,
    check_output,
    publish,
    resource_error,
    sha256_file,
    write_atomic,
)
from compressor.stages import (
    calibrate,
    distill,
    evaluate,
    pack,
    processes,
    prune,
    quantize,
    transform,
    verify,
)
from compressor.stages.context import StageContext, StageReport
from compressor.stages.repair import NothingToRaise, Repair

REPORT = "report.html"
SMALLEST_BATCH = 256  # tokens at once, when a device's memory is short
DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO,
)  # fmt: skip
log = logging.getLogger("compressor.pipeline")
Apply = Callable[[Any, StageContext], StageReport]

STAGES: dict[str, Apply] = {
    "calibrate": calibrate.apply,
    "transform": transform.apply,
    "quantize": quantize.apply,
    "prune": prune.apply,
    "distill": distill.apply,
    "pack": pack.apply,
    "verify": verify.apply,
    "evaluate": evaluate.apply,
}


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run, as opposed to what.

    Args:
        run_dir: default `<output>.run`.
        fresh: forget what an earlier run finished.
        overwrite: replace an existing output (it stays until the new one is complete).
        break_lock: take over a lock of another host.
        command: the command line, for the model card.
        device: what computes: "auto" (the accelerator, if there is one), "cpu", "cuda:1", ...
    """

    run_dir: Path | None = None
    fresh: bool = False
    overwrite: bool = False
    break_lock: bool = False
    command: str = ""
    device: str = AUTO


@dataclass(frozen=True, slots=True)
class RunResult:
    """Where the artifact is, what the gate said, and the numbers of the summary table."""

    output: Path
    verdict: str
    report: Path | None
    summary: dict[str, Any]


@dataclass(slots=True)
class Progress:
    """What the stages before the present one left; inputs and outputs of each, for a repair."""

    state: ModelState
    tokens: Any = None
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    inputs: dict[int, tuple[ModelState, Any]] = field(default_factory=dict)
    outputs: dict[int, ModelState] = field(default_factory=dict)
    repair: Repair | None = None


def run(recipe: Recipe, options: RunOptions) -> RunResult:
    """Run a recipe, or go on with it.

    Raises:
        CompressError: see `compressor.errors`; GateError when the gate does not pass (the artifact
            is then complete at `<output>.rejected`).
    """
    keep_freed_memory()
    device = choose_device(options.device)
    processes.compute_on(device)
    output = Path(recipe.output).absolute()
    check_output(output, overwrite=options.overwrite)
    resolved = resolve_model(recipe.model.path, revision=recipe.model.revision)
    checkpoint = open_checkpoint(
        resolved.path,
        trust_remote_code=recipe.model.trust_remote_code,
        allow_missing=tuple(recipe.model.allow_missing),
    )
    original = ModelState.of_checkpoint(checkpoint)
    run_path = options.run_dir or output.with_name(output.name + ".run")
    preflight(recipe, original, run_path)
    text = dump_recipe(recipe)
    with RunDir.open(
        run_path,
        identity=_identity(recipe, original, device),
        fresh=options.fresh,
        break_lock=options.break_lock,
    ) as folder:
        write_atomic(folder.path / "recipe.yaml", text.encode())
        frame = _Frame(recipe, original, resolved, folder, device)
        progress = Progress(original)
        try:
            for index, config in enumerate(recipe.stages):
                _run_stage(index, config, progress, frame)
            _repair(progress, frame)
            return _finish(recipe, options, progress, frame)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            raise resource_error(error, Path(error.filename or run_path)) from error


@dataclass(frozen=True, slots=True)
class _Frame:
    """What is the same for all stages of a run."""

    recipe: Recipe
    original: ModelState
    source: ResolvedModel
    folder: RunDir
    device: torch.device


def _run_stage(index: int, config: Any, progress: Progress, frame: _Frame) -> None:
    name = f"{index}-{config.kind}"
    suffix = "" if progress.repair is None else f"-repair{progress.repair.round}"
    progress.inputs[index] = (progress.state, progress.tokens)
    context = StageContext(
        state=progress.state,
        original=frame.original,
        run=frame.folder.stage(index, config.kind + suffix),
        tokens=progress.tokens,
        artifact=frame.folder.artifact,
        source=frame.source.path,
        seed=frame.recipe.seed,
        facts=progress.facts,
        recipe_text=artifact_recipe(frame.recipe),
        repair=progress.repair,
        device=frame.device,
    )
    started = {"event": "stage started", "stage": name + suffix}
    frame.folder.log(started | {"device": str(frame.device)})
    start = time.monotonic()
    report = _within_memory(config, context, name)
    progress.state = report.state
    progress.tokens = report.tokens or progress.tokens
    progress.outputs[index] = report.state
    progress.facts[name] = _merged(progress.facts.get(name, {}), report.facts)
    took = round(time.monotonic() - start, 3)
    progress.seconds[name] = round(progress.seconds.get(name, 0.0) + took, 3)
    frame.folder.log({"event": "stage finished", "stage": name + suffix, "s": took})
    for note in report.facts.get("notes", []):
        log.warning("%s: %s", name, note)


def _within_memory(config: Any, context: StageContext, stage: str) -> StageReport:
    """Apply a stage; where the device's memory is short, go on with smaller micro-batches.

    Raises:
        ResourceError: it is still short (RE07), or the device failed (RE08).
    """
    why = "Finished units are kept."
    while True:
        try:
            return STAGES[config.kind](config, context)
        except torch.OutOfMemoryError as error:
            half = context.tokens_per_batch // 2
            if half < SMALLEST_BATCH:
                raise ResourceError(
                    f"{context.device} ran out of memory in stage {stage}",
                    code="RE07",
                    why=f"One block, its activations and its statistics must fit. {why}",
                    fix="free the device of other work and run again, use shorter rows, or "
                    "--device cpu with --fresh (numbers differ between devices)",
                ) from error
            log.warning("%s: out of memory on %s; %d tokens at once", stage, context.device, half)
            context = replace(context, tokens_per_batch=half)
        except torch.AcceleratorError as error:
            raise ResourceError(
                f"{context.device} failed in stage {stage}: {str(error).splitlines()[0]}",
                code="RE08",
                why=why,
                fix="run the same command again: it goes on; if it fails again, use "
                "--device cpu with --fresh",
            ) from error


def _merged(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Facts of a stage after a repair: the new ones, and what the rounds before them did."""
    if "repairs" not in now:
        return now
    rounds = [*before.get("repairs", []), *now["repairs"]]
    kept = [n for n in before.get("notes", []) if n not in now["notes"]]
    return before | now | {"repairs": rounds, "notes": kept + now["notes"]}


def _repair(progress: Progress, frame: _Frame) -> None:
    """Give more bits to the units that harm most while the gate fails and its recipe says so."""
    found = repairing_gate(frame.recipe)
    if found is None:
        return
    start, judge, rounds = found
    name = f"{judge}-evaluate"
    for number in range(1, rounds + 1):
        verdict = progress.facts[name]["verdict"]
        if verdict["status"] in ("pass", "none"):
            break
        finished = progress.state
        progress.repair = Repair(number, progress.outputs[start], verdict)
        progress.state, progress.tokens = progress.inputs[start]
        try:
            for index, config in enumerate(frame.recipe.stages[start:], start):
                _run_stage(index, config, progress, frame)
        except NothingToRaise:
            log.warning("repair %d: no unit can get more bits; the artifact is kept aside", number)
            frame.folder.log({"event": "repair ended", "round": number, "why": "nothing to raise"})
            progress.state = finished
            break


def artifact_recipe(recipe: Recipe) -> str:
    """The recipe as it goes into the artifact: no paths of this machine."""
    model = recipe.model.model_copy(update={"path": shown_source(recipe.model.path)})
    stages = [_without_paths(stage) for stage in recipe.stages]
    changes = {"output": Path(recipe.output).name, "model": model, "stages": stages}
    return dump_recipe(recipe.model_copy(update=changes))


def _without_paths(stage: Any) -> Any:
    """A stage whose data and student are named as they may be shown."""
    changes: dict[str, Any] = {}
    data, student = getattr(stage, "data", None), getattr(stage, "student", None)
    if data is not None:
        changes["data"] = data.renamed({name: shown_source(name) for name in data.names})
    if student is not None and student.path is not None:
        changes["student"] = student.model_copy(update={"path": shown_source(student.path)})
    teacher = getattr(stage, "teacher", None)
    if teacher is not None:
        changes["teacher"] = teacher.model_copy(update={"cache": Path(teacher.cache).name})
    for part in ("budget", "target"):
        limits = getattr(stage, part, None)
        if limits is not None:
            named = {key: getattr(limits, key) for key in ("profile", "device")}
            shown = {key: Path(value).name for key, value in named.items() if value is not None}
            changes[part] = limits.model_copy(update=shown)
    return stage.model_copy(update=changes)


def _identity(recipe: Recipe, original: ModelState, device: torch.device) -> dict[str, str]:
    """Everything that decides the result; a resumed run must have the same."""
    stages = dump_recipe(recipe.model_copy(update={"output": "out"}))
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return _data_identity(recipe) | {
        "recipe": hashlib.sha256(stages.encode()).hexdigest(),
        "model": original.checkpoint.digest,
        "version": compressor.__version__,
        "threads": threads or "default",
        "device": device.type,
    }


def _data_identity(recipe: Recipe) -> dict[str, str]:
    """Digests of the local files that calibrate, train or judge, by stage."""
    found = {}
    for index, stage in enumerate(recipe.stages):
        data = getattr(stage, "data", None)
        for number, name in enumerate(data.names if data is not None else ()):
            if Path(name).expanduser().is_file():
                key = f"stages.{index}.data" + (f".{number}" if number else "")
                found[key] = sha256_file(Path(name).expanduser())
    return found


def _finish(recipe: Recipe, options: RunOptions, progress: Progress, frame: _Frame) -> RunResult:
    """Card and report into the artifact, then publish it or keep it aside."""
    verdict = _verdict(progress.facts)
    outcome = Outcome(progress.facts, progress.seconds)
    summary = write_outcome(
        recipe,
        outcome,
        progress.state,
        frame.folder.artifact,
        command=options.command,
        text=artifact_recipe(recipe),
    )
    output = Path(recipe.output).absolute()
    if verdict in ("pass", "none"):
        publish(frame.folder.artifact, output, overwrite=options.overwrite)
        return RunResult(output, verdict, output / REPORT, summary)
    aside = output.with_name(output.name + ".rejected")
    publish(frame.folder.artifact, aside, overwrite=True)
    for facts in progress.facts.values():
        if "verdict" in facts:
            evaluate.check_gate(facts, aside)
    raise GateError(f"quality gate: {verdict}", code="GATE")


def _verdict(facts: dict[str, dict[str, Any]]) -> str:
    found = [f["verdict"]["status"] for f in facts.values() if "verdict" in f]
    for status in ("fail", "inconclusive", "pass"):
        if status in found:
            return status
    return "none"
