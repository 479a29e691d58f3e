"""The `quantization_config`: what we write is read back, also by compressed-tensors itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.artifact.formats import LayerFormat
from compressor.artifact.schema import quantization_config, read_formats
from compressor.errors import CheckpointError, UnsupportedError

W4 = LayerFormat(4, 32, True, "float16")
W8 = LayerFormat(8, -1, False, "float16")
NAMES = [f"model.layers.{i}.mlp.{n}_proj" for i in range(12) for n in ("up", "down")]
formats = st.builds(
    LayerFormat,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([32, 64, 128, -1]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)


def read(config: dict[str, Any], *names: str) -> dict[str, LayerFormat]:
    return read_formats(config, dict.fromkeys(names, "float16"), file="config.json")


@settings(deadline=None)
@given(chosen=st.dictionaries(st.sampled_from(NAMES), formats, min_size=1))
def test_reading_gives_what_was_written(chosen: dict[str, LayerFormat]) -> None:
    config = quantization_config(chosen, ["lm_head"])
    scales = {name: fmt.scale_dtype for name, fmt in chosen.items()}
    assert read_formats(config, scales, file="config.json") == chosen


@settings(max_examples=20, deadline=None)
@given(chosen=st.dictionaries(st.sampled_from(NAMES), formats, min_size=1))
def test_compressed_tensors_accepts_every_config(chosen: dict[str, LayerFormat]) -> None:
    parsed = QuantizationConfig.model_validate(quantization_config(chosen, ["lm_head"]))
    assert parsed.format == "pack-quantized"
    assert parsed.quantization_status == "compressed"
    assert {g.weights.num_bits for g in parsed.config_groups.values()} == {
        fmt.bits for fmt in chosen.values()
    }


def test_one_format_is_written_for_the_class_and_dense_linears_are_ignored() -> None:
    config = quantization_config({NAMES[0]: W4, NAMES[1]: W4}, [NAMES[2], "lm_head"])
    assert [g["targets"] for g in config["config_groups"].values()] == [["Linear"]]
    assert config["ignore"] == [NAMES[2], "lm_head"]


def test_a_mixture_names_every_linear_exactly_once() -> None:
    chosen = {name: (W4 if "layers.1" in name else W8) for name in NAMES}
    config = quantization_config(chosen, ["lm_head"])
    targets = [t for g in config["config_groups"].values() for t in g["targets"]]
    assert sorted(targets) == sorted(NAMES)
    assert not any(t.startswith("re:") or t == "Linear" for t in targets)


def test_formats_that_differ_only_in_scales_share_a_group() -> None:
    other = LayerFormat(4, 32, True, "float32")
    config = quantization_config({NAMES[0]: W4, NAMES[1]: other}, ["lm_head"])
    assert len(config["config_groups"]) == 1


def test_nothing_is_written_that_breaks_loaders() -> None:
    text = str(quantization_config({NAMES[0]: W4, NAMES[1]: W8}, ["lm_head"]))
    for word in ("sparsity_config", "g_idx", "actorder"):
        assert word not in text


def test_precedence_is_exact_name_then_regex_then_class() -> None:
    groups = {
        "a": {"targets": ["Linear"], "weights": _weights(2)},
        "b": {"targets": [r"re:^model\.layers\.1\.mlp\..*$"], "weights": _weights(3)},
        "c": {"targets": ["model.layers.1.mlp.up_proj"], "weights": _weights(4)},
    }
    got = read(
        _config(groups),
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.10.mlp.up_proj",
    )
    assert [fmt.bits for fmt in got.values()] == [4, 3, 2]


def test_a_regex_is_open_at_its_end_like_theirs() -> None:
    config = _config({"a": {"targets": ["re:model.layers.1"], "weights": _weights(4)}})
    assert read(config, "model.layers.10.mlp.up_proj")["model.layers.10.mlp.up_proj"].bits == 4


def test_a_packed_linear_without_a_group_is_an_error() -> None:
    config = quantization_config({NAMES[0]: W4, NAMES[1]: W8}, ["lm_head"])
    with pytest.raises(CheckpointError, match=r"no config group covers model\.other") as caught:
        read(config, "model.other")
    assert caught.value.code == "CK21"


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "gptq"},
        {"quant_method": None},
        {"format": "float-quantized"},
        {"format": None},
    ],
)
def test_other_methods_are_refused(change: dict[str, Any]) -> None:
    config = quantization_config({NAMES[0]: W4}, ["lm_head"]) | change
    with pytest.raises(UnsupportedError) as caught:
        read(config, NAMES[0])
    assert caught.value.code == "CK34"


@pytest.mark.parametrize(
    "change",
    [
        {"num_bits": 1},
        {"num_bits": 9},
        {"num_bits": None},
        {"num_bits": 4.0},
        {"num_bits": True},
        {"num_bits": [4]},
        {"type": "float"},
        {"strategy": "tensor"},
        {"actorder": "group"},
        {"group_size": None},
        {"group_size": 0},
        {"group_size": "many"},
    ],
)
def test_other_weights_are_refused(change: dict[str, Any]) -> None:
    group = {"targets": ["Linear"], "weights": _weights(4) | change}
    with pytest.raises(UnsupportedError) as caught:
        read(_config({"a": group}), "x")
    assert caught.value.code == "CK34"


@pytest.mark.parametrize("groups", [None, {}, [], {"a": None}, {"a": {"targets": ["Linear"]}}])
def test_damaged_groups_are_an_error_not_a_traceback(groups: Any) -> None:
    with pytest.raises((CheckpointError, UnsupportedError)):
        read(_config(groups), "x")


def _config(groups: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
    }


def _weights(bits: int) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
    }


def test_scale_dtypes_come_from_the_stored_tensors() -> None:
    config = quantization_config({NAMES[0]: W4}, ["lm_head"])
    found = read_formats(config, {NAMES[0]: "bfloat16"}, file="config.json")
    assert found[NAMES[0]].scale_dtype == "bfloat16"
    assert torch.bfloat16.itemsize == 2
