"""Mixed precision as a knapsack: one option for every unit, bytes within a budget, least damage.

    minimise  sum_u score[u, o(u)]     subject to  sum_u cost[u, o(u)] <= budget

A unit is what must share one format (q, k and v of a layer, say); an option is a format. Scores are
damages that add up, such as the KL divergence measured with one unit compressed at a time.

This multiple-choice knapsack is solved exactly, in three steps:

1. relax: walk along the lower convex hull of every unit, best damage saved per byte first. The step
   that no longer fits has the price lambda (damage per byte) at which the budget sells out, and
   sum_u min_o (score + lambda cost) - lambda budget bounds every allocation from below;
2. reduce: an allocation lies above that bound by sum_u r[u, o] + lambda * unused bytes, where
   r >= 0 is what the option costs beyond the best of its unit at the price lambda. Options whose r
   alone exceeds the gap to a greedy allocation cannot be part of a better one: few remain;
3. search: dynamic programming over units on the Pareto set of (bytes, score), with the same bound.

An integer-programming library would do too. HiGHS in scipy 1.17 writes debugging lines to standard
output on such problems, needs scores scaled to its absolute tolerances, and was no faster.
Equal scores resolve to fewer bytes.

Exact means exact as long as at most MAX_STATES states are alive, which holds with room to spare for
the layers of a model. Beyond that (hundreds of unlike sizes with damage proportional to bytes) the
states nearest in bytes are merged; the result still fits and is never worse than the greedy one.

Further limits (`Choice.others`, say milliseconds): if the optimum within the bytes alone keeps them
too it is the answer, otherwise `constrained.py` solves the problem with all limits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compressor.algorithms import constrained
from compressor.errors import NumericError, RecipeError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MAX_STATES = 1 << 15
ROUNDING = 1e-12  # of all scores together: what sums of scores may be off by


@dataclass(frozen=True, slots=True)
class Choice:
    """One option of one unit: cost in bytes, score = damage (lower is better), other costs."""

    unit: str
    option: str
    cost: int
    score: float
    others: tuple[float, ...] = ()


Units = dict[str, list[Choice]]


@dataclass(frozen=True, slots=True)
class Allocation:
    """An option for every unit, with the sums of its bytes and of its scores."""

    options: dict[str, str]
    cost: int
    score: float


def allocate(
    choices: Sequence[Choice], *, budget_bytes: int, limits: Sequence[float] = ()
) -> dict[str, str]:
    """The option of every unit, in order of first appearance, with the least total score.

    `limits` bound the sums of `Choice.others`, in the same order. Raises RecipeError NU12, naming
    the smallest feasible budget, if a budget is too small, and NumericError NU01 if a score is not
    finite.
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
    chosen = _solve(useful, budget_bytes)
    if not _keeps(chosen.values(), limits):
        chosen = _solve_all(units, budget_bytes, limits)
    return {unit: choice.option for unit, choice in chosen.items()}


def _keeps(chosen: Iterable[Choice], limits: Sequence[float]) -> bool:
    """Whether the other costs of some options stay within the limits."""
    taken = list(chosen)
    sums = [math.fsum(c.others[k] for c in taken) for k in range(len(limits))]
    return all(s <= limit for s, limit in zip(sums, limits, strict=True))


def _solve_all(units: Units, budget: int, limits: Sequence[float]) -> dict[str, Choice]:
    """The optimum under all limits; raises RecipeError NU12 if there is none."""
    rows = [sorted(options, key=lambda c: (c.score, c.cost)) for options in units.values()]
    problem = constrained.Problem.of(
        [[c.score for c in row] for row in rows],
        [np.array([[float(c.cost), *c.others] for c in row]) for row in rows],
        np.array([float(budget), *limits]),
    )
    found = constrained.solve(problem)
    if found is None:
        least = [sum(min(c.others[k] for c in row) for row in rows) for k in range(len(limits))]
        raise RecipeError(
            "no allocation keeps all limits at once",
            code="NU12",
            why=f"the smallest values, each for itself: {smallest_cost(_flat(units))} bytes, "
            + ", ".join(f"{value:.6g}" for value in least),
            fix="raise a limit, or allow smaller formats",
        )
    return {unit: row[i] for unit, row, i in zip(units, rows, found.tolist(), strict=True)}


