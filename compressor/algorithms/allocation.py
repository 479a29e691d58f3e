"""Mixed precision as a knapsack: one option for every unit, bytes within a budget, least damage.

    minimise  sum_u score[u, o(u)]     subject to  sum_u cost[u, o(u)] <= budget

A unit is what must share one format (q, k and v of a layer, say); an option is a format. Scores are
damages that add up, such as the KL divergence measured with one unit compressed at a time.

The 0/1 program goes to HiGHS (``scipy.optimize.milp``), which proves optimality for hundreds of
units in well under a second. Three details keep it honest:

* options that cost no less and score no better than another of the same unit are left out first,
  so equal scores always resolve to fewer bytes;
* scores are shifted and scaled, because a solver with absolute tolerances near 1e-6 sees nothing
  in gradients of 1e-12;
* what a tolerance left unused is spent greedily afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from compressor.errors import NumericError, RecipeError

SCORE_SCALE = 1e4  # the largest score after scaling; HiGHS stops at an absolute gap of 1e-6
TIE_WEIGHT = 1e-3  # of all bytes against that scale: prefers fewer bytes among equal sums
TIME_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Choice:
    """One option of one unit: cost in bytes, score = damage (lower is better)."""

    unit: str
    option: str
    cost: int
    score: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """An option for every unit, with the sums of its bytes and of its scores."""

    options: dict[str, str]
    cost: int
    score: float


def allocate(choices: Sequence[Choice], *, budget_bytes: int) -> dict[str, str]:
    """The option of every unit, in order of first appearance, with the least total score.

    Raises RecipeError NU12, naming the smallest feasible budget, if the budget is too small, and
    NumericError NU01 if a score is not finite.
    """
    units = _by_unit(choices)
    smallest = smallest_cost(choices)
    if budget_bytes < smallest:
        raise RecipeError(
            f"no allocation fits into {budget_bytes} bytes",
            code="NU12",
            why=f"with the smallest option of every unit the model takes {smallest} bytes",
            fix=f"raise the budget to at least {smallest} bytes, or allow smaller formats",
        )
    useful = {unit: _undominated(options) for unit, options in units.items()}
    chosen = _spend_leftover(_solve(useful, budget_bytes), useful, budget_bytes)
    return {unit: choice.option for unit, choice in chosen.items()}


def smallest_cost(choices: Iterable[Choice]) -> int:
    """Bytes of the smallest option of every unit together."""
    return sum(min(c.cost for c in options) for options in _by_unit(choices).values())


def evaluate(choices: Iterable[Choice], options: dict[str, str]) -> Allocation:
    """Cost and score of a given assignment; raises KeyError for an option that is not offered."""
    offered = {(c.unit, c.option): c for c in choices}
    taken = [offered[item] for item in options.items()]
    return Allocation(options, sum(c.cost for c in taken), math.fsum(c.score for c in taken))


def pareto_front(choices: Sequence[Choice], num_points: int) -> list[Allocation]:
    """Best allocations over budgets from the smallest to the largest useful one.

    At most ``num_points``, without repetition: costs rise and scores fall strictly.
    """
    low = smallest_cost(choices)
    high = sum(_undominated(options)[-1].cost for options in _by_unit(choices).values())
    budgets = np.linspace(low, high, max(num_points, 1)).astype(np.int64).tolist()
    front: list[Allocation] = []
    for budget in budgets:
        point = evaluate(choices, allocate(choices, budget_bytes=budget))
        if not front or point.score < front[-1].score:
            front.append(point)
    return front


def uniform_alternatives(choices: Sequence[Choice]) -> dict[str, Allocation]:
    """What every option would give if all units took it, for the options that all of them offer.

    A unit with a single choice keeps it: it is fixed in advance.
    """
    units = _by_unit(choices)
    free = [{c.option for c in options} for options in units.values() if len(options) > 1]
    common = set.intersection(*free) if free else set()
    names = dict.fromkeys(c.option for c in choices if c.option in common)
    return {name: evaluate(choices, _uniform(units, name)) for name in names}


def _uniform(units: dict[str, list[Choice]], name: str) -> dict[str, str]:
    return {
        unit: name if len(options) > 1 else options[0].option for unit, options in units.items()
    }


def _by_unit(choices: Iterable[Choice]) -> dict[str, list[Choice]]:
    """Choices of each unit, checked."""
    units: dict[str, list[Choice]] = {}
    for choice in choices:
        if not math.isfinite(choice.score):
            raise NumericError(
                f"the score of {choice.unit} as {choice.option} is {choice.score}",
                code="NU01",
                why="a format whose damage is not a finite number cannot be compared with others",
                fix="leave this candidate out, or check the calibration data",
            )
        units.setdefault(choice.unit, []).append(choice)
    return units


def _undominated(options: list[Choice]) -> list[Choice]:
    """Options by rising cost and strictly falling score."""
    kept: list[Choice] = []
    for choice in sorted(options, key=lambda c: (c.cost, c.score, c.option)):
        if not kept or choice.score < kept[-1].score:
            kept.append(choice)
    return kept


def _solve(units: dict[str, list[Choice]], budget: int) -> dict[str, Choice]:
    """The 0/1 program over undominated options."""
    flat = [choice for options in units.values() for choice in options]
    owner = [index for index, options in enumerate(units.values()) for _ in options]
    one_each = csr_array((np.ones(len(flat)), (owner, range(len(flat)))))
    cost = np.array([c.cost for c in flat], dtype=np.float64) / max(budget, 1)
    result = milp(
        _objective(units) + TIE_WEIGHT * cost / max(cost.sum(), 1e-30),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(cost[None], ub=1)],
        options={"mip_rel_gap": 0.0, "time_limit": TIME_LIMIT_S},
    )
    if result.x is None:
        raise NumericError(
            f"the allocation of formats was not solved: {result.message}",
            code="NU12",
            fix="offer fewer candidates, or a budget further from the smallest one",
        )
    taken = [choice for choice, value in zip(flat, result.x, strict=True) if value > 0.5]
    return _within(dict(zip(units, taken, strict=True)), units, budget)


def _objective(units: dict[str, list[Choice]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Scores, each unit's lowest shifted to 0, the largest scaled to SCORE_SCALE."""
    shifted = [c.score - options[-1].score for options in units.values() for c in options]
    largest = max(shifted, default=0.0)
    return np.array(shifted) * (SCORE_SCALE / largest if largest > 0 else 1.0)


def _within(
    chosen: dict[str, Choice], units: dict[str, list[Choice]], budget: int
) -> dict[str, Choice]:
    """Undo an overrun of the budget inside the solver's tolerance, at the least loss per byte."""
    while sum(c.cost for c in chosen.values()) > budget:
        steps = [
            ((lower.score - now.score) / (now.cost - lower.cost), lower)
            for unit, now in chosen.items()
            for lower in units[unit]
            if lower.cost < now.cost
        ]
        best = min(steps, key=lambda step: step[0])[1]
        chosen = {**chosen, best.unit: best}
    return chosen


def _spend_leftover(
    chosen: dict[str, Choice], units: dict[str, list[Choice]], budget: int
) -> dict[str, Choice]:
    """Take the best single upgrade that still fits, as long as there is one."""
    while True:
        left = budget - sum(c.cost for c in chosen.values())
        gains = [
            (now.score - upper.score, upper)
            for unit, now in chosen.items()
            for upper in units[unit]
            if upper.score < now.score and upper.cost - now.cost <= left
        ]
        if not gains:
            return chosen
        best = max(gains, key=lambda gain: gain[0])[1]
        chosen = {**chosen, best.unit: best}
