"""Mixtures: exact shares, spread evenly, the same each time; contradictions are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoTokenizer

from compressor.data import token_rows
from compressor.data.mixture import apportion, spread
from compressor.errors import DataError, RecipeError
from compressor.recipe import DataConfig, EvaluationData, parse_recipe
from tests.faults.ca import lines
from tests.fixtures_models import VOCAB

FILLER = " and so on for index, value in values" * 3


@pytest.fixture(scope="module")
def tokenizer(tiny_models: Callable[[str], Path]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_models("llama"))


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    """Three files whose texts begin with their name."""
    return {
        name: str(lines(*(json.dumps({"text": f"{name}{i}{FILLER}"}) for i in range(40)),
                        name=f"{name}.jsonl")(tmp_path))
        for name in "xyz"
    }  # fmt: skip


def mixed(texts: dict[str, str], tokenizer: Any, weights: dict[str, float], **keys: Any) -> Any:
    parts = [{"source": texts[n], "weight": w} for n, w in weights.items()]
    config = DataConfig.model_validate({"sources": parts, "num_samples": 16, "seq_len": 12} | keys)
    return token_rows(config, tokenizer, vocab_size=VOCAB, max_positions=256)


def kinds(found: Any, tokenizer: Any) -> str:
    return "".join(tokenizer.decode(row[1:])[0] for row in found.tokens)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 500))
def test_shares_add_up_and_are_within_one_row_of_exact(weights: list[float], total: int) -> None:
    counts = apportion(weights, total)
    assert sum(counts) == total
    assert all(abs(c - total * w / sum(weights)) < 1 for c, w in zip(counts, weights, strict=True))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=4))
def test_every_row_of_every_source_is_laid_out_once_in_order(counts: list[int]) -> None:
    order = spread(counts)
    for source, count in enumerate(counts):
        assert [k for i, k in order if i == source] == list(range(count))


def test_rows_come_in_the_shares_of_the_weights_and_evenly_spread(texts, tokenizer):
    found = mixed(texts, tokenizer, {"x": 2.0, "y": 1.0, "z": 1.0})
    order = kinds(found, tokenizer)
    assert (order.count("x"), order.count("y"), order.count("z")) == (8, 4, 4)
    assert all(set(order[i : i + 4]) == set("xyz") for i in range(0, 16, 4))
    assert [s.num_rows for s in found.sources] == [8, 4, 4]
    assert found.num_documents >= 16


def test_a_mixture_is_the_same_each_time_and_differs_by_seed(texts, tokenizer):
    weights = {"x": 1.0, "y": 1.0}
    first, again = (mixed(texts, tokenizer, weights).digest for _ in range(2))
    assert first == again
    assert mixed(texts, tokenizer, weights, seed=1).digest != first


def test_packed_mixtures_keep_their_positions(texts, tokenizer):
    found = mixed(texts, tokenizer, {"x": 1.0, "y": 3.0}, packing="packed")
    assert found.positions.shape == found.tokens.shape


def test_a_source_that_is_too_short_for_its_share_is_refused(texts, tokenizer):
    with pytest.raises(DataError, match="of the 75 rows of its share") as caught:
        mixed(texts, tokenizer, {"x": 1.0, "y": 3.0}, num_samples=100)
    assert caught.value.code == "CA03"
    assert "y.jsonl" in str(caught.value)


def test_a_source_whose_weight_is_too_small_is_told(texts, tokenizer):
    found = mixed(texts, tokenizer, {"x": 1.0, "y": 0.001})
    assert "too small for a single row" in found.notes[0]


@pytest.mark.parametrize(
    ("keys", "tells"),
    [
        ({"source": "a.txt", "sources": [{"source": "b.txt"}]}, "not both"),
        ({"split": "test", "sources": [{"source": "b.txt"}]}, "not both"),
        ({"num_samples": 1, "sources": [{"source": "a"}, {"source": "b"}]}, "as many rows"),
        ({"sources": [{"source": "a", "weight": 0.0}]}, "greater than 0"),
        ({"sources": [{"source": "a", "wieght": 1.0}]}, "wieght"),
    ],
)
def test_contradicting_sources_are_refused(keys: dict[str, Any], tells: str) -> None:
    with pytest.raises(ValidationError, match=tells):
        DataConfig.model_validate(keys)


def test_an_unknown_key_of_a_source_is_told_with_its_place_and_the_nearest_name() -> None:
    text = """\
name: x
model: {path: reference}
output: out
stages:
  - kind: calibrate
    data:
      sources:
        - source: a.txt
          wieght: 2
  - kind: pack
"""
    with pytest.raises(RecipeError, match="unknown key `wieght`") as caught:
        parse_recipe(text)
    assert caught.value.where.line == 9
    assert "did you mean `weight`" in caught.value.fix


def test_a_model_does_not_judge_itself_and_reference_parts_are_held_out() -> None:
    with pytest.raises(ValidationError, match="cannot judge"):
        EvaluationData.model_validate({"sources": [{"source": "self"}]})
    part = EvaluationData.model_validate({"sources": [{"source": "reference"}]}).sources[0]
    assert part.split == "evaluation"


def test_names_can_be_shown_without_folders() -> None:
    data = DataConfig.model_validate(
        {
            "sources": [{"source": "/a/x.txt"}, {"source": "self"}],
            "sampling": {"prefixes": "/b/y.txt"},
        }
    )
    assert data.names == ["/a/x.txt", "self", "/b/y.txt"]
    shown = data.renamed({"/a/x.txt": "x.txt", "/b/y.txt": "y.txt"})
    assert shown.names == ["x.txt", "self", "y.txt"]
