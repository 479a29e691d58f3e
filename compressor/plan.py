"""What a run will cost and give, before it starts: from headers, shapes and the recipe alone.

Bytes of a uniform scheme are exact; with a budget they are the budget. Memory and time are
estimates whose formulas stand beside them. `preflight` refuses what cannot work: patterns that
match nothing, groups that do not fit, a disk that is too small.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import BaseModel

from compressor.errors import RecipeError, ResourceError, Where
from compressor.modeling.block import held_bytes
from compressor.modeling.checkpoint import open_checkpoint
from compressor.modeling.device import CPU
from compressor.modeling.hub import resolve_model
from compressor.modeling.skeleton import Skeleton, tied_names
from compressor.modeling.state import ModelState
from compressor.modeling.walk import PAUSE_BYTES
from compressor.recipe import (
    Budget,
    CalibrateConfig,
    DistillConfig,
    EvaluateConfig,
    PackConfig,
    PruneConfig,
    QuantizeConfig,
    Recipe,
    TransformConfig,
    parse_size,
)
from compressor.recipe.budget import parse_footprint
from compressor.recipe.data import SELF
from compressor.stages.candidates import legal_candidates
from compressor.stages.distill_costs import distill_costs, training_bytes
from compressor.stages.duration import candidate_count, seconds
from compressor.stages.outer import outer_bytes
from compressor.stages.selection import (
    Selection,
    block_linears,
    dense_bytes,
    fallbacks,
    select,
    uniform_formats,
)

BASE_MEMORY = 600 << 20  # interpreter, torch and transformers
REWRITING = (PruneConfig, DistillConfig, TransformConfig)  # stages that store all blocks anew


@dataclass(frozen=True, slots=True)
class Plan:
    """Tables for people and the same as JSON.

    values: every key of the resolved recipe, its value and where it came from.
    patterns: what every pattern matched.
    costs: bytes, memory, disk and time.
    notes: fallbacks that will be taken.
    """

    values: list[dict[str, Any]]
    patterns: list[dict[str, Any]]
    costs: list[dict[str, Any]]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """One object."""
        return {name: getattr(self, name) for name in Plan.__slots__}


def make_plan(recipe: Recipe, device: torch.device = CPU) -> Plan:
    """Plan a recipe for a device; reads headers, no weights.

    Raises:
        CompressError: whatever would stop the run before it starts.
    """
    resolved = resolve_model(recipe.model.path, revision=recipe.model.revision)
    checkpoint = open_checkpoint(
        resolved.path,
        trust_remote_code=recipe.model.trust_remote_code,
        allow_missing=tuple(recipe.model.allow_missing),
    )
    state = ModelState.of_checkpoint(checkpoint)
    patterns, notes = _patterns(recipe, state)
    return Plan(_values(recipe), patterns, _costs(recipe, state, device), notes)


def preflight(recipe: Recipe, state: ModelState, run_path: Path) -> None:
    """Refuse a run that cannot succeed.

    Raises:
        RecipeError: patterns, formats or group sizes that do not fit the model.
        ResourceError: not enough disk (RE01) or memory (RE06).
    """
    repairing_gate(recipe)
    _patterns(recipe, state)
    _check_untied(recipe, state)
    _check_memory(recipe, state)
    needed = disk_bytes(recipe, state)
    there = next(p for p in (run_path, *run_path.parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ResourceError(
            f"the run needs about {needed:,} bytes of disk, {free:,} are free",
            code="RE01",
            where=Where(str(run_path)),
            why="Nothing was started.",
            fix="free some space, or choose another place with --run-dir",
        )


def repairing_gate(recipe: Recipe) -> tuple[int, int, int] | None:
    """Places of the quantize stage and the gate that repairs it, and its rounds at most.

    Raises:
        RecipeError: there is no quantize stage before such a gate (RC17).
    """
    for index, stage in reversed(list(enumerate(recipe.stages))):
        gate = stage.gate if isinstance(stage, EvaluateConfig) else None
        if gate is None or gate.on_fail != "repair":
            continue
        before = [i for i, s in enumerate(recipe.stages[:index]) if isinstance(s, QuantizeConfig)]
        if before:
            return before[-1], index, gate.repair_rounds
        raise RecipeError(
            "on_fail: repair needs a quantize stage before the gate",
            code="RC17",
            where=stage.where("gate.on_fail"),
            why="A repair gives more bits to some layers.",
            fix="use on_fail: keep_aside",
        )
    return None


def _check_memory(recipe: Recipe, state: ModelState) -> None:
    needed, there = memory_bytes(recipe, state), psutil.virtual_memory().total
    if needed > there:
        raise ResourceError(
            f"the run needs about {needed:,} bytes of memory, this machine has {there:,}",
            code="RE06",
            where=Where(key="stages"),
            why="Distillation and evaluation hold whole models in float32; nothing was started.",
            fix="leave those stages to a larger machine: quantize and prune hold one block",
        )


def _values(recipe: Recipe) -> list[dict[str, Any]]:
    """Every key, its value and origin: a line, `--set` (or a key it follows from), or default."""
    rows: list[dict[str, Any]] = []

    def visit(value: Any, path: str, is_set: bool) -> None:
        if isinstance(value, BaseModel):
            for key in type(value).model_fields:
                below = f"{path}.{key}" if path else key
                visit(getattr(value, key), below, key in value.model_fields_set)
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            for index, item in enumerate(value):
                visit(item, f"{path}.{index}", True)
        else:
            line = recipe.line_of(path)
            origin = f"line {line}" if line else "--set or derived" if is_set else "default"
            rows.append({"key": path, "value": value, "origin": origin})

    visit(recipe, "", True)
    return rows


def _patterns(recipe: Recipe, state: ModelState) -> tuple[list[dict[str, Any]], list[str]]:
    """What patterns match, as long as names are those of the original model."""
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    skeleton = state.skeleton()
    for index, stage in enumerate(recipe.stages):
        if isinstance(stage, QuantizeConfig):
            selection = select(stage, skeleton)
            notes += _check_formats(stage, selection, state)
            for pattern, names in selection.matched.items():
                first = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
                row = {"stage": f"{index}-quantize", "pattern": pattern}
                rows.append(row | {"matches": len(names), "first": first})
        if _reshapes(stage):
            break
    return rows, notes


def _reshapes(stage: Any) -> bool:
    if isinstance(stage, PruneConfig):
        return any(way is not None for way in (stage.width, stage.depth, stage.target))
    return isinstance(stage, DistillConfig) and stage.student is not None


def _check_formats(stage: QuantizeConfig, selection: Selection, state: ModelState) -> list[str]:
    if not selection.targets:
        raise RecipeError(
            "no linear layer is left to quantize", code="RC14", where=stage.where("targets")
        )
    uniform = uniform_formats(stage, selection, state)
    if stage.budget is None:
        return fallbacks(uniform, stage.preset)
    legal_candidates(stage)
    return []


def weight_bytes(recipe: Recipe, state: ModelState) -> tuple[int, bool]:
    """Bytes of the artifact's weight files, and whether they are exact."""
    total = sum(info.nbytes for info in state.checkpoint.tensors.values())
    exact = True
    skeleton = state.skeleton()
    total += _untied_bytes(recipe, state)
    for stage in recipe.stages:
        if isinstance(stage, QuantizeConfig):
            selection = select(stage, skeleton)
            dense = dense_bytes(state)
            weights = sum(t.shape[0] * t.shape[1] for t in selection.targets)
            if stage.budget is None:
                formats = uniform_formats(stage, selection, state)
                packed = sum(formats[t.name].packed_bytes(t.shape) for t in selection.targets)
                total += packed - weights * dense
                exact = exact and not stage.protect_auto
            else:
                total, exact = _most_bytes(stage.budget, total, weights, dense), False
            before, after = outer_bytes(stage, state)
            total += after - before + 8 * len(state.blocks) * (stage.kv_cache != "none")
        elif _reshapes(stage):
            exact = False
    return total, exact


