"""Mixed precision: which unit gets which format so that every limit is kept and damage is least.

    score      predicted KL of the unit in that format, all else original (see sensitivity.py)
    solver     exact multiple-choice knapsack, bytes counted as stored (algorithms/allocation.py)

Scores come from a profile that outlives the run (profile.py), so another budget of the same model
costs no pass. Protected units stay at 16 bit; `protect_auto` raises the most sensitive ones to the
widest candidate before the rest is allocated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from compressor.algorithms.allocation import Choice, allocate, pareto_front
from compressor.artifact.formats import LayerFormat
from compressor.errors import RecipeError
from compressor.recipe import QuantizeConfig, parse_size
from compressor.stages.candidates import (
    Candidates,
    Labels,
    find_candidates,
    tied_units,
    unit_targets,
)
from compressor.stages.context import StageContext
from compressor.stages.costs import ENDLESS, Limits, limits_of
from compressor.stages.profile import Profile, keep, open_profile
from compressor.stages.selection import Selection, block_linears, dense_bytes
from compressor.stages.sensitivity import Scores, UnitOption, fisher_scores, swap_in_scores

SWAP_IN_FLOP_LIMIT = 6e12  # about two minutes on two CPU cores
FITTED_SHARE = 4  # one unit in four is measured to fit the scale of Fisher scores
FRONT_POINTS = 48
SWAP_IN, FISHER = "swap_in_kl", "output_fisher"


@dataclass(frozen=True, slots=True)
class Problem:
    """A scored allocation problem; everything that can be asked without touching the model."""

    candidates: Candidates
    limits: Limits
    scores: Scores
    method: str
    choices: list[Choice]
    tied: set[str]
    num_weights: int
    profile: Profile

    def best(self, num_bytes: int | None = None) -> Labels:
        """The allocation with the least predicted damage within the limits."""
        budget = self.limits.num_bytes if num_bytes is None else num_bytes
        return allocate_together(self.choices, budget, tied=self.tied, limits=self.limits.others)

    def front(self, *, limited: bool) -> list[Labels]:
        """Best allocations from the fewest bytes to the most (that fit, if `limited`)."""
        name, joined = _joined(self.choices, self.tied)
        limits = self.limits.others if limited else []
        bare = joined if limited else [Choice(c.unit, c.option, c.cost, c.score) for c in joined]
        points = pareto_front(bare, FRONT_POINTS, limits)
        most = self.limits.num_bytes if limited else ENDLESS
        return [_parted(p.options, name, self.tied) for p in points if p.cost <= most]

    def uniform(self) -> dict[str, Labels]:
        """One label for all units (raised ones keep theirs), where all of them offer it."""
        offered: dict[str, list[str]] = {}
        for choice in self.choices:
            offered.setdefault(choice.unit, []).append(choice.option)
        free = [set(labels) for labels in offered.values() if len(labels) > 1]
        common = set.intersection(*free) if free else set()
        names = dict.fromkeys(c.option for c in self.choices if c.option in common)
        return {
            name: {u: name if name in labels else labels[0] for u, labels in offered.items()}
            for name in names
        }

    def additive(self, labels: Labels) -> float:
        """The sum of the scores of an allocation."""
        return math.fsum(self.scores[u].get(label, 0.0) for u, label in labels.items())

    def fits(self, labels: Labels) -> bool:
        """Whether an allocation keeps every limit."""
        others = [self.candidates.others[item] for item in labels.items()]
        sums = [math.fsum(each[k] for each in others) for k in range(len(self.limits.others))]
        kept = all(s <= most for s, most in zip(sums, self.limits.others, strict=True))
        return kept and self.candidates.num_bytes(labels) <= self.limits.num_bytes


def make_problem(config: QuantizeConfig, context: StageContext, selection: Selection) -> Problem:
    """Score the units (or look the scores up) and state the problem.

    Raises:
        RecipeError: no candidate is legal for the engines, or a limit is too small (NU12).
    """
    limits = limits_of(config, context, selection)
    candidates = find_candidates(config, context, selection, limits)
    _check_feasible(config, selection, candidates, limits)
    profile = open_profile(config, context)
    scores, method = scores_of(config, context, candidates, profile)
    note = keep(profile, config)
    candidates.notes.extend([note] if note else [])
    return Problem(
        candidates=candidates,
        limits=limits,
        scores=scores,
        method=method,
        choices=choices_of(config, candidates, scores),
        tied=tied_units(config, candidates),
        num_weights=sum(t.shape[0] * t.shape[1] for t in selection.targets),
        profile=profile,
    )


def _check_feasible(
    config: QuantizeConfig, selection: Selection, candidates: Candidates, limits: Limits
) -> None:
    """Say the smallest possible budget in the recipe's own unit."""
    least: dict[str, int] = {}
    for (unit, _), cost in candidates.cost.items():
        least[unit] = min(cost, least.get(unit, cost))
    floor = sum(least.values())
    if floor <= limits.num_bytes or config.budget is None:
        return
    weights = sum(t.shape[0] * t.shape[1] for t in selection.targets)
    bits = math.ceil(8e3 * floor / weights) / 1e3
    missing = floor - limits.num_bytes
    key, smallest = "budget.average_bits", f"{bits:g} bits"
    if config.budget.fits is not None:
        key, smallest = "budget.fits", f"{missing} bytes more"
    if config.budget.size is not None:
        key, smallest = "budget.size", f'"{parse_size(config.budget.size) + missing}B"'
    if config.budget.average_bits is not None and config.budget.average_bits < bits:
        key, smallest = "budget.average_bits", f"{bits:g} bits"
    raise RecipeError(
        f"the budget is too small: the smallest feasible one is {smallest}",
        code="NU12",
        where=config.where(key),
        why="Every layer in its smallest legal candidate takes that much.",
        fix=f"set {key} to at least {smallest}, or add smaller candidates",
    )


