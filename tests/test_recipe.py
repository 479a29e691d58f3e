"""Recipes are strict, remember their lines and read back what they write."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import CompressError, RecipeError, UnsupportedError, UsageError
from compressor.recipe import (
    SCHEMES,
    DistillConfig,
    EvaluateConfig,
    Preset,
    QuantizeConfig,
    Recipe,
    candidate_preset,
    dump_recipe,
    load_recipe,
    parse_recipe,
    parse_size,
    recipe_schema,
)
from compressor.recipe.quantization import Scheme
from compressor.recipe.yaml import parse_scalar
from compressor.resources import resource_dir

SHIPPED = sorted(resource_dir("recipes").glob("*.yaml"))

TEXT = """\
name: x
model: {path: reference}
output: out
stages:
  - kind: calibrate
  - kind: quantize
    budget:
      average_bits: 3.5
  - kind: pack
  - kind: evaluate
"""


def quantize_stage(recipe: Recipe) -> QuantizeConfig:
    stage = next(stage for stage in recipe.stages if stage.kind == "quantize")
    assert isinstance(stage, QuantizeConfig)
    return stage


@pytest.mark.parametrize("file", SHIPPED, ids=[file.stem for file in SHIPPED])
def test_every_shipped_recipe_is_valid_and_reads_back(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.name == file.stem
    assert parse_recipe(dump_recipe(recipe)).model_dump() == recipe.model_dump()


@pytest.mark.parametrize("file", SHIPPED, ids=[file.stem for file in SHIPPED])
def test_every_key_of_a_shipped_recipe_has_a_comment(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    keys = [i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")]
    bare = [
        lines[i]
        for i in keys
        if " # " not in lines[i] and not lines[i - 1].lstrip().startswith("#")
    ]
    assert bare == []


@pytest.mark.parametrize("file", SHIPPED, ids=[file.stem for file in SHIPPED])
def test_every_shipped_recipe_names_every_key_of_its_stages(file: Path) -> None:
    for stage in load_recipe(file).stages:
        assert set(type(stage).model_fields) == stage.model_fields_set


def test_the_two_orders_of_the_issue_ship() -> None:
    orders = [[stage.kind for stage in load_recipe(file).stages] for file in SHIPPED]
    wanted = (
        ["calibrate", "quantize", "prune", "distill", "evaluate"],
        ["prune", "distill", "calibrate", "quantize", "evaluate"],
    )
    for order in wanted:
        assert any(_is_within(order, shipped) for shipped in orders)


def _is_within(short: list[str], long: list[str]) -> bool:
    rest = iter(long)
    return all(kind in rest for kind in short)


def test_a_stage_knows_the_lines_of_its_own_keys() -> None:
    recipe = parse_recipe(TEXT, file="a.yaml")
    where = quantize_stage(recipe).where("budget.average_bits")
    assert (where.file, where.line, where.key) == ("a.yaml", 8, "stages.1.budget.average_bits")
    assert recipe.line_of("stages.1.budget") == 7
    assert recipe.line_of("stages.1.scheme") is None


def test_a_key_that_is_not_in_the_file_points_at_its_stage() -> None:
    assert quantize_stage(parse_recipe(TEXT)).where("scheme").line == 6


def test_overrides_reach_keys_by_index_by_kind_and_below_missing_parts() -> None:
    overrides = ["stages.1.bits=3", "stages.quantize.protect=[a, b]", "seed=7"]
    overrides += ["stages.evaluate.gate.max_kl=1e-2", "model.path=org/name"]
    recipe = parse_recipe(TEXT, overrides=overrides)
    stage, last = quantize_stage(recipe), recipe.stages[-1]
    assert (stage.bits, stage.protect, recipe.seed) == (3, ["a", "b"], 7)
    assert isinstance(last, EvaluateConfig)
    assert last.gate is not None
    assert last.gate.max_kl == 0.01
    assert recipe.model.path == "org/name"


def test_an_override_of_null_takes_a_part_away() -> None:
    assert quantize_stage(parse_recipe(TEXT, overrides=["stages.1.budget="])).budget is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("no", "no"), ("012", 12), ("1_000", "1_000"), ("0x1F", 31), ("0o17", 15),
        ("true", True), ("True", True), ("on", "on"), ("~", None), ("", None), ("null", None),
        ("-7", -7), (".5", 0.5), ("1:30", "1:30"), ("2026-01-31", "2026-01-31"), ("0b1", "0b1"),
    ],
)  # fmt: skip
def test_scalars_follow_the_core_schema_of_yaml_1_2(text: str, value: Any) -> None:
    result = parse_scalar(text)
    assert result == value
    assert type(result) is type(value)


@given(st.text(max_size=200))
def test_no_text_makes_the_reader_crash(text: str) -> None:
    with suppress(RecipeError, UnsupportedError):
        parse_recipe(text)


@given(st.text(max_size=60))
def test_no_override_makes_the_reader_crash(text: str) -> None:
    with suppress(RecipeError, UsageError, UnsupportedError):
        parse_recipe(TEXT, overrides=[text])


@pytest.mark.parametrize(
    ("text", "size"), [("6GiB", 6 * 2**30), ("500 MB", 500_000_000), ("1.5KB", 1500), ("7B", 7)]
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["6", "0GB", "-1GB", "6 gib", "GB", "1e3MB"])
def test_sizes_without_a_known_unit_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_the_scheme_labels_are_the_presets() -> None:
    assert set(get_args(Scheme)) == set(SCHEMES)


@pytest.mark.parametrize(
    ("label", "group"), [("W3A16", 64), ("W3A16@32", 32), ("W4A16_ASYM@channel", -1)]
)
def test_candidates_take_their_own_group_or_the_stages(label: str, group: int) -> None:
    preset = candidate_preset(label, 64)
    assert preset is not None
    assert preset.group_size == group


@pytest.mark.parametrize("label", ["W3A17", "W3A16@48", "NVFP4@16", "BF16@32", "@32"])
def test_unknown_candidates_are_refused(label: str) -> None:
    with pytest.raises(ValueError, match="is no candidate"):
        QuantizeConfig(kind="quantize", candidates=[label])


def test_bits_symmetry_and_group_win_over_the_scheme() -> None:
    config = QuantizeConfig(kind="quantize", bits=3, symmetric=False, group_size=32)
    assert config.preset == Preset(3, False, 32)
    assert QuantizeConfig(kind="quantize").preset == Preset(4, True, 128)


def test_bits_per_weight_count_scales_and_zero_points() -> None:
    assert Preset(4, True, 128).bits_per_weight == 4 + 16 / 128
    assert Preset(4, False, 32).bits_per_weight == 4 + 20 / 32
    assert Preset(4, True, -1).bits_per_weight == 4


def test_evaluation_reads_held_out_text_unless_told_otherwise() -> None:
    assert EvaluateConfig(kind="evaluate").data.split == "evaluation"
    recipe = parse_recipe(TEXT + "    data: {source: my.txt}\n")
    last = recipe.stages[-1]
    assert isinstance(last, EvaluateConfig)
    assert last.data.split is None


def test_defaults_are_not_shared_between_recipes() -> None:
    first, second = (DistillConfig(kind="distill") for _ in range(2))
    assert first.data is not second.data


def test_a_recipe_cannot_be_changed() -> None:
    recipe = parse_recipe(TEXT)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3


def test_the_schema_names_every_stage() -> None:
    mapping = recipe_schema()["properties"]["stages"]["items"]["discriminator"]["mapping"]
    assert len(mapping) == 8


def test_several_problems_are_told_at_once() -> None:
    with pytest.raises(CompressError) as caught:
        parse_recipe(TEXT.replace("name: x", "nam: x"))
    assert "also, on line 1" in caught.value.why


def test_a_recipe_is_read_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="cannot be read"):
        load_recipe(tmp_path)
