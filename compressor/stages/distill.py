"""Distill: train the compressed model towards the original's distribution.

    teacher   the model the recipe starts from, whatever the stages before this one did
    student   the model as they left it (pruned, quantized), or a new smaller one

What is trained depends on how a layer is stored. A quantized linear keeps its codes and learns its
scales (2 % of the numbers), so it is exactly as small afterwards; a dense linear learns its
weights, a pruned one only those that are left, or with `train: lora` a difference of low rank that
is merged into them. With `train: codes` (quantization-aware training)
codes learn too: positions between them move, and the nearest code is what is computed with and
stored. They start inside the cells of the present codes, on the side of the original's weights.
The result is written as units, block by block, and is the state with the least KL on held-out
rows, the start included: it never gets worse there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from compressor.data import TokenRows
from compressor.errors import RecipeError
from compressor.modeling.state import ModelState
from compressor.modeling.whole import OUTER, Slot, WholeModel
from compressor.recipe import DistillConfig
from compressor.stages import processes
from compressor.stages.calibrate import rows_for
from compressor.stages.checkpoints import Checkpoints, Resume
from compressor.stages.context import StageContext, StageReport
from compressor.stages.draft import draft_note
from compressor.stages.learners import adapters_of, chosen_slots, near_of
from compressor.stages.objective import Objective, Pupils
from compressor.stages.sharding import check_sharding, shard
from compressor.stages.student import make_student
from compressor.stages.teacher_cache import CacheKey, TeacherCache, key_of
from compressor.stages.trackers import Track, tracking
from compressor.stages.training import Callbacks, Progress, Spike, Training, held_out_rows

FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Task:
    """What every process needs to take part; `resume` is a checkpoint's file and journal meta.

    cache: of the teacher's targets, if there is one. spikes: steps that were undone so far.
    """

    config: DistillConfig
    teacher: ModelState
    student: ModelState
    tokens: Tensor
    seed: int
    cache: CacheKey | None = None
    resume: Resume | None = None
    spikes: tuple[int, ...] = ()


def apply(config: DistillConfig, context: StageContext) -> StageReport:
    """Train, and write the best state.

    Raises:
        RecipeError: nothing to train, or a student that cannot be made (RC17).
        DataError: text that cannot be used. NumericError: training diverged (NU10).
        ResourceError: another process of the training is gone (KI17).
    """
    start, notes = make_student(config, context)
    report = teach(config, context, start, lambda: _rows(config, context))
    return replace(report, facts=report.facts | {"notes": notes + report.facts["notes"]})


def teach(
    config: DistillConfig,
    context: StageContext,
    start: ModelState,
    rows_of: Callable[[], TokenRows],
) -> StageReport:
    """Train the student `start` on rows, unless that is done; give the best state.

    `rows_of` is called only if there is something left to train.
    """
    checkpoints = Checkpoints(config, context.run)
    if not _is_finished(context, len(start.blocks)):
        rows = rows_of()
        _check_same_rows(config, context, rows.digest)
        key = _filled_cache(config, context, rows.tokens)
        task = Task(config, context.original, start, rows.tokens, context.seed, key)
        training = _train(task, context, checkpoints)
        _write(context, training, start)
    facts = context.run.meta(FINISHED)
    notes = _notes(facts, config)
    facts["losses"] = checkpoints.losses()
    facts["teacher"] = context.original.checkpoint.digest
    state = _after(context, start, facts)
    return StageReport(state, facts | {"notes": notes})


def _notes(facts: dict[str, Any], config: DistillConfig) -> list[str]:
    """What a person should know about a finished training."""
    notes = []
    if facts["best_step"] == 0:
        notes.append("no step was better than the start on held-out rows: the start is kept")
    if facts["steps"] < config.steps:
        notes.append(f"held-out KL fell no more: stopped after {facts['steps']} steps")
    if facts["spikes"]:
        shown = ", ".join(map(str, facts["spikes"]))
        notes.append(f"the loss jumped at step {shown}: back to a checkpoint, on at half the rate")
    if config.student is not None:
        notes.append(draft_note(facts))
    return notes


def _filled_cache(config: DistillConfig, context: StageContext, tokens: Tensor) -> CacheKey | None:
    """The key of the teacher's cache after asking the teacher; None if the recipe wants none."""
    if not config.teacher.is_cached:
        return None
    digest = context.original.checkpoint.content_digest()
    held_out = held_out_rows(len(tokens), config)
    key = key_of(config, digest, tokens, held_out=held_out, seed=context.seed)
    cache = TeacherCache(config.teacher.cache, key)
    if cache.is_whole():
        return key
    teacher = WholeModel(context.original, device=processes.join().device)
    _check_count(config, teacher)

    def tell(index: int, total: int) -> None:
        context.run.progress({"unit": "teacher", "index": index, "total": total})

    cache.fill(teacher, tokens, tell)
    return key