def _untied_bytes(recipe: Recipe, state: ModelState) -> int:
    """Bytes by which a rotation lets a tied head part from the embedding."""
    model = state.skeleton().model
    rotates = any(isinstance(s, TransformConfig) and s.method == "rotate" for s in recipe.stages)
    if not rotates or not tied_names(model):
        return 0
    embedding: int = model.get_input_embeddings().weight.numel()
    return embedding * dense_bytes(state)


def _check_untied(recipe: Recipe, state: ModelState) -> None:
    extra = _untied_bytes(recipe, state)
    for stage in recipe.stages if extra else ():
        if isinstance(stage, QuantizeConfig) and stage.budget and stage.budget.size is not None:
            raise RecipeError(
                f"a budget in bytes does not count the {extra:,} bytes of the head that the "
                "rotation parts from the embedding",
                code="RC17", where=stage.where("budget.size"),
                fix="give average_bits, or scale with method: awq instead of rotating",
            )  # fmt: skip


def disk_bytes(recipe: Recipe, state: ModelState) -> int:
    """Peak disk: a copy of the blocks for each stage that changes weights, and the artifact."""
    size, _ = weight_bytes(recipe, state)
    original = sum(info.nbytes for info in state.checkpoint.tensors.values())
    changing = sum(isinstance(s, REWRITING) for s in recipe.stages)
    repairs = repairing_gate(recipe)
    quantizing = repairs[2] if repairs else 0
    for stage in recipe.stages:
        if isinstance(stage, QuantizeConfig):
            quantizing += 1 if stage.budget is None else candidate_count(stage.budget)
    packs = any(isinstance(s, PackConfig) for s in recipe.stages)
    return original * changing + size * (quantizing + packs) + (64 << 20)


