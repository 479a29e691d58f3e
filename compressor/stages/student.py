"""A new, smaller student: the teacher's blocks, random weights, or a checkpoint of its own.

* `layers`: these blocks of the teacher; `depth`: so many of them, evenly spaced;
* only `num_hidden_layers` differs: evenly spaced blocks of the teacher, first and last included;
* another size differs: drawn at random from the seed, as transformers initialises such a model;
* `path`: any checkpoint that speaks the same vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from compressor.errors import CheckpointError, RecipeError, UnsupportedError
from compressor.modeling.checkpoint import open_checkpoint
from compressor.modeling.experts import is_fused_experts
from compressor.modeling.hub import resolve_model
from compressor.modeling.load import load_tokenizer
from compressor.modeling.skeleton import empty_model, parse_config
from compressor.modeling.state import BlockRef, ModelState
from compressor.recipe import DistillConfig
from compressor.stages.context import StageContext
from compressor.stages.prune_depth import config_with_layers, keep_layers
from compressor.stages.selection import stored_dtype

OUTER_UNIT = "student-outer"


def make_student(config: DistillConfig, context: StageContext) -> tuple[ModelState, list[str]]:
    """The student before training, and what a person should know about where it came from.

    Raises:
        RecipeError: sizes that make no model (RC17). CheckpointError: another vocabulary (CK37).
    """
    student = config.student
    if student is None:
        return context.state, []
    if student.path is not None:
        return _from_folder(student.path, config, context)
    if student.layers is not None:
        return _from_blocks(student.layers, config, context)
    total = len(context.original.blocks)
    if student.depth is not None:
        return _from_blocks(spaced(max(1, round(student.depth * total)), total), config, context)
    if set(student.sizes) == {"num_hidden_layers"}:
        count = student.sizes["num_hidden_layers"]
        kept = spaced(count, total) if count <= total else list(range(count))
        return _from_blocks(kept, config, context)
    return _from_seed(student.sizes, config, context)


def spaced(count: int, of: int) -> list[int]:
    """`count` of `of` positions, evenly spaced, the first and (if more than one) the last in."""
    if count == 1:
        return [0]
    return [round(i * (of - 1) / (count - 1)) for i in range(count)]


def _from_folder(
    name: str, config: DistillConfig, context: StageContext
) -> tuple[ModelState, list[str]]:
    path = resolve_model(name).path
    state = ModelState.of_checkpoint(open_checkpoint(path))
    theirs, ours = (vocabulary(p) for p in (path, context.source))
    sizes = {_vocab_size(s.config) for s in (state, context.original)}
    if len(sizes) > 1 or (theirs is not None and theirs != ours):
        raise CheckpointError(
            "the student's vocabulary is not the teacher's",
            code="CK37",
            where=config.where("student.path"),
            why="Their distributions are over different tokens and cannot be compared.",
            fix="choose a student with the same tokenizer",
        )
    return state, [f"the student starts from {path.name}"]


def vocabulary(path: Path) -> dict[str, int] | None:
    """Token to id of a folder's tokenizer; None without one."""
    tokenizer = load_tokenizer(path)
    return None if tokenizer is None else dict(tokenizer.get_vocab())


def _vocab_size(config: dict[str, Any]) -> int:
    return int(parse_config(config).get_text_config().vocab_size)


def _from_blocks(
    kept: list[int], config: DistillConfig, context: StageContext
) -> tuple[ModelState, list[str]]:
    total = len(context.original.blocks)
    if kept[-1] >= total:
        raise _impossible(config, f"the teacher has {total} blocks, no block {kept[-1]}")
    note = f"the student starts from the teacher's blocks {kept}"
    return keep_layers(context.original, kept), [note]


def _from_seed(
    sizes: dict[str, int], config: DistillConfig, context: StageContext
) -> tuple[ModelState, list[str]]:
    teacher = context.original
    count = sizes.get("num_hidden_layers", len(teacher.blocks))
    kept = spaced(min(count, len(teacher.blocks)), len(teacher.blocks))
    if count > len(kept):
        raise _impossible(config, f"the teacher has {len(kept)} blocks, fewer than {count}")
    names = parse_config(teacher.config).attribute_map
    new = config_with_layers(teacher.config, kept)
    new |= {names.get(key, key): value for key, value in sizes.items()}
    if new.get("head_dim") and {"hidden_size", "num_attention_heads"} & sizes.keys():
        new["head_dim"] = new["hidden_size"] // new["num_attention_heads"]
    run, units = context.run, [f"student-{i:04d}" for i in range(count)]
    if not all(run.is_done(unit) for unit in [*units, OUTER_UNIT]):
        _draw(new, config, context)
    refs = tuple(
        BlockRef(index, run.file(unit), run.meta(unit))
        for index, unit in zip(kept, units, strict=True)
    )
    outer = run.file(OUTER_UNIT)
    shown = ", ".join(f"{key} {value}" for key, value in sizes.items())
    note = f"the student ({shown}) starts from random weights"
    return replace(teacher, config=new, blocks=refs, outer=outer), [note]


def _draw(new: dict[str, Any], config: DistillConfig, context: StageContext) -> None:
    """Initialise from the seed and commit as units."""
    try:
        parsed = parse_config(new)
        empty = empty_model(new)
    except UnsupportedError:
        raise
    except Exception as error:  # configuration classes raise what they like
        raise _impossible(config, str(error).strip().splitlines()[-1]) from error
    if any(is_fused_experts(m) for m in empty.modules()):
        raise UnsupportedError(
            "a student with experts cannot start from random weights",
            code="CK26",
            where=config.where("student"),
            fix="give only num_hidden_layers, or the path of a student",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        model = AutoModelForCausalLM.from_config(parsed, dtype=torch.float32)
    skeleton = context.original.skeleton()
    stored, infos = stored_dtype(context.original), context.original.checkpoint.tensors.values()
    dtype = next(info.dtype for info in infos if info.dtype_name == stored)
    tensors = {n: t.to(dtype) for n, t in model.state_dict().items()}
    for i in range(len(model.get_submodule(skeleton.blocks_name))):
        prefix = f"{skeleton.blocks_name}.{i}."
        mine = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        context.run.commit(f"student-{i:04d}", mine, {"formats": {}, "masked": []})
    outer = {n: tensors[n] for n in skeleton.outer_names()}
    context.run.commit(OUTER_UNIT, outer, {})


def _impossible(config: DistillConfig, problem: str) -> RecipeError:
    return RecipeError(
        f"no such student can be made: {problem}",
        code="RC17",
        where=config.where("student"),
        fix="change the student's sizes",
    )
