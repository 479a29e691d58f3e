"""Which unit of linears loses how many weights: more zeros where they harm less.

    levels    s - d, s - d/2, s, s + d/2, s + d      for a sparsity s, with d = 0.4 min(s, 1 - s)
    score     KL(original || one unit pruned to a level, all else original) on calibration rows
    solver    the exact knapsack that also mixes formats: as many weights kept as s keeps everywhere

The scores use the mask and the reconstruction that are shipped. They add up only roughly at high
sparsity, so the stage makes the uniform model, too, and keeps the better one on held-out rows.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from compressor.algorithms.allocation import Choice, allocate
from compressor.modeling.block import Block
from compressor.recipe import PruneConfig
from compressor.stages.candidates import unit_targets
from compressor.stages.context import StageContext
from compressor.stages.prune_linear import proposed, solved
from compressor.stages.selection import Target
from compressor.stages.sensitivity import Scores, UnitOption, swap_in_scores

STEPS = (-1.0, -0.5, 0.0, 0.5, 1.0)
REACH = 0.4


def measured_shares(
    config: PruneConfig, context: StageContext, targets: list[Target]
) -> dict[str, float]:
    """A sparsity for each target by full name; journaled."""
    assert config.sparsity is not None, "the recipe demands it"
    if not context.run.is_done("shares"):
        units = unit_targets(targets)
        picked = _allocate(config.sparsity, units, _scores(config, context, units))
        shares = {t.name: picked[unit] for unit, ts in units.items() for t in ts}
        context.run.commit_meta("shares", {"shares": shares})
    found: dict[str, float] = context.run.meta("shares")["shares"]
    return found


def levels(sparsity: float) -> list[float]:
    """The sparsities a unit may have, rising."""
    reach = REACH * min(sparsity, 1 - sparsity)
    return [round(sparsity + step * reach, 4) for step in STEPS]


def _scores(config: PruneConfig, context: StageContext, units: dict[str, list[Target]]) -> Scores:
    assert config.sparsity is not None, "the recipe demands it"
    members = {unit: [t.linear for t in ts] for unit, ts in units.items()}
    options = [
        UnitOption(unit, str(level), ts[0].position, {})
        for unit, ts in units.items()
        for level in levels(config.sparsity)
    ]
    return swap_in_scores(config, context, options, change=partial(_prune_option, config, members))


def _prune_option(
    config: PruneConfig,
    members: dict[str, list[str]],
    block: Block,
    hessians: dict[str, Tensor],
    option: UnitOption,
) -> None:
    """Prune one unit of a block in place to the option's sparsity."""
    level = config.model_copy(update={"sparsity": float(option.label)})
    for name in members[option.unit]:
        weight, hessian = block.linears[name].dense(), hessians[name]
        mask, first = proposed(level, weight, hessian)
        block.linears[name].set_dense_exact(
            solved(level, weight, hessian=hessian, mask=mask, first=first)
        )


def _allocate(sparsity: float, units: dict[str, list[Target]], scores: Scores) -> dict[str, float]:
    sizes = {unit: sum(t.shape[0] * t.shape[1] for t in ts) for unit, ts in units.items()}
    choices = [
        Choice(unit, label, round((1 - float(label)) * sizes[unit]), score)
        for unit, row in scores.items()
        for label, score in row.items()
    ]
    budget = sum(round((1 - sparsity) * size) for size in sizes.values())
    picked = allocate(choices, budget_bytes=budget, limits=[])
    return {unit: float(label) for unit, label in picked.items()}
