"""Mixed precision: which unit gets which format so that the bytes fit and the damage is least.

    units      linears that must share a format (q/k/v, gate/up, the experts of a layer)
    options    the recipe's candidates that every named engine can load
    score      predicted KL of the unit in that format, all else original (see sensitivity.py)
    solver     exact multiple-choice knapsack (MILP), bytes counted as stored

Protected units stay at 16 bit; `protect_auto` raises the most sensitive ones to the widest
candidate before the rest is allocated. The best uniform candidate that fits is kept as the
alternative that the mixture has to beat.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from compressor.algorithms.allocation import Choice, allocate, pareto_front
from compressor.artifact.formats import LayerFormat
from compressor.errors import RecipeError
from compressor.recipe import KEEP, QuantizeConfig, candidate_preset, parse_size
from compressor.stages.context import StageContext
from compressor.stages.selection import (
    Selection,
    Target,
    block_linears,
    layer_format,
    scale_dtype,
    stored_dtype,
)
from compressor.stages.sensitivity import Scores, UnitOption, fisher_scores, swap_in_scores

# Widths that engines load: (bits, symmetric) pairs (formats.md of the engines, autumn 2026).
ENGINE_WIDTHS: dict[str, frozenset[tuple[int, bool]]] = {
    "ours": frozenset((b, s) for b in range(2, 9) for s in (True, False)),
    "transformers": frozenset((b, True) for b in range(2, 9)),  # 5.23 misreads zero points
    "vllm": frozenset({(b, True) for b in range(2, 9)} | {(4, False), (8, False)}),
    "sglang": frozenset({(4, True), (8, True), (4, False), (8, False)}),
}
SWAP_IN_FLOP_LIMIT = 6e12  # about two minutes on two CPU cores
FITTED_SHARE = 4  # one unit in four is measured to fit the scale of Fisher scores


@dataclass(frozen=True, slots=True)
class Allocation:
    """The chosen formats by full linear name, and everything a reader wants to check."""

    formats: dict[str, LayerFormat]
    uniform: dict[str, LayerFormat] | None
    labels: dict[str, str]
    scores: Scores
    predicted: dict[str, float]
    budget_bytes: int
    bytes: dict[str, int]
    pareto: list[dict[str, float]]
    method: str
    num_weights: int
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        hidden = ("formats", "uniform", "notes")
        return {key: getattr(self, key) for key in Allocation.__slots__ if key not in hidden}


@dataclass(frozen=True, slots=True)
class _Problem:
    options: list[UnitOption]
    cost: dict[tuple[str, str], int]
    targets: dict[str, list[Target]]


def allocate_formats(
    config: QuantizeConfig, context: StageContext, selection: Selection
) -> Allocation:
    """Score, solve, and name the uniform alternative.

    Raises:
        RecipeError: no candidate is legal for the engines, or the budget is too small (NU12).
    """
    assert config.budget is not None, "called only with a budget"
    problem = _problem(config, context, selection)
    budget = budget_bytes(config, context, selection)
    scores, method = _scores(config, context, problem)
    choices = _choices(config, problem, scores)
    _check_feasible(config, selection, choices, budget)
    picked = allocate_together(choices, budget, tied=_tied_units(config, problem))
    uniform = _best_uniform(problem, scores, budget)
    labels = {unit: picked[unit] for unit in sorted(picked)}
    by_key = {(o.unit, o.label): o for o in problem.options}
    return Allocation(
        formats=_formats(labels, by_key, problem),
        uniform=None if uniform is None else _formats(uniform, by_key, problem),
        labels=labels,
        scores=scores,
        predicted=_predictions(scores, labels, uniform),
        budget_bytes=budget,
        bytes=_bytes(problem, labels, uniform),
        pareto=_front(choices),
        method=method,
        num_weights=sum(t.shape[0] * t.shape[1] for t in selection.targets),
        notes=_notes(config, selection),
    )


def _check_feasible(
    config: QuantizeConfig, selection: Selection, choices: list[Choice], budget: int
) -> None:
    """Say the smallest possible budget in the recipe's own unit."""
    least: dict[str, int] = {}
    for choice in choices:
        least[choice.unit] = min(choice.cost, least.get(choice.unit, choice.cost))
    floor = sum(least.values())
    if floor <= budget or config.budget is None:
        return
    weights = sum(t.shape[0] * t.shape[1] for t in selection.targets)
    bits = math.ceil(8e3 * floor / weights) / 1e3
    if config.budget.size is not None:
        more = parse_size(config.budget.size) + floor - budget
        key, smallest = "budget.size", f'"{more}B"'
    else:
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
    units: dict[str, list[Target]] = {}
    for target in targets:
        units.setdefault(target.unit, []).append(target)
    options = [
        UnitOption(u, config.scheme, ts[0].position, {t.linear: formats[t.name] for t in ts})
        for u, ts in units.items()
    ]
    raised = _raised(config, _journaled_fisher(config, context, options))
    return [t.name for t in targets if t.unit in raised]


