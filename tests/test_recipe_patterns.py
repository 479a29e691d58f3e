"""Patterns match whole names, say when they match nothing, and cannot run away."""

from __future__ import annotations

import fnmatch
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import RecipeError, Where
from compressor.recipe.patterns import _glob, check_patterns, match_names

NAMES = [
    f"model.layers.{layer}.{part}"
    for layer in range(12)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]


def matched(pattern: str) -> list[str]:
    return match_names([pattern], NAMES, where=Where())[pattern]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("linear", 36), ("model.layers.1", 3), ("model.layers.1.mlp.down_proj", 1),
        ("*.down_proj", 12), ("model.layers.1*", 9), ("*mlp*", 12), ("*", 36),
        (r"re:model\.layers\.1\..*", 3), (r"re:.*\.(q|v)_proj", 24), (r"re:.*\.1?[02]\.mlp.*", 3),
    ],
)  # fmt: skip
def test_a_pattern_matches_whole_names(pattern: str, count: int) -> None:
    assert len(matched(pattern)) == count


@pytest.mark.parametrize("pattern", ["mlp", "re:mlp", "model.layers.1.ml", "layers.1", ""])
def test_a_part_of_a_name_matches_nothing(pattern: str) -> None:
    with pytest.raises(RecipeError) as caught:
        matched(pattern)
    assert caught.value.code == "RC14"


def test_a_miss_names_the_five_nearest_names_and_its_place() -> None:
    with pytest.raises(RecipeError) as caught:
        match_names(["model.layers.0.mlp.dwn_proj"], NAMES, where=Where(file="r.yaml", line=4))
    assert "model.layers.0.mlp.down_proj" in caught.value.fix
    assert caught.value.fix.count(",") == 4
    assert "r.yaml:4" in str(caught.value)


def test_a_default_pattern_may_match_nothing() -> None:
    assert match_names(["lm_head"], NAMES, where=Where(), optional=["lm_head"]) == {"lm_head": []}


@pytest.mark.parametrize(
    "pattern",
    ["re:(a+)+$", "re:(a|aa)+", "re:(.*)*x", "re:((a?)b)*", r"re:(a)\1", "re:(?=a)b", "re:[",
     "re:" + "a" * 600, "re:.*.*.*.*.*x", "re:(a{1,9}){2,}", "re:(?i)a", "re:x{99999999999999}"],
)  # fmt: skip
def test_dangerous_and_broken_expressions_are_refused(pattern: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_patterns([pattern], where=Where())
    assert caught.value.code == "RC16"


def test_the_worst_expression_that_is_allowed_ends_soon() -> None:
    start = time.thread_time()
    with pytest.raises(RecipeError):
        match_names(["re:.*a.*a.*a.*ab"], ["a" * 120] * 400, where=Where())
    assert time.thread_time() - start < 3


@given(st.text(alphabet="ab*.", max_size=8), st.text(alphabet="ab.", max_size=12))
def test_globs_equal_the_standard_library_without_its_classes(pattern: str, name: str) -> None:
    if "*" in pattern:
        assert _glob(pattern, name) == fnmatch.fnmatchcase(name, pattern)
