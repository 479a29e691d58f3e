"""The knapsack of `allocation.py` under several limits at once, solved exactly.

    minimise  sum_u score[u, o(u)]   subject to   sum_u cost_k[u, o(u)] <= limit_k   for every k

Bytes and milliseconds, say: a format with fewer bytes can be the slower one, so neither limit
implies the other. Three steps, as with one limit:

1. relax: prices lambda >= 0, one for each limit, by subgradient ascent on the Lagrangian

       L(lambda) = sum_u min_o (score + lambda . cost) - lambda . limit,

   which bounds every allocation from below, whatever the prices are;
2. reduce: r[u, o] >= 0 is what an option costs beyond the best of its unit at these prices; an
   allocation lies at least sum r above L, so options whose r exceeds the gap between L and an
   allocation that is known to fit cannot be part of a better one;
3. search: dynamic programming over units; a state dies when it cannot fit any more, when its sum of
   r exceeds the gap, or when another state is no worse in the score and in every cost.

A first, narrow pass makes the gap small. Exact as long as at most BEAMS[-1] states are alive in the
second one, which holds for dozens of units; beyond that those with the least sum of r are kept (the
result still fits, and is never worse than the allocation of step 2).

Legend: U units, O options (padded), K limits, N states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BEAMS = (256, 1024)  # states alive: a narrow pass for a tight gap, then the real one
ROUNDS = 400  # of the subgradient ascent


@dataclass(frozen=True, slots=True)
class Problem:
    """Scores [U, O], costs [U, O, K] and limits [K]; options that do not exist cost inf."""

    scores: Floats
    costs: Floats
    limits: Floats

    @staticmethod
    def of(scores: Sequence[Sequence[float]], costs: Sequence[Floats], limits: Floats) -> Problem:
        """Pad units to the same number of options; powers of two make the costs alike exactly."""
        scale = 2.0 ** np.floor(np.log2(limits))
        widest = max(len(row) for row in scores)
        s = np.full((len(scores), widest), np.inf)
        c = np.full((len(scores), widest, len(limits)), np.inf)
        for unit, (row, part) in enumerate(zip(scores, costs, strict=True)):
            s[unit, : len(row)], c[unit, : len(row)] = row, part / scale
        return Problem(s, c, limits / scale)

    def sums(self, chosen: Ints) -> tuple[float, Floats]:
        """Score and costs [K] of one option for each unit."""
        units = np.arange(len(chosen))
        total: Floats = self.costs[units, chosen].sum(0)
        return math.fsum(self.scores[units, chosen]), total

    def priced(self, prices: Floats) -> Floats:
        """score + lambda . cost [U, O]."""
        with np.errstate(invalid="ignore"):
            out: Floats = self.scores + self.costs @ prices
        return np.where(np.isfinite(self.scores), out, np.inf)


def solve(problem: Problem) -> Ints | None:
    """The option of every unit [U]; None if nothing fits."""
    prices = _prices(problem)
    known = _greedy(problem, prices)
    priced = problem.priced(prices)
    reduced = priced - priced.min(1, keepdims=True)
    bound = float(priced.min(1).sum() - prices @ problem.limits)
    rounding = 1e-12 * float(np.abs(problem.scores[np.isfinite(problem.scores)]).sum())
    gap = np.inf if known is None else _score(problem, known) - bound + rounding
    for beam in BEAMS:
        found = _search(problem, reduced, gap, beam)
        if found is not None and (known is None or _score(problem, found) < _score(problem, known)):
            known = found
            gap = _score(problem, known) - bound + rounding
    return known


def _score(problem: Problem, chosen: Ints) -> float:
    return problem.sums(chosen)[0]


def _prices(problem: Problem) -> Floats:
    """Prices [K] with a good lower bound: subgradient ascent with steps of falling size."""
    units = np.arange(len(problem.scores))
    prices = np.zeros(problem.costs.shape[2])
    finite = np.where(np.isfinite(problem.scores), problem.scores, np.nan)
    size = float((np.nanmax(finite, 1) - np.nanmin(finite, 1)).sum()) or 1.0
    best, best_bound = prices, -np.inf
    for step in range(ROUNDS):
        priced = problem.priced(prices)
        chosen = priced.argmin(1)
        bound = float(priced[units, chosen].sum() - prices @ problem.limits)
        if bound > best_bound:
            best, best_bound = prices, bound
        over = problem.costs[units, chosen].sum(0) - problem.limits
        norm = float(np.linalg.norm(over))
        if norm == 0.0:
            break
        prices = np.maximum(prices + size * 0.98**step * over / norm, 0.0)
    return best


def _greedy(problem: Problem, prices: Floats) -> Ints | None:
    """An allocation that fits: prices raised until it does, then the best single upgrades."""
    ceiling = float(prices.sum()) or 1.0
    for factor in np.geomspace(1.0, 1e6, 60):
        chosen = problem.priced(prices * factor + (factor - 1) * 1e-3 * ceiling).argmin(1)
        if (problem.sums(chosen)[1] <= problem.limits).all():
            return _upgraded(problem, chosen)
    return None


def _upgraded(problem: Problem, chosen: Ints) -> Ints:
    """Take the best single change that still fits, as long as there is one."""
    units = np.arange(len(chosen))
    while True:
        spent = problem.sums(chosen)[1]
        after = spent + problem.costs - problem.costs[units, chosen][:, None]
        gain = problem.scores[units, chosen][:, None] - problem.scores
        gain[~(after <= problem.limits).all(2)] = -np.inf
        unit, option = np.unravel_index(int(gain.argmax()), gain.shape)
        if not gain[unit, option] > 0:
            return chosen
        chosen = chosen.copy()
        chosen[unit] = option


@dataclass(frozen=True, slots=True)
class _States:
    """Sums of the units so far: score [N], costs [N, K], reduced costs [N]."""

    score: Floats
    costs: Floats
    excess: Floats

    def take(self, index: Ints) -> _States:
        return _States(self.score[index], self.costs[index], self.excess[index])


def _search(problem: Problem, reduced: Floats, gap: float, beam: int) -> Ints | None:
    """The optimum among what the gap leaves, or None."""
    count, width, kinds = problem.costs.shape
    order = np.argsort((reduced <= gap).sum(1), kind="stable")  # decided units first
    rest = problem.costs.min(1)[order][::-1].cumsum(0)[::-1]  # least cost of this unit and later
    states = _States(np.zeros(1), np.zeros((1, kinds)), np.zeros(1))
    trail: list[Ints] = []
    for place, unit in enumerate(order):
        later = rest[place + 1] if place + 1 < count else np.zeros(kinds)
        states = _States(
            (states.score[:, None] + problem.scores[unit]).ravel(),
            (states.costs[:, None] + problem.costs[unit]).reshape(-1, kinds),
            (states.excess[:, None] + reduced[unit]).ravel(),
        )
        alive = (states.excess <= gap) & (states.costs + later <= problem.limits).all(1)
        alive &= np.isfinite(states.score)
        kept = np.flatnonzero(alive)
        kept = kept[_undominated(states.take(kept), beam)]
        states = states.take(kept)
        trail.append(kept)
    if not len(states.score):
        return None
    chosen, state = np.zeros(count, np.int64), int(states.score.argmin())
    for unit, kept in zip(order[::-1], trail[::-1], strict=True):
        state, chosen[unit] = divmod(int(kept[state]), width)
    return chosen


def _undominated(states: _States, beam: int) -> Ints:
    """Indices of states that no other one matches or beats in the score and in every cost."""
    index: Ints = np.lexsort((*states.costs.T, states.score)).astype(np.int64)
    if len(index) > 4 * beam:
        nearest = states.excess[index].argpartition(4 * beam)[: 4 * beam]
        index = index[np.sort(nearest)]
    costs = states.costs[index]
    dead = np.zeros(len(index), bool)
    for start in range(0, len(index), 256):  # a state is dominated only by an earlier one
        part = slice(start, start + 256)
        before = costs[: part.stop][~dead[: part.stop]]
        places = np.flatnonzero(~dead[: part.stop])
        beaten = (before[None] <= costs[part][:, None]).all(2)
        beaten &= places[None] < np.arange(start, start + len(costs[part]))[:, None]
        dead[part] = beaten.any(1)
    index = index[~dead]
    if len(index) <= beam:
        return index
    return index[states.excess[index].argpartition(beam)[:beam]]