def _tied_units(config: QuantizeConfig, problem: _Problem) -> set[str]:
    """Units that must share one format: transformers unpacks the experts of all layers alike."""
    if "transformers" not in config.engines:
        return set()
    return {unit for unit in problem.targets if unit.endswith(".experts")}


def allocate_together(choices: list[Choice], budget: int, *, tied: set[str]) -> dict[str, str]:
    """`allocate`, with the tied units as one: their costs and scores are summed for each option."""
    name = "+".join(sorted(tied))
    sums: dict[str, list[Choice]] = {}
    for choice in choices:
        if choice.unit in tied:
            sums.setdefault(choice.option, []).append(choice)
    together = [
        Choice(name, option, sum(c.cost for c in parts), sum(c.score for c in parts))
        for option, parts in sums.items()
        if len(parts) == len(tied)
    ]
    picked = allocate([c for c in choices if c.unit not in tied] + together, budget_bytes=budget)
    shared = picked.pop(name, "")
    return picked | dict.fromkeys(tied, shared)


def unit_targets(selection: Selection) -> dict[str, list[Target]]:
    """Linears by unit, in the order of the model."""
    units: dict[str, list[Target]] = {}
    for target in selection.targets:
        units.setdefault(target.unit, []).append(target)
    return units


def legal_candidates(config: QuantizeConfig) -> list[str]:
    """The candidates that every engine of the recipe can load.

    Raises:
        RecipeError: none is left.
    """
    legal: list[str] = [label for label in config.candidates if _is_legal(label, config)]
    if not [label for label in legal if label != KEEP]:
        raise RecipeError(
            "no candidate format is legal for every engine named",
            code="RC17",
            where=config.where("candidates"),
            fix="W4A16 and W8A16 load everywhere",
        )
    return legal


def _is_legal(label: str, config: QuantizeConfig) -> bool:
    preset = candidate_preset(label, config.preset.group_size)
    if preset is None:
        return True
    return all((preset.bits, preset.symmetric) in ENGINE_WIDTHS[e] for e in config.engines)


def _problem(config: QuantizeConfig, context: StageContext, selection: Selection) -> _Problem:
    targets = unit_targets(selection)
    dtype = scale_dtype(config, stored_dtype(context.state))
    dense = dense_bytes_per_weight(context)
    options: list[UnitOption] = []
    cost: dict[tuple[str, str], int] = {}
    for unit, members in targets.items():
        for label in legal_candidates(config):
            preset = candidate_preset(label, config.preset.group_size)
            formats = {}
            if preset is not None:
                formats = {
                    t.linear: layer_format(preset, t.shape[1], scale_dtype=dtype, config=config)
                    for t in members
                }
            options.append(UnitOption(unit, label, members[0].position, formats))
            cost[unit, label] = sum(
                formats[t.linear].packed_bytes(t.shape)
                if formats
                else int(t.shape[0] * t.shape[1] * dense)
                for t in members
            )
    return _Problem(options, cost, targets)


def dense_bytes_per_weight(context: StageContext) -> float:
    """Bytes of one weight of a linear that stays as it is."""
    return {"F32": 4.0, "BF16": 2.0, "F16": 2.0}.get(stored_dtype(context.state), 2.0)


def budget_bytes(config: QuantizeConfig, context: StageContext, selection: Selection) -> int:
    """Bytes that the targeted linears may take.

    `average_bits` counts codes, scales and zero points of the targeted linears; `size` is the
    size of all weight files, so everything that is not targeted is subtracted first.

    Raises:
        RecipeError: what is not targeted alone is larger than `size`.
    """
    assert config.budget is not None, "called only with a budget"
    weights = sum(t.shape[0] * t.shape[1] for t in selection.targets)
    if config.budget.average_bits is not None:
        return int(weights * config.budget.average_bits / 8)
    assert config.budget.size is not None, "one of the two is given"
    fixed = kept_bytes(context, selection)
    left = parse_size(config.budget.size) - fixed
    if left <= 0:
        raise RecipeError(
            f"the budget {config.budget.size} is smaller than what stays dense ({fixed} bytes)",
            code="NU12",
            where=config.where("budget.size"),
            fix="allow a larger size",
        )
    return left


def kept_bytes(context: StageContext, selection: Selection) -> int:
    """Bytes of everything that is not targeted: embeddings, norms, head, protected linears."""
    total = sum(info.nbytes for info in context.state.checkpoint.tensors.values())
    targeted = sum(t.shape[0] * t.shape[1] for t in selection.targets)
    return total - int(targeted * dense_bytes_per_weight(context))


