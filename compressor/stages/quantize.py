"""Quantize: one scheme for all linears, or a mixture of formats within a budget.

Block by block with one block in memory: load, collect statistics, solve, commit the unit, and feed
what was *stored* to the next block. A resumed run replays the forward passes of finished blocks
from their units and goes on, so it ends with the same bytes.

With a budget, the mixture is chosen from measured sensitivities, materialised next to the best
uniform format that fits, and the one with the lower KL divergence on held-out rows is kept.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import Any

from compressor.errors import RecipeError
from compressor.modeling.block import Block, block_tensors, load_block
from compressor.modeling.state import BlockTensors, ModelState
from compressor.recipe import QuantizeConfig
from compressor.stages.blockwise import Rewritten, Sweep, change_blocks
from compressor.stages.budget import protect_most_sensitive
from compressor.stages.context import StageContext, StageReport
from compressor.stages.duration import quantize_seconds
from compressor.stages.expert_statistics import expert_notes
from compressor.stages.learned import block_learner
from compressor.stages.outer import quantize_outer
from compressor.stages.ranges import add_ranges, needs_input_scales
from compressor.stages.recovery import recover, with_own_rows
from compressor.stages.repair import present_formats, repair_blocks
from compressor.stages.search import mix
from compressor.stages.selection import Selection, fallbacks, select, uniform_formats
from compressor.stages.solve import BlockSolver, Formats, round_to_nearest

log = logging.getLogger("compressor.stages.quantize")


def apply(config: QuantizeConfig, context: StageContext) -> StageReport:
    """Quantize the linears that the recipe targets.

    Raises:
        RecipeError: patterns, groups or budget do not fit this model.
        NumericError: non-finite weights or activations.
    """
    skeleton = context.state.skeleton()
    selection = select(config, skeleton)
    _check_dense(context.state, config)
    _announce(config, context)
    if config.effort == "max":
        context = with_own_rows(config, context)
    notes: list[str] = list(selection.notes)
    uniform = uniform_formats(config, selection, context.state)
    make = partial(materialise, config, context)
    facts: dict[str, Any] = {"allocation": None}
    if context.repair is not None:
        chosen, facts = repair_blocks(config, context, selection, make)
    elif config.budget is None:
        notes += fallbacks(uniform, config.preset)
        if config.protect_auto:
            kept = protect_most_sensitive(config, context, uniform)
            notes.append(f"protected as the most sensitive: {', '.join(kept)}")
            uniform = {name: fmt for name, fmt in uniform.items() if name not in kept}
        chosen = make(uniform)
    else:
        chosen, facts = _mixed(config, context, selection)
    notes += facts.get("search_notes", [])
    state = chosen.state
    if config.effort == "max" and any(ref.meta.get("formats") for ref in state.blocks):
        state, facts["recovery"] = recover(config, context, state)
    state, outer = quantize_outer(config, context, state)
    if needs_input_scales(state) or config.kv_cache != "none":
        state = add_ranges(context, state, kv_cache=config.kv_cache != "none")
    notes += _numeric_notes(chosen.linears) + expert_notes(chosen.linears)
    facts |= {"linears": chosen.linears, "held_out_kl": chosen.held_out_kl, "notes": notes}
    notes += outer.get("notes", [])
    facts |= {"outer": outer.get("layers", {})}
    facts |= {"matched": selection.matched, "protected": [t.name for t in selection.protected]}
    return StageReport(replace(state, trail=(*context.state.trail, "quantize")), facts)


def _mixed(
    config: QuantizeConfig, context: StageContext, selection: Selection
) -> tuple[Rewritten, dict[str, Any]]:
    """The mixture for a budget, searched at the default effort, made at the effort asked for.

    Learning every candidate would take ten times as long and moves all of them alike.
    """
    search = config
    if config.learns:
        search = config.model_copy(update={"effort": "default", "learning": None, "recovery": None})
    chosen, facts = mix(search, context, selection, partial(materialise, search, context))
    if not config.learns:
        return chosen, facts
    learned = materialise(config, context, present_formats(chosen.state), tag="learned-")
    return learned, facts | {"held_out_kl_of_search": chosen.held_out_kl}


def _announce(config: QuantizeConfig, context: StageContext) -> None:
    """Say how long the stage will take."""
    rows = (0, 0) if context.tokens is None else tuple(context.tokens.tokens.shape)
    estimate = quantize_seconds(config, context.state, rows, context.device)  # type: ignore[arg-type]
    log.info("quantize: effort %s, about %.0f s on %s", config.effort, estimate, context.device)


def _numeric_notes(linears: dict[str, Any]) -> list[str]:
    """What the solver had to do besides rounding, counted over the linears."""
    heads = {n: f for n, f in linears.items() if "stacked_on" not in f}
    notes = [f"{n}: {f['factor']}" for n, f in heads.items() if f.get("factor")]
    dead = sum(f.get("num_dead", 0) for f in heads.values())
    raised = sum(f.get("num_scales_raised", 0) for f in heads.values())
    if dead:
        notes.append(f"{dead} input columns were always zero in calibration: rounded to nearest")
    if raised:
        notes.append(f"{raised} scales were raised to the smallest number of their dtype")
    return notes


def _check_dense(state: ModelState, config: QuantizeConfig) -> None:
    if any(ref.meta.get("formats") for ref in state.blocks):
        raise RecipeError(
            "the model is quantized already",
            code="RC17",
            where=config.where("kind"),
            fix="keep one quantize stage",
        )


def materialise(
    config: QuantizeConfig,
    context: StageContext,
    formats: Formats,
    *,
    tag: str = "",
    base: ModelState | None = None,
) -> Rewritten:
    """Quantize into the formats given by full linear name.

    Blocks before the first one that differs from `base`, a quantized model of the same stage, are
    taken over from it.
    """
    by_block = _by_block(formats, context.state)
    if config.is_data_free or context.tokens is None:
        return change_blocks(
            context,
            lambda position, block: round_to_nearest(block, by_block[position], config),
            tag=tag,
        )
    return _materialise_gptq(config, context, by_block, tag=tag, base=base)


def _by_block(formats: Formats, state: ModelState) -> list[Formats]:
    prefix = state.skeleton().blocks_name
    return [
        {
            name.removeprefix(f"{prefix}.{i}."): fmt
            for name, fmt in formats.items()
            if name.startswith(f"{prefix}.{i}.")
        }
        for i in range(len(state.blocks))
    ]


def _materialise_gptq(
    config: QuantizeConfig,
    context: StageContext,
    by_block: list[Formats],
    *,
    tag: str,
    base: ModelState | None,
) -> Rewritten:
    sweep = Sweep(context, tag=tag)
    solver = BlockSolver(sweep.walk, sweep.streams, config, sweep.rows)
    learner = block_learner(config, context, sweep) if config.learns else None
    same = 0 if base is None else _num_same(base, by_block)

    def rewrite(
        position: int, original: Block, source: BlockTensors
    ) -> tuple[BlockTensors, dict[str, Any]]:
        if base is not None and position < same:
            done = base.read_block(position, sweep.walk.skeleton)
            return done, base.blocks[position].meta.get("facts", {})
        block = load_block(sweep.walk.skeleton, position, source)
        formats = by_block[position]
        facts = solver.solve(position, original, block, formats)
        if learner is not None and formats:
            learned = learner.improve(position, original, source, (block, formats))
            facts = {name: fact | learned for name, fact in facts.items()}
        return block_tensors(block, source), facts

    return sweep.run(rewrite)


def _num_same(base: ModelState, by_block: list[Formats]) -> int:
    """How many of the first blocks have the same formats in a quantized model."""
    for position, (ref, formats) in enumerate(zip(base.blocks, by_block, strict=True)):
        if ref.meta.get("formats") != {n: f.as_json() for n, f in formats.items()}:
            return position
    return len(by_block)
