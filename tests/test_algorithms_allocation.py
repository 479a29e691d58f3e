"""Mixed precision: the solver against brute force, and its promises."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from compressor.algorithms.allocation import (
    Allocation,
    Choice,
    allocate,
    evaluate,
    pareto_front,
    smallest_cost,
    uniform_alternatives,
)
from compressor.errors import NumericError, RecipeError

OPTIONS = ("w2", "w4", "w8")


def random_choices(seed: int, num_units: int = 7, unit_score: float = 1.0) -> list[Choice]:
    """Three options a unit; damage mostly falls with bytes, but not always."""
    source = random.Random(seed)
    choices = []
    for unit in range(num_units):
        size, damage = source.randint(100, 5000), unit_score * 10 ** source.uniform(-3, 0)
        for option, bits in zip(OPTIONS, (2, 4, 8), strict=True):
            score = damage * 4.0**-bits * source.uniform(0.2, 5)
            choices.append(Choice(f"layer{unit}", option, size * bits, score))
    return choices


def brute_force(choices: list[Choice], budget: int) -> float:
    units: dict[str, list[Choice]] = {}
    for choice in choices:
        units.setdefault(choice.unit, []).append(choice)
    sums = (
        math.fsum(c.score for c in combination)
        for combination in itertools.product(*units.values())
        if sum(c.cost for c in combination) <= budget
    )
    return min(sums)


def solve(choices: list[Choice], budget: int) -> Allocation:
    return evaluate(choices, allocate(choices, budget_bytes=budget))


@pytest.mark.parametrize("unit_score", [1.0, 1e-12, 1e9])
@pytest.mark.parametrize("seed", range(6))
def test_the_allocation_is_the_brute_force_optimum(seed: int, unit_score: float) -> None:
    choices = random_choices(seed, unit_score=unit_score)
    low = smallest_cost(choices)
    for budget in (low, int(low * 1.3), int(low * 1.9), low * 3, low * 5):
        found = solve(choices, budget)
        assert found.cost <= budget
        assert found.score == pytest.approx(brute_force(choices, budget), rel=1e-6)


def test_a_larger_budget_is_never_worse() -> None:
    choices = random_choices(11, num_units=30)
    low = smallest_cost(choices)
    scores = [solve(choices, low + low * step // 10).score for step in range(32)]
    assert scores == sorted(scores, reverse=True)


def test_every_unit_gets_one_option_in_order() -> None:
    choices = random_choices(3)
    chosen = allocate(choices, budget_bytes=2 * smallest_cost(choices))
    assert list(chosen) == [f"layer{unit}" for unit in range(7)]
    assert set(chosen.values()) <= set(OPTIONS)


def test_an_impossible_budget_names_the_smallest_possible_one() -> None:
    choices = random_choices(0)
    low = smallest_cost(choices)
    with pytest.raises(RecipeError, match=str(low - 1)) as caught:
        allocate(choices, budget_bytes=low - 1)
    assert caught.value.code == "NU12"
    assert str(low) in caught.value.fix


def test_equal_scores_take_fewer_bytes() -> None:
    choices = [Choice("a", "big", 100, 0.5), Choice("a", "small", 10, 0.5)]
    assert allocate(choices, budget_bytes=1000) == {"a": "small"}
    one_upgrade = [
        Choice(unit, option, cost, score)
        for unit, large in (("a", 40), ("b", 30))
        for option, cost, score in (("low", 10, 1.0), ("high", large, 0.0))
    ]
    assert allocate(one_upgrade, budget_bytes=50) == {"a": "low", "b": "high"}


def test_negative_scores_from_noise_are_allowed() -> None:
    choices = [Choice("a", "w4", 10, -1e-5), Choice("a", "w8", 20, 2e-5)]
    assert allocate(choices, budget_bytes=20) == {"a": "w4"}


def test_a_score_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NumericError):
        allocate([Choice("a", "w4", 10, math.nan)], budget_bytes=20)


def test_the_front_rises_in_cost_and_falls_in_score() -> None:
    choices = random_choices(5)
    front = pareto_front(choices, 12)
    assert [p.cost for p in front] == sorted({p.cost for p in front})
    assert [p.score for p in front] == sorted({p.score for p in front}, reverse=True)
    assert front[0].cost == smallest_cost(choices)
    assert front[-1].score == pytest.approx(brute_force(choices, 10**9))


def test_uniform_alternatives_cover_common_options_and_keep_fixed_units() -> None:
    choices = [*random_choices(2, num_units=3), Choice("lm_head", "bf16", 999, 0.0)]
    choices.append(Choice("layer0", "w3", 5, 1.0))
    uniform = uniform_alternatives(choices)
    assert list(uniform) == list(OPTIONS)
    assert uniform["w4"].options["lm_head"] == "bf16"
    assert uniform["w4"].cost == 999 + sum(c.cost for c in choices if c.option == "w4")


def test_the_allocation_is_never_worse_than_uniform_at_its_size() -> None:
    choices = random_choices(8, num_units=40)
    for point in uniform_alternatives(choices).values():
        assert solve(choices, point.cost).score <= point.score * (1 + 1e-9)


def test_damage_proportional_to_bytes_still_ends_soon_and_fills_the_budget() -> None:
    source = random.Random(0)
    choices = [
        Choice(f"layer{unit}", str(bits), size * bits, (9 - bits) * size / 1e6)
        for unit, size in enumerate(source.choices(range(10**5, 10**7), k=40))
        for bits in (2, 3, 4, 8)
    ]
    budget = int(1.7 * smallest_cost(choices))
    found = solve(choices, budget)
    assert 0.999 * budget < found.cost <= budget
