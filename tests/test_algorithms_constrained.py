"""The knapsack under several limits at once: against brute force, and its promises."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from compressor.algorithms.allocation import (
    Choice,
    allocate,
    evaluate,
    pareto_front,
    smallest_cost,
)
from compressor.errors import RecipeError

BITS = {"w2": 2, "w3": 3, "w4": 4, "w8": 8}


def two_costs(seed: int, num_units: int = 6) -> list[Choice]:
    """Bytes, and a time that is not proportional to them: some formats are slow."""
    source = random.Random(seed)
    choices = []
    for unit in range(num_units):
        size, damage = source.randint(100, 5000), 10 ** source.uniform(-3, 0)
        for option, bits in BITS.items():
            score = damage * 4.0**-bits * source.uniform(0.2, 5)
            times = (size * bits / source.uniform(0.3, 1), float(source.randint(1, 9)))
            choices.append(Choice(f"layer{unit}", option, size * bits, score, times))
    return choices


def brute_force(choices: list[Choice], budget: int, limits: list[float]) -> float | None:
    units: dict[str, list[Choice]] = {}
    for choice in choices:
        units.setdefault(choice.unit, []).append(choice)
    return min(
        (
            math.fsum(c.score for c in taken)
            for taken in itertools.product(*units.values())
            if sum(c.cost for c in taken) <= budget
            and all(sum(c.others[k] for c in taken) <= limit for k, limit in enumerate(limits))
        ),
        default=None,
    )


def limits_of(choices: list[Choice], factors: tuple[float, float]) -> list[float]:
    units = {c.unit for c in choices}
    least = [
        sum(min(c.others[k] for c in choices if c.unit == unit) for unit in units) for k in (0, 1)
    ]
    return [least[0] * factors[0], least[1] * factors[1]]


@pytest.mark.parametrize("seed", range(8))
def test_the_allocation_under_three_limits_is_the_brute_force_optimum(seed: int) -> None:
    choices = two_costs(seed)
    for size, *others in itertools.product((1.05, 1.4, 3.0), (1.06, 1.5), (1.1, 2.0)):
        budget, limits = int(smallest_cost(choices) * size), limits_of(choices, tuple(others))
        wanted = brute_force(choices, budget, limits)
        if wanted is None:
            with pytest.raises(RecipeError, match="limits at once"):
                allocate(choices, budget_bytes=budget, limits=limits)
            continue
        found = allocate(choices, budget_bytes=budget, limits=limits)
        assert evaluate(choices, found).score == pytest.approx(wanted, rel=1e-9)


def test_no_limit_is_ever_exceeded() -> None:
    choices = two_costs(3, num_units=40)
    by_key = {(c.unit, c.option): c for c in choices}
    budget, limits = int(1.5 * smallest_cost(choices)), limits_of(choices, (1.4, 1.8))
    taken = [by_key[item] for item in allocate(choices, budget_bytes=budget, limits=limits).items()]
    assert sum(c.cost for c in taken) <= budget
    assert all(sum(c.others[k] for c in taken) <= limits[k] for k in (0, 1))


def test_a_looser_second_limit_is_never_worse() -> None:
    choices, scores = two_costs(5, num_units=12), []
    for factor in (1.2, 1.5, 2.0, 5.0):
        limits = limits_of(choices, (factor, 2.0))
        found = allocate(choices, budget_bytes=2 * smallest_cost(choices), limits=limits)
        scores.append(evaluate(choices, found).score)
    assert scores == sorted(scores, reverse=True)


def test_the_front_under_a_second_limit_keeps_it_everywhere() -> None:
    choices = two_costs(7, num_units=10)
    limits = limits_of(choices, (1.6, 3.0))
    front = pareto_front(choices, 8, limits)
    by_key = {(c.unit, c.option): c for c in choices}
    assert len(front) > 2
    for point in front:
        assert sum(by_key[item].others[0] for item in point.options.items()) <= limits[0]
