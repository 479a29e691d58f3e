"""Which orders of stages make sense, and settings that contradict one another.

Stages may come in any order and as often as wanted, with these exceptions: `pack` ends the changes
of the weights; `verify` and `evaluate` look at what `pack` wrote; a stage that needs statistics
needs a `calibrate` somewhere before it (one is enough: later stages collect their own statistics
on the same tokens); and nothing may throw away what an earlier stage made.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from compressor.errors import RecipeError
from compressor.recipe.base import Part
from compressor.recipe.distillation import DistillConfig
from compressor.recipe.models import Recipe
from compressor.recipe.patterns import check_patterns
from compressor.recipe.presets import (
    LOADERS,
    SCHEMES,
    Preset,
    candidate_preset,
    loads,
    loads_embedding,
)
from compressor.recipe.pruning import PruneConfig
from compressor.recipe.quantization import QuantizeConfig
from compressor.recipe.transforms import TransformConfig


def check_order(recipe: Recipe) -> None:
    """Refuse nonsensical orders and contradictions, naming both stages and both lines."""
    kinds = [stage.kind for stage in recipe.stages]
    if "pack" not in kinds:
        raise RecipeError(
            "no stage writes the result", code="RC17", where=recipe.where("stages"),
            fix="add `- kind: pack` after the last stage that changes weights",
        )  # fmt: skip
    for index in range(len(kinds)):
        for check in _CHECKS:
            check(recipe, index)


def needs_calibration(stage: Part) -> str:
    """Why a stage needs calibration tokens; empty if it does not."""
    if isinstance(stage, QuantizeConfig):
        if not stage.is_data_free:
            return "gptq solves against activations"
        if stage.budget is not None:
            return "a budget is spent by measured sensitivity"
        if stage.scheme == "NVFP4":
            return "the inputs of NVFP4 layers have a calibrated scale (NVFP4A16 has none)"
        if stage.kv_cache != "none":
            return "the scales of keys and values are calibrated"
        return "protect_auto ranks layers by sensitivity" if stage.protect_auto else ""
    if isinstance(stage, TransformConfig):
        return f"{stage.method} scales by activations" if stage.method != "rotate" else ""
    if isinstance(stage, PruneConfig):
        if any(way is not None for way in (stage.width, stage.depth, stage.target)):
            return "channels and blocks are ranked by activations"
        if stage.method != "magnitude":
            return f"{stage.method} weighs by activations"
        if stage.allocation == "measured":
            return "allocation: measured measures damage"
        return "reconstruct: true solves against activations" if stage.reconstruct else ""
    return ""


def _conflict(recipe: Recipe, earlier: int, later: int, message: str, fix: str) -> RecipeError:
    first, second = recipe.where(f"stages.{earlier}"), recipe.where(f"stages.{later}")
    name = f"`{recipe.stages[later].kind}` (line {second.line or '-'})"
    before = f"`{recipe.stages[earlier].kind}` (line {first.line or '-'})"
    text = message.format(later=name, earlier=before)
    return RecipeError(text, code="RC17", where=second, fix=fix)


def _nothing_changes_after_pack(recipe: Recipe, index: int) -> None:
    kinds = [stage.kind for stage in recipe.stages[:index]]
    if "pack" in kinds and recipe.stages[index].kind not in ("verify", "evaluate"):
        raise _conflict(
            recipe, kinds.index("pack"), index,
            "{later} comes after {earlier}: what is packed is final",
            "move it before pack; after pack only verify and evaluate may follow",
        )  # fmt: skip


def _looks_only_at_packed(recipe: Recipe, index: int) -> None:
    kinds = [stage.kind for stage in recipe.stages]
    if kinds[index] in ("verify", "evaluate") and "pack" not in kinds[:index]:
        raise _conflict(
            recipe, kinds.index("pack"), index,
            "{later} comes before {earlier}, but it looks at what pack wrote",
            f"move {kinds[index]} after pack",
        )  # fmt: skip


def _calibrate_before(recipe: Recipe, index: int) -> None:
    kinds = [stage.kind for stage in recipe.stages]
    stage = recipe.stages[index]
    reason = needs_calibration(stage)
    if not reason or "calibrate" in kinds[:index]:
        return
    if "calibrate" in kinds:
        raise _conflict(
            recipe, index, kinds.index("calibrate"),
            "{later} comes after {earlier}, which needs it: " + reason,
            "move calibrate to the front",
        )  # fmt: skip
    raise RecipeError(
        f"`{stage.kind}` needs a calibrate stage before it: {reason}",
        code="RC17", where=recipe.where(f"stages.{index}"),
        fix="add `- kind: calibrate` before it",
    )  # fmt: skip


def _quantizes_once(recipe: Recipe, index: int) -> None:
    kinds = [stage.kind for stage in recipe.stages[:index]]
    if recipe.stages[index].kind == "quantize" and "quantize" in kinds:
        raise _conflict(
            recipe, kinds.index("quantize"), index,
            "{later} would quantize what {earlier} has quantized already",
            "keep one of them; mix formats with budget and protect",
        )  # fmt: skip


def _student_comes_first(recipe: Recipe, index: int) -> None:
    stage = recipe.stages[index]
    if not (isinstance(stage, DistillConfig) and stage.student is not None):
        return
    for earlier, other in enumerate(recipe.stages[:index]):
        if other.kind in ("quantize", "prune", "transform"):
            raise _conflict(
                recipe, earlier, index,
                "{later} starts a new student, which throws away what {earlier} made",
                "distill the student first",
            )  # fmt: skip


def _scales_need_a_grid(recipe: Recipe, index: int) -> None:
    stage = recipe.stages[index]
    kinds = [stage.kind for stage in recipe.stages[:index]]
    if isinstance(stage, DistillConfig) and stage.train == "scales" and "quantize" not in kinds:
        raise RecipeError(
            "`train: scales` needs a quantize stage before it: there are no scales yet",
            code="RC17", where=stage.where("train"), fix="use train: auto",
        )  # fmt: skip


def _warmup_within_steps(recipe: Recipe, index: int) -> None:
    stage = recipe.stages[index]
    if isinstance(stage, DistillConfig) and stage.warmup_steps > stage.steps:
        raise RecipeError(
            f"warmup_steps {stage.warmup_steps} (line {stage.where('warmup_steps').line or '-'}) "
            f"is more than steps {stage.steps} (line {stage.where('steps').line or '-'})",
            code="RC17", where=stage.where("warmup_steps"), fix="use fewer warm-up steps",
        )  # fmt: skip


def _budget_is_reachable(recipe: Recipe, index: int) -> None:
    stage = recipe.stages[index]
    if not (isinstance(stage, QuantizeConfig) and stage.budget and stage.budget.average_bits):
        return
    presets = [candidate_preset(label, stage.preset.group_size) for label in stage.candidates]
    floor = min(16.0 if preset is None else preset.bits_per_weight for preset in presets)
    if stage.budget.average_bits < floor:
        feasible = math.ceil(floor * 1000) / 1000
        raise RecipeError(
            f"average_bits {stage.budget.average_bits:g} (line "
            f"{stage.where('budget.average_bits').line or '-'}) is below the smallest candidate "
            f"(line {stage.where('candidates').line or '-'}), which takes {feasible:g}",
            code="RC17", where=stage.where("budget.average_bits"),
            fix=f"use at least {feasible:g}, or add a smaller candidate of {', '.join(SCHEMES)}",
        )  # fmt: skip


def _engines_can_read(recipe: Recipe, index: int) -> None:
    stage = recipe.stages[index]
    if not isinstance(stage, QuantizeConfig):
        return
    key = "candidates" if stage.budget else "scheme"
    labels = stage.candidates if stage.budget else []
    presets = [candidate_preset(label, stage.preset.group_size) for label in labels]
    for preset in presets if stage.budget else [stage.preset]:
        for engine in stage.engines:
            _refuse_unreadable(stage, preset, engine, key)


def _refuse_unreadable(stage: QuantizeConfig, preset: Preset | None, engine: str, key: str) -> None:
    if preset is None or engine not in ("vllm", "sglang") or loads(engine, preset):
        return
    loader, named = LOADERS[engine], f"engine {engine} (line {stage.where('engines').line or '-'})"
    place = f"({key}, line {stage.where(key).line or '-'})"
    if preset.is_fixed:
        label = next(name for name, known in SCHEMES.items() if known == preset)
        text, fix = f"does not read {label}", f"{engine} reads {', '.join(sorted(loader.fixed))}"
    elif preset.group_size not in loader.group_sizes:
        text = f"does not read groups of {preset.group_size}"
        fix = f"{engine} reads groups of {', '.join(map(str, sorted(loader.group_sizes)))}"
    else:
        kind = "symmetric" if preset.symmetric else "asymmetric"
        widths = loader.symmetric if preset.symmetric else loader.asymmetric
        text = f"does not read {kind} {preset.bits}-bit layers"
        fix = f"{engine} reads {kind} {', '.join(map(str, sorted(widths)))} bit"
    raise RecipeError(
        f"{named} {text} {place}", code="RC17", where=stage.where(key), fix=f"{fix}; change either"
    )


def _fixed_schemes_are_fixed(recipe: Recipe, index: int) -> None:
    stage = recipe.stages[index]
    if not isinstance(stage, QuantizeConfig) or not SCHEMES[stage.scheme].is_fixed:
        return
    for key in ("bits", "symmetric", "group_size"):
        if getattr(stage, key) is not None and not stage.budget:
            raise RecipeError(
                f"{stage.scheme} has {key} of its own (scheme, line "
                f"{stage.where('scheme').line or '-'})",
                code="RC17", where=stage.where(key), fix=f"remove {key}, or take a W<bits>A16",
            )  # fmt: skip


def _embeddings_are_readable(recipe: Recipe, index: int) -> None:
    stage = recipe.stages[index]
    if not isinstance(stage, QuantizeConfig):
        return
    for engine in stage.engines:
        if not loads_embedding(engine, stage.embeddings):
            raise RecipeError(
                f"engine {engine} (line {stage.where('engines').line or '-'}) does not read "
                f"{stage.embeddings} embeddings",
                code="RC17", where=stage.where("embeddings"),
                fix="W8A16 loads in transformers and ours, W4A16 in ours alone; change either",
            )  # fmt: skip


def _patterns_are_safe(recipe: Recipe, index: int) -> None:
    stage = recipe.stages[index]
    for key in ("targets", "ignore", "protect"):
        check_patterns(getattr(stage, key, []), where=stage.where(key))
    if isinstance(stage, DistillConfig):
        check_patterns(stage.adapters.targets, where=stage.where("lora.targets"))


def _transforms_dense_weights(recipe: Recipe, index: int) -> None:
    stage = recipe.stages[index]
    if not isinstance(stage, TransformConfig):
        return
    for earlier, other in enumerate(recipe.stages[:index]):
        if other.kind == "quantize":
            raise _conflict(
                recipe, earlier, index,
                "{later} comes after {earlier}: what is rounded can be neither scaled nor rotated",
                "move transform before quantize",
            )  # fmt: skip
        if stage.method == "rotate":
            _rotates_whole_weights(recipe, earlier, index)


def _rotates_whole_weights(recipe: Recipe, earlier: int, index: int) -> None:
    other = recipe.stages[earlier]
    if isinstance(other, PruneConfig) and (other.sparsity or other.pattern):
        raise _conflict(
            recipe, earlier, index,
            "{later} would mix the zeros of {earlier} with other weights",
            "rotate before prune, or scale with method: awq, which keeps zeros",
        )  # fmt: skip
    if isinstance(other, TransformConfig) and other.method != "rotate":
        raise _conflict(
            recipe, earlier, index,
            "{later} would undo {earlier}: scales fit the channels they were searched on",
            "rotate first, then scale",
        )  # fmt: skip


def _hidden_states_comparable(recipe: Recipe, index: int) -> None:
    stage = recipe.stages[index]
    if not isinstance(stage, DistillConfig):
        return
    for earlier, other in enumerate(recipe.stages[:index]):
        if not isinstance(other, TransformConfig):
            continue
        if stage.attention_weight:
            raise _conflict(
                recipe, earlier, index,
                "{later} compares queries, keys and values, which {earlier} has changed",
                "use attention_weight: 0, or distill before the transform",
            )  # fmt: skip
        if stage.hidden_weight and other.method == "rotate":
            raise _conflict(
                recipe, earlier, index,
                "{later} compares hidden states, which {earlier} has rotated",
                "use hidden_weight: 0, or distill before the rotation",
            )  # fmt: skip


def _scales_searched_for_the_grid(recipe: Recipe, index: int) -> None:
    stage = recipe.stages[index]
    if not (isinstance(stage, TransformConfig) and stage.method == "awq"):
        return
    following = [s for s in recipe.stages[index:] if isinstance(s, QuantizeConfig)]
    if not following or following[0].budget is not None or following[0].preset.number == "float":
        return  # several grids, or one that awq can only approximate
    for key in ("bits", "group_size", "symmetric"):
        mine, theirs = getattr(stage, key), getattr(following[0].preset, key)
        if mine != theirs:
            raise RecipeError(
                f"awq searches scales for {key} {mine} (line {stage.where(key).line or '-'}), but "
                f"quantize (line {following[0].where().line or '-'}) uses {theirs}",
                code="RC17", where=stage.where(key),
                fix=f"set {key}: {str(theirs).lower()} in the transform stage",
            )  # fmt: skip


_CHECKS: tuple[Callable[[Recipe, int], None], ...] = (
    _nothing_changes_after_pack,
    _looks_only_at_packed,
    _calibrate_before,
    _quantizes_once,
    _student_comes_first,
    _scales_need_a_grid,
    _warmup_within_steps,
    _budget_is_reachable,
    _engines_can_read,
    _fixed_schemes_are_fixed,
    _embeddings_are_readable,
    _patterns_are_safe,
    _transforms_dense_weights,
    _hidden_states_comparable,
    _scales_searched_for_the_grid,
)