def _flat(units: Units) -> list[Choice]:
    return [choice for options in units.values() for choice in options]


def smallest_cost(choices: Iterable[Choice]) -> int:
    """Bytes of the smallest option of every unit together."""
    return sum(min(c.cost for c in options) for options in _by_unit(choices).values())


def evaluate(choices: Iterable[Choice], options: dict[str, str]) -> Allocation:
    """Cost and score of a given assignment; raises KeyError for an option that is not offered."""
    offered = {(c.unit, c.option): c for c in choices}
    taken = [offered[item] for item in options.items()]
    return Allocation(options, sum(c.cost for c in taken), math.fsum(c.score for c in taken))


def pareto_front(
    choices: Sequence[Choice], num_points: int, limits: Sequence[float] = ()
) -> list[Allocation]:
    """Best allocations over budgets from the smallest to the largest useful one.

    At most ``num_points``, without repetition: costs rise and scores fall strictly. Budgets for
    which the other limits cannot be kept are passed over.
    """
    low = smallest_cost(choices)
    high = sum(_undominated(options)[-1].cost for options in _by_unit(choices).values())
    budgets = np.linspace(low, high, max(num_points, 1)).astype(np.int64).tolist()
    front: list[Allocation] = []
    for budget in budgets:
        try:
            options = allocate(choices, budget_bytes=budget, limits=limits)
        except RecipeError:
            continue
        point = evaluate(choices, options)
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


def _uniform(units: Units, name: str) -> dict[str, str]:
    return {
        unit: name if len(options) > 1 else options[0].option for unit, options in units.items()
    }


def _by_unit(choices: Iterable[Choice]) -> Units:
    """Choices of each unit, checked."""
    units: Units = {}
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


def _solve(units: Units, budget: int) -> dict[str, Choice]:
    """The optimum over undominated options."""
    price, chosen = _relax(units, budget)
    chosen = _spend_leftover(chosen, units, budget)
    if price == 0:
        return chosen
    lowest = {u: min(c.score + price * c.cost for c in options) for u, options in units.items()}
    spent = sum(c.cost for c in chosen.values())
    gap = math.fsum(c.score + price * c.cost - lowest[u] for u, c in chosen.items())
    gap += price * (budget - spent)
    gap += ROUNDING * math.fsum(abs(c.score) for options in units.values() for c in options)
    left = {
        u: [c for c in options if c.score + price * c.cost - lowest[u] <= gap]
        for u, options in units.items()
    }
    found = _Search(left, budget=budget, price=price, gap=gap).solve()
    return chosen if found is None or _key(chosen) <= _key(found) else found


def _key(chosen: dict[str, Choice]) -> tuple[float, int]:
    """What is minimised: score, then bytes."""
    return math.fsum(c.score for c in chosen.values()), sum(c.cost for c in chosen.values())


def _relax(units: Units, budget: int) -> tuple[float, dict[str, Choice]]:
    """Price of a byte where the budget sells out (0 if it never does), and a greedy allocation."""
    chosen = {unit: options[0] for unit, options in units.items()}
    left = budget - sum(c.cost for c in chosen.values())
    steps = [step for options in units.values() for step in _hull_steps(options)]
    price = 0.0
    for worth, before, after in sorted(steps, key=lambda step: -step[0]):
        if chosen[after.unit] is before and after.cost - before.cost <= left:
            chosen[after.unit] = after
            left -= after.cost - before.cost
        elif price == 0:
            price = worth
    return price, chosen