def protect_most_sensitive(
    config: QuantizeConfig, context: StageContext, formats: dict[str, LayerFormat]
) -> list[str]:
    """Linears of the most sensitive units (share `protect_auto`), ranked by output Fisher.

    For runs without a budget; the linears named stay dense.
    """
    targets = [t for t in block_linears(context.state.skeleton()) if t.name in formats]
    options = present_options(Selection(tuple(targets), (), {}), formats, config.scheme)
    if not context.run.is_done("fisher"):
        context.run.commit_meta("fisher", {"scores": fisher_scores(config, context, options)})
    raised = _raised(config, context.run.meta("fisher")["scores"])
    return [t.name for t in targets if t.unit in raised]


def present_options(
    selection: Selection, formats: dict[str, LayerFormat], label: str
) -> list[UnitOption]:
    """One option for each unit: the formats given by full name."""
    return [
        UnitOption(unit, label, ts[0].position, {t.linear: formats[t.name] for t in ts})
        for unit, ts in unit_targets(selection.targets).items()
    ]


def allocate_together(
    choices: list[Choice], budget: int, *, tied: set[str], limits: list[float] | None = None
) -> Labels:
    """`allocate`, with the tied units as one: their costs and scores are summed for each option."""
    name, joined = _joined(choices, tied)
    picked = allocate(joined, budget_bytes=budget, limits=limits or [])
    return _parted(picked, name, tied)


def _joined(choices: list[Choice], tied: set[str]) -> tuple[str, list[Choice]]:
    """Choices with the tied units as one, and its name."""
    name = "+".join(sorted(tied))
    sums: dict[str, list[Choice]] = {}
    for choice in choices:
        if choice.unit in tied:
            sums.setdefault(choice.option, []).append(choice)
    together = [
        Choice(
            name,
            option,
            sum(c.cost for c in parts),
            sum(c.score for c in parts),
            tuple(math.fsum(each) for each in zip(*(c.others for c in parts), strict=True)),
        )
        for option, parts in sums.items()
        if len(parts) == len(tied)
    ]
    return name, [c for c in choices if c.unit not in tied] + together