def _check_count(config: DistillConfig, teacher: WholeModel) -> None:
    vocabulary = teacher.skeleton.model.config.get_text_config().vocab_size
    if config.teacher.targets == "top_k" and config.teacher.count >= vocabulary:
        raise RecipeError(
            f"top_k of {config.teacher.count} leaves nothing of {vocabulary} tokens",
            code="RC17",
            where=config.where("teacher.count"),
            fix="use a smaller count, or targets: full",
        )


def _rows(config: DistillConfig, context: StageContext) -> TokenRows:
    """The training rows.

    Raises:
        RecipeError: rows of several documents that must not see each other (RC17).
    """
    if config.data.packing == "packed":
        raise RecipeError(
            "distillation takes each row as one sequence: packing: packed is not for it",
            code="RC17",
            where=config.data.where("packing"),
            fix="use packing: rows, or packing: joined if documents may see each other",
        )
    return rows_for(config.data, context)


def help_training(task: Task) -> None:
    """Take part in the training of another process; nothing is written here."""
    with suppress(Spike), processes.together():  # process 0 sees a spike too and sends a new task
        _prepare(task).run(Callbacks(save=lambda tensors: None, report=lambda facts: None))


def replace_states(task: Task) -> Task:
    """The task as it can be sent to another process."""
    states = {n: processes.portable(getattr(task, n)) for n in ("teacher", "student")}
    return replace(task, **states)  # type: ignore[arg-type]


def _check_same_rows(config: DistillConfig, context: StageContext, digest: str) -> None:
    """A resumed run must see the rows it began with (KI13)."""
    if not context.run.is_done("rows"):
        context.run.commit_meta("rows", {"digest": digest})
    if context.run.meta("rows")["digest"] != digest:
        raise RecipeError(
            "the training text has changed since this run began",
            code="KI13",
            where=config.where("data"),
            fix="restore the text, or start anew with --fresh",
        )


def _prepare(task: Task) -> Training:
    device, config = processes.join().device, task.config
    cache = None if task.cache is None else TeacherCache(config.teacher.cache, task.cache)
    learns_codes = config.train == "codes"
    asked = cache is None or learns_codes  # codes start beside the teacher's weights
    teacher = WholeModel(task.teacher, device=device, with_blocks=asked)
    near = near_of(task.teacher, task.student, teacher) if learns_codes else None
    adapters = adapters_of(config, task.student, task.seed)
    student = WholeModel(task.student, device=device, near=near, adapters=adapters)
    _check_count(config, teacher)
    slots = chosen_slots(config, student.slots)
    if config.sharding == "fsdp" and processes.count() > 1:
        check_sharding(config, slots, processes.count())
        for slot in slots:
            slot.parameter.requires_grad_(True)
        slots = shard(student, slots, processes.count())
        shard(teacher, [], processes.count())
    pupils = Pupils(teacher, student, slots, _pairs(task.teacher, task.student))
    objective = Objective(config, pupils, cache=cache, seed=task.seed)
    training = Training(objective, task.tokens, seed=task.seed)
    if task.resume is not None:
        file, meta = task.resume
        training.restore(load_file(file), Progress(**meta["progress"]))
        if file.stem.startswith("step"):
            training.progress.losses = []
    training.progress.spikes = list(task.spikes) or training.progress.spikes
    return training