def _hull_steps(options: list[Choice]) -> list[tuple[float, Choice, Choice]]:
    """Steps along the lower convex hull: (damage saved per byte, before, after), worth falling."""
    hull: list[Choice] = []
    for choice in options:
        while len(hull) > 1 and _worth(hull[-2], hull[-1]) <= _worth(hull[-2], choice):
            hull.pop()
        hull.append(choice)
    return [(_worth(a, b), a, b) for a, b in itertools.pairwise(hull)]


def _worth(before: Choice, after: Choice) -> float:
    """Damage saved per byte."""
    return (before.score - after.score) / (after.cost - before.cost)


class _Search:
    """Dynamic programming over units; a state is (bytes, score, excess r) of the units so far."""

    def __init__(self, units: Units, *, budget: int, price: float, gap: float) -> None:
        # units with one option left first: they cost nothing to pass
        self.units = dict(sorted(units.items(), key=lambda item: len(item[1])))
        self.order = list(units)
        self.budget, self.price, self.gap = budget, price, gap

    def solve(self) -> dict[str, Choice] | None:
        """The optimum, or None if rounding left no state."""
        rest_low = sum(options[0].cost for options in self.units.values())
        rest_high = sum(options[-1].cost for options in self.units.values())
        cost, score, excess = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
        trail: list[Ints] = []
        for options in self.units.values():
            rest_low -= options[0].cost
            rest_high -= options[-1].cost
            cost, score, excess = self._extend(options, cost, score, excess)
            kept = self._promising(cost, score, excess, rest_low, rest_high)
            cost, score, excess = cost[kept], score[kept], excess[kept]
            trail.append(kept)
        return self._backtrack(trail) if len(cost) else None

    def _extend(
        self, options: list[Choice], cost: Ints, score: Floats, excess: Floats
    ) -> tuple[Ints, Floats, Floats]:
        """All states times all options; the option varies fastest."""
        costs = np.array([c.cost for c in options], np.int64)
        scores = np.array([c.score for c in options])
        reduced = scores + self.price * costs
        reduced -= reduced.min()
        return (
            (cost[:, None] + costs).ravel(),
            (score[:, None] + scores).ravel(),
            (excess[:, None] + reduced).ravel(),
        )

    def _promising(
        self, cost: Ints, score: Floats, excess: Floats, rest_low: int, rest_high: int
    ) -> Ints:
        """Indices of undominated states that can still end within the budget and the gap."""
        unused = np.maximum(self.budget - cost - rest_high, 0)
        possible = (cost + rest_low <= self.budget) & (excess + self.price * unused <= self.gap)
        index: Ints = np.flatnonzero(possible)
        index = index[np.lexsort((score[index], cost[index]))]
        best = np.minimum.accumulate(np.concatenate([[np.inf], score[index]]))
        return _thinned(index[score[index] < best[:-1]], cost)

    def _backtrack(self, trail: list[Ints]) -> dict[str, Choice]:
        """Options of the last state: states are sorted by rising cost and falling score."""
        state, taken = -1, {}
        for (unit, options), kept in zip(
            reversed(self.units.items()), reversed(trail), strict=True
        ):
            state, option = divmod(int(kept[state]), len(options))
            taken[unit] = options[option]
        return {unit: taken[unit] for unit in self.order}


def _thinned(index: Ints, cost: Ints) -> Ints:
    """At most MAX_STATES of the states, sorted by cost: the best score of each range of bytes."""
    if len(index) <= MAX_STATES:
        return index
    low, high = cost[index[0]], cost[index[-1]]
    bucket = (cost[index] - low) * MAX_STATES // (high - low + 1)
    last_of_bucket = np.append(bucket[1:] != bucket[:-1], True)
    thinned: Ints = index[last_of_bucket]
    return thinned


def _spend_leftover(chosen: dict[str, Choice], units: Units, budget: int) -> dict[str, Choice]:
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