def _scores(config: QuantizeConfig, context: StageContext, problem: _Problem) -> tuple[Scores, str]:
    quantized = [o for o in problem.options if o.formats]
    if config.scores == "swap_in_kl" or (
        config.scores == "auto" and _swap_in_flop(context, quantized) <= SWAP_IN_FLOP_LIMIT
    ):
        return swap_in_scores(config, context, quantized), "swap-in KL"
    fisher = _journaled_fisher(config, context, quantized)
    middle = _middle_label(quantized)
    ranked = sorted(fisher, key=lambda u: fisher[u][middle], reverse=True)
    sample = set(ranked[::FITTED_SHARE]) | {ranked[0]}
    measured = swap_in_scores(
        config, context, [o for o in quantized if o.unit in sample and o.label == middle]
    )
    scale = sum(measured[u][middle] for u in sample) / sum(fisher[u][middle] for u in sample)
    scores = {u: {f: s * scale for f, s in row.items()} for u, row in fisher.items()}
    for unit in sample:
        ratio = measured[unit][middle] / max(scores[unit][middle], 1e-30)
        scores[unit] = {f: s * ratio for f, s in scores[unit].items()}
    return scores, f"output Fisher, scale fitted to the swap-in KL of {len(sample)} units"


def _journaled_fisher(
    config: QuantizeConfig, context: StageContext, options: list[UnitOption]
) -> Scores:
    if not context.run.is_done("fisher"):
        context.run.commit_meta("fisher", {"scores": fisher_scores(config, context, options)})
    scores: Scores = context.run.meta("fisher")["scores"]
    return scores


def _middle_label(options: list[UnitOption]) -> str:
    labels = sorted({(next(iter(o.formats.values())).bits, o.label) for o in options})
    return labels[(len(labels) - 1) // 2][1]


def _swap_in_flop(context: StageContext, options: list[UnitOption]) -> float:
    """Cost of measuring every option: half of the model again for each, 2 FLOP a weight a token."""
    assert context.tokens is not None, "scores need calibration rows"
    tokens = min(32, context.tokens.tokens.shape[0]) * context.tokens.tokens.shape[1]
    stored = sum(i.nbytes for i in context.state.checkpoint.tensors.values())
    return len(options) * tokens * stored / dense_bytes_per_weight(context) * 1.2


def _choices(config: QuantizeConfig, problem: _Problem, scores: Scores) -> list[Choice]:
    raised = _raised(config, scores)
    widest = max(
        (o.label for o in problem.options),
        key=lambda label: 99 if label == KEEP else candidate_preset(label, 128).bits,  # type: ignore[union-attr]
    )
    return [
        Choice(o.unit, o.label, problem.cost[o.unit, o.label], _score(scores, o))
        for o in problem.options
        if o.unit not in raised or o.label == widest
    ]


def _score(scores: Scores, option: UnitOption) -> float:
    return scores[option.unit][option.label] if option.formats else 0.0


def _raised(config: QuantizeConfig, scores: Scores) -> set[str]:
    """The most sensitive units by their score in the narrowest candidate."""
    worst = sorted(scores, key=lambda u: max(scores[u].values()), reverse=True)
    return set(worst[: round(config.protect_auto * len(worst))])


def _best_uniform(problem: _Problem, scores: Scores, budget: int) -> dict[str, str] | None:
    """The candidate that fits the budget in every unit and has the least predicted KL."""
    best: tuple[float, str] | None = None
    for label in {o.label for o in problem.options}:
        size = sum(problem.cost[u, label] for u in problem.targets)
        predicted = sum(scores[u].get(label, 0.0) for u in problem.targets)
        if size <= budget and (best is None or (predicted, label) < best):
            best = (predicted, label)
    return None if best is None else dict.fromkeys(problem.targets, best[1])


def _formats(
    labels: dict[str, str], by_key: dict[tuple[str, str], UnitOption], problem: _Problem
) -> dict[str, LayerFormat]:
    return {
        t.name: by_key[unit, label].formats[t.linear]
        for unit, label in labels.items()
        for t in problem.targets[unit]
        if by_key[unit, label].formats
    }


def _predictions(
    scores: Scores, labels: dict[str, str], uniform: dict[str, str] | None
) -> dict[str, float]:
    def predict(of: dict[str, str]) -> float:
        return sum(scores[u].get(label, 0.0) for u, label in of.items())

    named = {"mixed": labels} | ({"uniform": uniform} if uniform else {})
    return {name: predict(of) for name, of in named.items()}


def _bytes(
    problem: _Problem, labels: dict[str, str], uniform: dict[str, str] | None
) -> dict[str, int]:
    named = {"mixed": labels} | ({"uniform": uniform} if uniform else {})
    return {n: sum(problem.cost[u, f] for u, f in of.items()) for n, of in named.items()}


def _front(choices: list[Choice]) -> list[dict[str, float]]:
    return [{"bytes": p.cost, "kl": p.score} for p in pareto_front(choices, num_points=24)]


def _notes(config: QuantizeConfig, selection: Selection) -> list[str]:
    group = config.preset.group_size
    changed = {t.shape[1] for t in selection.targets if group > 0 and t.shape[1] % group}
    illegal = [c for c in config.candidates if c not in legal_candidates(config)]
    notes = [
        f"group_size {group} does not divide {n} inputs; a smaller one is used" for n in changed
    ]
    return notes + [f"{c} is no candidate: not every engine loads it" for c in illegal]