def _pairs(teacher: ModelState, student: ModelState) -> list[int]:
    """For each block of the student the teacher's block it stands for."""
    index = {ref.index: i for i, ref in enumerate(teacher.blocks)}
    if student.checkpoint.digest == teacher.checkpoint.digest:
        return [index[ref.index] for ref in student.blocks]
    last, count = len(teacher.blocks), len(student.blocks)
    return [round((i + 1) * last / count) - 1 for i in range(count)]


def _train(task: Task, context: StageContext, checkpoints: Checkpoints) -> Training:
    """Train to the end; after a spike of the loss, go back to a checkpoint and on."""
    task = replace(task, resume=checkpoints.newest())
    with tracking(task.config, context.run.path) as track:
        while True:
            processes.send(replace_states(task))
            training = _prepare(task)
            try:
                with processes.together():
                    training.run(_callbacks(training, context, checkpoints, track))
            except Spike as spike:
                spikes = [*training.progress.spikes, spike.step]
                if len(spikes) > task.config.spike_retries:
                    if task.config.sharding == "none":  # parts are put together by all processes
                        checkpoints.save_last_good(training)
                    raise training.diverged(spike) from spike
                checkpoints.forget_timed()
                task = replace(task, resume=checkpoints.newest(timed=False), spikes=tuple(spikes))
                continue
            return training


def _callbacks(
    training: Training, context: StageContext, checkpoints: Checkpoints, track: Track
) -> Callbacks:
    total = training.config.steps

    def report(facts: dict[str, float]) -> None:
        step, known = training.progress.step, training.progress.best_kl
        checkpoints.save_if_due(training)
        track(facts | {"held_out_kl": training.progress.validation[-1][1]}, step)
        event = {"unit": f"step-{step:07d}", "index": step, "total": total, "loss": facts["loss"]}
        context.run.progress(event | {"held_out_kl": known})

    return Callbacks(save=lambda tensors: checkpoints.save(training, tensors), report=report)


def _write(context: StageContext, training: Training, start: ModelState) -> None:
    """Commit the best state, block by block; codes and everything untrained as they were."""
    progress = training.progress
    if progress.best_step:
        skeleton = start.skeleton()
        for position in range(len(start.blocks)):
            source = start.read_block(position, skeleton)
            tensors = source.tensors | _learned(training, position)
            context.run.commit(_block_unit(position), tensors, source.meta())
        context.run.commit("outer", start.read_outer(skeleton) | _learned(training, OUTER), {})
    slots = training.pupils.slots
    trained = {k: sum(s.parameter.numel() for s in slots if s.kind == k) for k in _kinds(slots)}
    context.run.commit_meta(
        FINISHED,
        {
            "trained": trained,
            "steps": progress.step,
            "tokens": progress.step * training.config.batch_size * training.rows.shape[1],
            "held_out_rows": training.held_out_count,
            "kl_before": progress.validation[0][1],
            "kl_after": progress.best_kl,
            "best_step": progress.best_step,
            "validation": progress.validation,
            "spikes": progress.spikes,
            **{name: round(value, 6) for name, value in progress.best.items()},
        },
    )


def _kinds(slots: list[Slot]) -> list[str]:
    return sorted({s.kind for s in slots})


def _learned(training: Training, position: int) -> dict[str, Tensor]:
    mine = [s for s in training.pupils.slots if s.position == position]
    return {s.name: training.best[s.key] for s in mine}


def _block_unit(position: int) -> str:
    return f"block-{position:04d}"


def _is_finished(context: StageContext, num_blocks: int) -> bool:
    run = context.run
    if not run.is_done(FINISHED):
        return False
    if run.meta(FINISHED)["best_step"] == 0:
        return True
    units = [_block_unit(i) for i in range(num_blocks)] + ["outer"]
    return all(run.is_done(unit) for unit in units)


def _after(context: StageContext, start: ModelState, facts: dict[str, Any]) -> ModelState:
    state = replace(start, trail=(*context.state.trail, "distill"))
    if facts["best_step"] == 0:
        return state
    for position in range(len(start.blocks)):
        unit = _block_unit(position)
        state = state.with_block(position, context.run.file(unit), context.run.meta(unit))
    return replace(state, outer=context.run.file("outer"))
