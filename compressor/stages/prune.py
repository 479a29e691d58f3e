"""Prune: zeros inside the linears (masks), narrower layers (width) or fewer of them (depth).

Masks, block by block on the compressed stream, with H and W* of `statistics.py`:

    M = mask of the method on W*,    W' = argmin tr((W' - W*) H (W' - W*)^T)  with W' = W' o M

The method proposes (magnitude, Wanda or SparseGPT), least squares on the kept weights mends: it
matters more than the choice of the method. `reconstruct: false` gives the methods as published.

A linear that is quantized already is pruned from its dense weights and rounded again into its own
format by GPTQ under the mask, so a pruned weight is stored as the zero point. If nothing but
quantization has happened so far, those dense weights are the original's, not their rounded copies.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compressor.algorithms.gptq import hessian_error
from compressor.algorithms.masks import (
    magnitude,
    n_of_m_mask,
    parse_pattern,
    sparsegpt_mask,
    unstructured_mask,
    wanda,
)
from compressor.algorithms.reconstruct import reconstruct
from compressor.errors import RecipeError
from compressor.modeling.block import Block, block_tensors, load_block
from compressor.modeling.linears import StoredLinear
from compressor.modeling.state import BlockTensors, ModelState
from compressor.recipe import PruneConfig, match_names
from compressor.stages.blockwise import Rewritten, Sweep, change_blocks
from compressor.stages.context import StageContext, StageReport
from compressor.stages.prune_depth import prune_depth
from compressor.stages.prune_width import prune_width
from compressor.stages.selection import Target, block_linears
from compressor.stages.solve import Rounding, round_stack
from compressor.stages.statistics import BlockStatistics, Collection, GroupStatistics


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
    if config.width is not None:
        report = prune_width(config, context)
    elif config.depth is not None:
        report = prune_depth(config, context)
    else:
        report = _prune_masks(config, context)
    return replace(report, state=replace(report.state, trail=(*context.state.trail, "prune")))


def _is_data_free(config: PruneConfig) -> bool:
    return config.width is None and config.depth is None and not config.reconstruct


def _prune_masks(config: PruneConfig, context: StageContext) -> StageReport:
    targets = _targets(config, context.state)
    by_block: list[list[str]] = [[] for _ in context.state.blocks]
    for target in targets:
        by_block[target.position].append(target.linear)
    if context.tokens is None:
        done = _without_data(config, context, by_block)
    else:
        done = _with_data(config, context, by_block)
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
    return StageReport(done.state, facts)


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


def _without_data(
    config: PruneConfig, context: StageContext, by_block: list[list[str]]
) -> Rewritten:
    return change_blocks(
        context,
        lambda position, block: _prune_block_by_magnitude(config, block, by_block[position]),
    )


def _with_data(config: PruneConfig, context: StageContext, by_block: list[list[str]]) -> Rewritten:
    sweep = Sweep(context, reference=context.original if _from_original(context) else None)
    collection = Collection(asymmetric=config.reconstruct, sequential=True)
    statistics = BlockStatistics(sweep.walk, sweep.streams, sweep.rows, collection)

    def rewrite(
        position: int, original: Block, source: BlockTensors
    ) -> tuple[BlockTensors, dict[str, Any]]:
        block = load_block(sweep.walk.skeleton, position, source)
        names = by_block[position]
        if config.method == "magnitude" and not config.reconstruct:
            return _finished(block, source, _prune_block_by_magnitude(config, block, names))
        facts: dict[str, Any] = {}
        for group, found in statistics.groups(position, original, block, names):
            for name in group:
                weight = original.linears[name].dense()
                facts[name] = _prune_linear(config, block.linears[name], weight, found)
        block.masked |= facts.keys()
        return _finished(block, source, facts)

    return sweep.run(rewrite)


def _finished(
    block: Block, source: BlockTensors, facts: dict[str, Any]
) -> tuple[BlockTensors, dict[str, Any]]:
    return block_tensors(block, source), facts


def _prune_block_by_magnitude(
    config: PruneConfig, block: Block, names: list[str]
) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name in names:
        linear = block.linears[name]
        weight = linear.dense()
        mask = _mask(config, magnitude(weight))
        if linear.format is None:
            linear.set_dense(weight * mask)
        else:
            _force_zero_codes(linear, mask)
        facts[name] = _counts(config, linear)
    block.masked |= set(names)
    return facts


def _force_zero_codes(linear: StoredLinear, mask: Tensor) -> None:
    """Put the zero point where the mask is False; all other codes and the grid stay."""
    codes, scale, zero = linear.codes()
    fmt = linear.format
    assert fmt is not None, "called for quantized linears"
    width = codes.shape[1] if fmt.group_size == -1 else fmt.group_size
    spread = zero.repeat_interleave(width, 1)[:, : codes.shape[1]]
    linear.set_codes(torch.where(mask, codes, spread.to(codes.dtype)), scale, zero, fmt)


def _prune_linear(
    config: PruneConfig, linear: StoredLinear, weight: Tensor, found: GroupStatistics
) -> dict[str, Any]:
    target, strength = found.target(weight)
    mask, first = _proposed(config, target, found.hessian)
    solved = first
    if config.reconstruct:
        solved = reconstruct(target, found.hessian, mask, start=first)
    rounding: dict[str, Any] = {}
    if linear.format is None:
        linear.set_dense(solved)
    else:
        job = Rounding(solved, found.hessian, linear.format, mask)
        rounding = round_stack([linear], job)
    total = hessian_error(target, found.hessian)
    cut = hessian_error(target * mask - target, found.hessian)
    error = hessian_error(linear.dense() - target, found.hessian)
    return {
        **rounding,
        **_counts(config, linear),
        "error_before_repair": cut,
        "error": error,
        "relative_error": error / total if total else 0.0,
        "strength": strength,
        "num_tokens": found.num_tokens,
    }


def _proposed(config: PruneConfig, target: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The method's mask [O, I] and its weights [O, I], zero where the mask is False."""
    if config.method == "sparsegpt":
        return sparsegpt_mask(target, hessian, sparsity=config.sparsity, pattern=config.pattern)
    scores = magnitude(target)
    if config.method == "wanda":
        scores = wanda(target, hessian.diagonal())
    mask = _mask(config, scores)
    return mask, target * mask


def _mask(config: PruneConfig, scores: Tensor) -> Tensor:
    if config.pattern is not None:
        n, m = parse_pattern(config.pattern)
        return n_of_m_mask(scores, n=n, m=m)
    assert config.sparsity is not None, "the recipe has exactly one of the two"
    return unstructured_mask(scores, sparsity=config.sparsity)


def _counts(config: PruneConfig, linear: StoredLinear) -> dict[str, Any]:
    """Zeros as stored: counted after the cast to the stored dtype or the grid."""
    dense = linear.dense()
    zeros = int((dense == 0).sum())
    asked = config.pattern or config.sparsity
    counts = {"num_zeros": zeros, "num_weights": dense.numel()}
    return {"pruned_by": config.method, "asked": asked, **counts}
