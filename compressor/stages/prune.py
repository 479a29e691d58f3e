"""Prune: zeros inside the linears (masks), narrower layers (width) or fewer of them (depth).

Masks, block by block on the compressed stream, with H and W* of `statistics.py`:

    M = mask of the method on W*,    W' = argmin tr((W' - W*) H (W' - W*)^T)  with W' = W' o M

The method proposes (magnitude, Wanda, RIA or SparseGPT), least squares on the kept weights mends:
it matters more than the choice of the method. `reconstruct: false` gives the methods as published.

A linear that is quantized already is pruned from its dense weights and rounded again into its own
format by GPTQ under the mask, so a pruned weight is stored as the zero point. If nothing but
quantization has happened so far, those dense weights are the original's, not their rounded copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compressor.algorithms.masks import (
    magnitude,
    parse_pattern,
)
from compressor.errors import RecipeError
from compressor.modeling.block import Block, block_tensors, load_block
from compressor.modeling.linears import StoredLinear
from compressor.modeling.state import BlockTensors, ModelState
from compressor.recipe import PruneConfig, Width, match_names
from compressor.stages.blockwise import Rewritten, Sweep, change_blocks
from compressor.stages.context import StageContext, StageReport
from compressor.stages.prune_allocation import measured_shares
from compressor.stages.prune_depth import prune_depth
from compressor.stages.prune_experts import prune_experts
from compressor.stages.prune_hidden import prune_hidden
from compressor.stages.prune_linear import counts, mask_of, prune_linear
from compressor.stages.prune_target import prune_to_target
from compressor.stages.prune_width import prune_width
from compressor.stages.selection import Target, block_linears
from compressor.stages.statistics import BlockStatistics, Collection

Plan = dict[str, PruneConfig]  # what is asked of each linear, by block-relative name


def apply(config: PruneConfig, context: StageContext) -> StageReport:
    """Prune the model as the recipe says: masks, width or depth.

    Raises:
        RecipeError: the request does not fit this model, or needs a calibrate stage.
        UnsupportedError: width or depth of an architecture that is not covered.
        NumericError: non-finite weights or activations.
    """
    if context.tokens is None and (config.method != "magnitude" or not _is_data_free(config)):
        raise RecipeError(
            "this way of pruning needs a calibrate stage before it",
            code="RC17",
            where=config.where("method"),
            fix="add `- kind: calibrate`, or use method: magnitude with reconstruct: false",
        )
    if config.target is not None:
        report = prune_to_target(config, context)
    elif config.width is not None:
        report = _narrower(config.width)(config, context)
    elif config.depth is not None:
        report = prune_depth(config, context)
    else:
        report = _prune_masks(config, context)
    return replace(report, state=replace(report.state, trail=(*context.state.trail, "prune")))


def _narrower(width: Width) -> Callable[[PruneConfig, StageContext], StageReport]:
    if width.experts is not None:
        return prune_experts
    return prune_width if width.hidden is None else prune_hidden


def _is_data_free(config: PruneConfig) -> bool:
    shaped = any(way is not None for way in (config.width, config.depth, config.target))
    return not shaped and not config.reconstruct and config.allocation == "uniform"


def _prune_masks(config: PruneConfig, context: StageContext) -> StageReport:
    targets = _targets(config, context.state)
    uniform = _plan(targets, dict.fromkeys((t.name for t in targets), config), context)
    shared: dict[str, Any] = {}
    if context.tokens is None:
        done = _without_data(context, uniform)
    else:
        done = _with_data(config, context, uniform)
        if config.allocation == "measured":
            done, shared = _shared_out(config, context, targets, done)
    zeros = sum(f["num_zeros"] for f in done.linears.values())
    weights = sum(f["num_weights"] for f in done.linears.values())
    facts = {
        "linears": done.linears,
        "held_out_kl": done.held_out_kl,
        "num_zeros": zeros,
        "num_weights": weights,
        "sparsity": zeros / weights,
        "target": "the original weights" if _from_original(context) else "the weights before",
    }
    return StageReport(done.state, facts | shared)


def _plan(
    targets: list[Target], configs: dict[str, PruneConfig], context: StageContext
) -> list[Plan]:
    """For each block what is asked of its linears, from the same by full name."""
    plan: list[Plan] = [{} for _ in context.state.blocks]
    for target in targets:
        plan[target.position][target.linear] = configs[target.name]
    return plan


def _shared_out(
    config: PruneConfig, context: StageContext, targets: list[Target], uniform: Rewritten
) -> tuple[Rewritten, dict[str, Any]]:
    """The model with the zeros where they harm less, if it is better on held-out rows."""
    shares = measured_shares(config, context, targets)
    configs = {n: config.model_copy(update={"sparsity": s}) for n, s in shares.items()}
    done = _with_data(config, context, _plan(targets, configs, context), tag="measured-")
    kl = {"uniform": uniform.held_out_kl, "measured": done.held_out_kl}
    kept = "measured" if (done.held_out_kl or 0.0) < (uniform.held_out_kl or 0.0) else "uniform"
    notes = [] if kept == "measured" else ["the uniform sparsity was better on held-out rows"]
    facts = {"shares": shares, "held_out_kl_of": kl, "allocation": kept, "notes": notes}
    return (done if kept == "measured" else uniform), facts


def _targets(config: PruneConfig, state: ModelState) -> list[Target]:
    """Linears of the blocks that are not ignored; each must fit the pattern (CK29)."""
    linears = block_linears(state.skeleton())
    names = [*(t.name for t in linears), "lm_head"]
    ignored = match_names(config.ignore, names, where=config.where("ignore"), optional=("lm_head",))
    out = {n for hits in ignored.values() for n in hits}
    targets = [t for t in linears if t.name not in out]
    if not targets:
        raise RecipeError(
            "every linear layer is ignored", code="RC14", where=config.where("ignore")
        )
    if config.pattern is not None:
        _check_columns(targets, parse_pattern(config.pattern)[1], config)
    return targets


def _check_columns(targets: Iterable[Target], width: int, config: PruneConfig) -> None:
    bad = [t for t in targets if t.shape[1] % width]
    if bad:
        raise RecipeError(
            f"{bad[0].name} has {bad[0].shape[1]} inputs, which groups of {width} do not tile",
            code="CK29",
            where=config.where("pattern"),
            why=f"{len(bad)} layers cannot have the pattern {config.pattern}.",
            fix="add them to ignore, or give a sparsity instead of a pattern",
        )


def _from_original(context: StageContext) -> bool:
    """Whether quantization is all that happened: then the original's weights are better targets."""
    quantized = any(ref.meta.get("formats") for ref in context.state.blocks)
    return quantized and set(context.state.trail) <= {"calibrate", "quantize"}