def _most_bytes(budget: Budget, total: int, weights: int, dense: int) -> int:
    """Bytes of all files that a budget allows at most."""
    limits = [total]
    if budget.average_bits is not None:
        limits.append(total - weights * dense + int(weights * budget.average_bits / 8))
    if budget.size is not None:
        limits.append(parse_size(budget.size))
    if budget.fits is not None:
        limits.append(parse_footprint(budget.fits).num_bytes)
    return min(limits)


def memory_bytes(recipe: Recipe, state: ModelState) -> int:
    """Peak memory: one block in its stored form twice, statistics, a micro-batch, the outer part.

    A transform holds the block in float32 besides. Distillation, evaluation and text that the model
    writes itself hold whole models: they count as float32, what learns with its moments.
    """
    skeleton = state.skeleton()
    blocks = _block_weights(skeleton)
    stored = dense_bytes(state)
    widest = max((t.shape[1] for t in block_linears(skeleton)), default=0)
    largest = max((t.shape[0] * t.shape[1] for t in block_linears(skeleton)), default=0)
    total = sum(info.nbytes for info in state.checkpoint.tensors.values()) // stored
    outer = total - sum(blocks)
    copies = 2 * stored + 4 if _transforms(recipe) else stored + 2
    dense = max(3 * 4 * largest, held_bytes(max(blocks)))
    walk = max(blocks) * copies + 6 * 4 * widest**2 + dense + 4 * outer
    walk += _waiting_bytes(recipe, skeleton) + _learning_bytes(recipe, max(blocks))
    whole = 8 * total if _holds_whole_models(recipe) else 0
    whole = max(whole, training_bytes(recipe, state, total))
    return BASE_MEMORY + max(walk, whole)


def _learning_bytes(recipe: Recipe, weights: int) -> int:
    """Learned rounding holds weights, offsets, gradients, two moments and the best state."""
    learns = any(isinstance(s, QuantizeConfig) and s.learns for s in recipe.stages)
    return 6 * 4 * weights if learns else 0


def _holds_whole_models(recipe: Recipe) -> bool:
    if any(isinstance(s, (DistillConfig, EvaluateConfig)) for s in recipe.stages):
        return True
    if any(isinstance(s, QuantizeConfig) and s.effort == "max" for s in recipe.stages):
        return True
    return any(isinstance(s, CalibrateConfig) and SELF in s.data.names for s in recipe.stages)


def _waiting_bytes(recipe: Recipe, skeleton: Skeleton) -> int:
    """What micro-batches hold while they wait inside a block (`stages.statistics`), at most."""
    if not any(isinstance(s, (QuantizeConfig, PruneConfig)) for s in recipe.stages):
        return 0
    rows = [s.data for s in recipe.stages if isinstance(s, CalibrateConfig)]
    tokens = max((d.num_samples * d.seq_len for d in rows), default=0)
    inputs = {t.shape[1] for t in block_linears(skeleton)}
    return min(PAUSE_BYTES, 4 * tokens * (7 * min(inputs, default=0) + 3 * max(inputs, default=0)))


def _transforms(recipe: Recipe) -> bool:
    return any(isinstance(s, TransformConfig) for s in recipe.stages)


def _block_weights(skeleton: Skeleton) -> list[int]:
    sums = [0] * skeleton.num_blocks
    for target in block_linears(skeleton):
        sums[target.position] += target.shape[0] * target.shape[1]
    return sums


def _costs(recipe: Recipe, state: ModelState, device: torch.device) -> list[dict[str, Any]]:
    size, exact = weight_bytes(recipe, state)
    original = sum(info.nbytes for info in state.checkpoint.tensors.values())
    return [
        {"what": "original weights, bytes", "value": original, "kind": "exact"},
        {
            "what": "artifact weights, bytes",
            "value": size,
            "kind": "exact" if exact else "at most (budget or shapes decide)",
        },
        {"what": "peak memory, bytes", "value": memory_bytes(recipe, state), "kind": "estimate"},
        {"what": "peak disk, bytes", "value": disk_bytes(recipe, state), "kind": "estimate"},
        *distill_costs(recipe, state),
        {
            "what": f"time on {device}, seconds",
            "value": round(seconds(recipe, state, device), 1),
            "kind": "estimate within 2-3 times",
        },
    ]