def _parted(picked: Labels, name: str, tied: set[str]) -> Labels:
    """Labels of every unit from those of the joined problem."""
    own = {unit: label for unit, label in picked.items() if unit != name}
    return own | dict.fromkeys(sorted(tied), picked.get(name, ""))


def scores_of(
    config: QuantizeConfig, context: StageContext, candidates: Candidates, profile: Profile
) -> tuple[Scores, str]:
    """Scores of all options from the profile; what is missing is measured."""
    quantized = candidates.quantized
    if config.scores == SWAP_IN or (
        config.scores == "auto" and _swap_in_flop(context, quantized) <= SWAP_IN_FLOP_LIMIT
    ):
        return swapped(config, context, quantized, profile), "swap-in KL"
    missing = profile.missing(FISHER, quantized)
    if missing:
        profile.add(FISHER, missing, fisher_scores(config, context, missing))
    fisher = profile.get(FISHER, quantized)
    middle = _middle_label(quantized)
    units = [o.unit for o in quantized if o.label == middle]
    ranked = sorted(units, key=lambda u: fisher[u][middle], reverse=True)
    sample = set(ranked[::FITTED_SHARE])
    chosen = [o for o in quantized if o.unit in sample and o.label == middle]
    measured = swapped(config, context, chosen, profile)
    scale = sum(measured[u][middle] for u in sample) / sum(fisher[u][middle] for u in sample)
    scores = {u: {f: s * scale for f, s in row.items()} for u, row in fisher.items()}
    for unit in sample:
        ratio = measured[unit][middle] / max(scores[unit][middle], 1e-30)
        scores[unit] = {f: s * ratio for f, s in scores[unit].items()}
    return scores, f"output Fisher, scale fitted to the swap-in KL of {len(sample)} units"


def swapped(
    config: QuantizeConfig, context: StageContext, options: list[UnitOption], profile: Profile
) -> Scores:
    """Swap-in scores; each block's are saved at once, so a killed run goes on behind it."""
    missing = profile.missing(SWAP_IN, options)
    swap_in_scores(
        config, context, missing, on_block=lambda found: profile.add(SWAP_IN, missing, found)
    )
    return profile.get(SWAP_IN, options)


def _middle_label(options: list[UnitOption]) -> str:
    labels = sorted({(next(iter(o.formats.values())).bits, o.label) for o in options})
    return labels[(len(labels) - 1) // 2][1]


def _swap_in_flop(context: StageContext, options: list[UnitOption]) -> float:
    """Cost of measuring every option: half of the model again for each, 2 FLOP a weight a token."""
    assert context.tokens is not None, "scores need calibration rows"
    tokens = min(32, context.tokens.tokens.shape[0]) * context.tokens.tokens.shape[1]
    stored = sum(i.nbytes for i in context.state.checkpoint.tensors.values())
    return len(options) * tokens * stored / dense_bytes(context.state) * 1.2


def choices_of(config: QuantizeConfig, candidates: Candidates, scores: Scores) -> list[Choice]:
    """Options of all units with cost and score; raised units have their widest one alone."""
    raised, widest = _raised(config, scores), candidates.widest
    return [
        Choice(
            unit,
            label,
            candidates.cost[unit, label],
            scores[unit][label] if option.formats else 0.0,
            candidates.others[unit, label],
        )
        for (unit, label), option in candidates.options.items()
        if unit not in raised or label == widest
    ]


def _raised(config: QuantizeConfig, scores: Scores) -> set[str]:
    """The most sensitive units by their score in the narrowest candidate."""
    worst = sorted(scores, key=lambda u: max(scores[u].values()), reverse=True)
    return set(worst[: round(config.protect_auto * len(worst))])