def _without_data(context: StageContext, plan: list[Plan]) -> Rewritten:
    return change_blocks(
        context, lambda position, block: _prune_block_by_magnitude(block, plan[position])
    )


def _with_data(
    config: PruneConfig, context: StageContext, plan: list[Plan], *, tag: str = ""
) -> Rewritten:
    reference = context.original if _from_original(context) else None
    sweep = Sweep(context, reference=reference, tag=tag)
    collection = Collection(asymmetric=config.reconstruct, sequential=True)
    statistics = BlockStatistics(sweep.walk, sweep.streams, sweep.rows, collection)

    def rewrite(
        position: int, original: Block, source: BlockTensors
    ) -> tuple[BlockTensors, dict[str, Any]]:
        block = load_block(sweep.walk.skeleton, position, source)
        asked = plan[position]
        if config.method == "magnitude" and not config.reconstruct:
            return _finished(block, source, _prune_block_by_magnitude(block, asked))
        facts: dict[str, Any] = {}
        for group, found in statistics.groups(position, original, block, asked):
            for name in group:
                weight = original.linears[name].dense()
                facts[name] = prune_linear(
                    asked[name],
                    block.linears[name],
                    name=name,
                    weight=weight,
                    statistics=found,
                )
        block.masked |= facts.keys()
        return _finished(block, source, facts)

    return sweep.run(rewrite)


def _finished(
    block: Block, source: BlockTensors, facts: dict[str, Any]
) -> tuple[BlockTensors, dict[str, Any]]:
    return block_tensors(block, source), facts


def _prune_block_by_magnitude(block: Block, plan: Plan) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name, config in plan.items():
        linear = block.linears[name]
        weight = linear.dense()
        mask = mask_of(config, magnitude(weight))
        if linear.format is None:
            linear.set_dense(weight * mask)
        else:
            _force_zero_codes(linear, mask)
        facts[name] = counts(config, linear)
    block.masked |= plan.keys()
    return facts


def _force_zero_codes(linear: StoredLinear, mask: Tensor) -> None:
    """Put the zero point where the mask is False; all other codes and the grid stay."""
    codes, scale, zero = linear.codes()
    fmt = linear.format
    assert fmt is not None, "called for quantized linears"
    width = codes.shape[1] if fmt.group_size == -1 else fmt.group_size
    spread = zero.repeat_interleave(width, 1)[:, : codes.shape[1]]
    linear.set_codes(torch.where(mask, codes, spread.to(codes.dtype)), scale, zero, fmt)
