"""Floats and int8: grids, storage, and the library's own decompression of every format."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

from compressor.algorithms.float_grid import (
    FloatGrid,
    fp8_grid,
    level_codes,
    mxfp4_grid,
    nvfp4_grid,
    round_to_level,
)
from compressor.algorithms.gptq import gptq
from compressor.algorithms.grid import dequantize, quantize
from compressor.artifact.formats import STORED_SCALES, LayerFormat, fits
from compressor.artifact.packing import PackedWeight, dense_weight, pack_weight, unpack_weight
from compressor.artifact.schema import quantization_config, read_formats
from compressor.errors import RecipeError
from compressor.recipe.presets import FIXED, SCHEMES
from compressor.stages.grids import make_grid
from compressor_kernels.reference import float_levels, pack_nibbles, unpack_nibbles

FLOATS = tuple(label for label in FIXED if SCHEMES[label].number == "float")
WIDE = [(1, 128), (130, 256), (257, 128)]
SHAPES = {"FP8_BLOCK": WIDE, "W4A8": WIDE, "W4AFP8": WIDE}
ODD = [(1, 32), (3, 96), (70, 160)]


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    w[:, :: max(1, columns // 3)] *= 6  # heavy tails
    return w * torch.exp(torch.randn(rows, 1, generator=generator))


def stored(w: Tensor, fmt: LayerFormat, kind: str = "mse") -> PackedWeight:
    grid = make_grid(w, fmt, kind)
    scalars = {"input_global_scale": torch.tensor([64.0])}
    if isinstance(grid, FloatGrid) and grid.global_scale is not None:
        scalars["weight_global_scale"] = grid.global_scale
    codes = quantize(w, grid)
    return pack_weight(codes, grid.scale, grid.zero_point, fmt, global_scales=scalars)


def formats(dtype: str = "bfloat16") -> list[LayerFormat]:
    return [LayerFormat.of(SCHEMES[label], dtype) for label in FIXED]  # type: ignore[arg-type]


CASES = [
    pytest.param(fmt, rows, columns, id=f"{fmt.label}-{fmt.scale_dtype}-{rows}x{columns}")
    for dtype in ("bfloat16", "float32")
    for fmt in formats(dtype)
    for rows, columns in SHAPES.get(fmt.label, ODD)
]


@pytest.mark.parametrize(("fmt", "rows", "columns"), CASES)
def test_the_library_decompresses_what_we_mean(fmt: LayerFormat, rows: int, columns: int) -> None:
    packed = stored(weights(rows, columns), fmt)
    config = QuantizationConfig.model_validate(quantization_config({"x": fmt}, ["lm_head"]))
    scheme = config.config_groups["group_0"]
    reader = BaseCompressor.get_value_from_registry(scheme.format)
    theirs = reader.decompress(dict(packed.tensors), scheme)["weight"]
    ours = dense_weight(packed)
    if fmt.number == "float" and fmt.bits == 4:  # read as bf16, in which our products are exact
        assert theirs.dtype == torch.bfloat16
        assert torch.equal(ours.bfloat16().float(), ours)
    assert torch.equal(theirs, ours.to(theirs.dtype))


@pytest.mark.parametrize(("fmt", "rows", "columns"), CASES)
def test_bytes_are_exact_and_packing_is_a_bijection(
    fmt: LayerFormat, rows: int, columns: int
) -> None:
    packed = stored(weights(rows, columns), fmt)
    assert packed.shape == (rows, columns)
    assert packed.nbytes == fmt.packed_bytes((rows, columns))
    again = pack_weight(*unpack_weight(packed), fmt, global_scales=packed.global_scales)
    assert again.tensors.keys() == packed.tensors.keys()
    for name, tensor in again.tensors.items():
        assert tensor.dtype == packed.tensors[name].dtype
        assert torch.equal(tensor.view(torch.uint8), packed.tensors[name].view(torch.uint8))


@pytest.mark.parametrize("fmt", formats(), ids=FIXED)
def test_a_searched_scale_is_never_worse_than_the_largest_value_s(fmt: LayerFormat) -> None:
    w = weights(130, 256)
    searched = (dense_weight(stored(w, fmt)) - w).square().sum()
    plain = (dense_weight(stored(w, fmt, "minmax")) - w).square().sum()
    assert searched <= plain


@pytest.mark.parametrize("fmt", formats(), ids=FIXED)
def test_gptq_beats_rounding_to_nearest_in_every_format(fmt: LayerFormat) -> None:
    w = weights(64, 256)
    x = torch.randn(1024, 256) @ torch.randn(256, 256)
    hessian = x.T @ x / len(x)
    grid = make_grid(w, fmt, "mse")
    nearest = dequantize(quantize(w, grid), grid) - w
    result = gptq(w, hessian, grid=grid)
    assert result.error < float((nearest @ hessian * nearest).sum())
    assert torch.equal(quantize(dequantize(result.codes, grid), grid), result.codes)


@pytest.mark.parametrize("fmt", formats(), ids=FIXED)
def test_pruned_weights_stay_zero(fmt: LayerFormat) -> None:
    w = weights(16, 128)
    mask = torch.rand(16, 128) > 0.5
    grid = make_grid(w * mask, fmt, "mse")
    dense = dequantize(gptq(w, torch.eye(128), grid=grid, mask=mask).codes, grid)
    assert not dense[~mask].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_finds_the_nearest_level_of_a_slow_search(bits: int) -> None:
    x = torch.cat([torch.linspace(-500, 500, 999), torch.linspace(-7, 7, 561)])
    levels = float_levels(bits).nan_to_num(0.0)
    distance = (x[:, None] - levels[None]).abs()
    got = round_to_level(x, bits)
    assert torch.equal((x - got).abs(), distance.min(1).values)
    assert torch.equal(float_levels(bits)[level_codes(got, bits).int()], got)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_grid_reads_its_codes_like_the_reference(bits: int) -> None:
    codes = torch.arange(1 << bits, dtype=torch.uint8)[None]
    grid = FloatGrid(torch.ones(1, 1), bits, -1)
    assert torch.equal(
        grid.levels(codes, grid.zero_point).nan_to_num(9), float_levels(bits)[None].nan_to_num(9)
    )


def test_e4m3_levels_are_those_of_torch() -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(float_levels(8).nan_to_num(9), theirs.nan_to_num(9))


def test_nibbles_are_a_bijection_with_the_low_one_first() -> None:
    codes = torch.randint(0, 16, (5, 32), dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed[0, 0] == codes[0, 0] + 16 * codes[0, 1]
    assert torch.equal(unpack_nibbles(packed), codes)


def test_zeros_are_stored_as_zeros_in_every_format() -> None:
    for fmt in formats():
        assert not dense_weight(stored(torch.zeros(4, 128), fmt)).any()


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
def test_tiny_and_huge_weights_keep_their_relative_error(scale: float) -> None:
    w = torch.randn(8, 128) * scale
    for grid in (fp8_grid(w, kind="mse"), nvfp4_grid(w, kind="mse"), mxfp4_grid(w, kind="mse")):
        error = (dequantize(quantize(w, grid), grid) - w).norm() / w.norm()
        assert error < 0.15


def test_the_global_scale_is_a_power_of_two_and_shared_on_request() -> None:
    w = weights(16, 64)
    alone, shared = nvfp4_grid(w, kind="mse"), nvfp4_grid(w, kind="mse", largest=1e4)
    for grid in (alone, shared):
        assert grid.global_scale is not None
        assert torch.frexp(grid.global_scale).mantissa == 0.5
    assert not torch.equal(alone.global_scale, shared.global_scale)  # type: ignore[arg-type]


@pytest.mark.parametrize("label", FIXED)
def test_groups_that_do_not_divide_are_refused(label: str) -> None:
    fmt = LayerFormat.of(SCHEMES[label], "float32")
    columns = 130
    assert fits(fmt, columns) == (fmt.group_size == -1 and not fmt.block)
    if not fits(fmt, columns):
        with pytest.raises(RecipeError) as caught:
            make_grid(torch.ones(4, columns), fmt, "mse")
        assert caught.value.code == "CK29"


@pytest.mark.parametrize("label", FIXED)
def test_labels_schema_and_json_agree(label: str) -> None:
    fmt = LayerFormat.of(SCHEMES[label], "bfloat16")
    assert fmt.label == label
    assert LayerFormat.from_json(fmt.as_json()) == fmt
    assert fmt.scale_dtype in STORED_SCALES
    config = quantization_config({"x": fmt}, ["lm_head"])
    assert read_formats(config, {"x": "bfloat16"}, file="config.json") == {"x": fmt}
    assert config["format"] == fmt.stored


def test_several_ways_of_storing_are_called_mixed() -> None:
    chosen = {f"l.{i}": fmt for i, fmt in enumerate(formats())}
    config = quantization_config(chosen, ["lm_head"])
    assert config["format"] == "mixed-precision"
    parsed = QuantizationConfig.model_validate(config)
    assert {str(g.format) for g in parsed.config_groups.values()} == {
        fmt.stored for fmt in chosen.values()
    }
    assert read_formats(config, dict.fromkeys(chosen, "bfloat16"), file="config.json") == chosen


def test_old_manifests_are_read_and_written_as_before() -> None:
    old = {"bits": 4, "group_size": 32, "symmetric": True, "scale_dtype": "float16"}
    assert LayerFormat.from_json(old).as_json() == old


@pytest.mark.parametrize("change", [
    {"strategy": "tensor"}, {"input_activations": {"num_bits": 8, "type": "float"}},
    {"num_bits": 6}, {"block_structure": [128, 64]}, {"group_size": 64, "strategy": "group"},
])  # fmt: skip
def test_other_floats_are_refused(change: dict[str, object]) -> None:
    config = quantization_config({"x": LayerFormat.of(SCHEMES["FP8_BLOCK"], "float32")}, [])
    group = config["config_groups"]["group_0"]
    for key, value in change.items():
        (group if key == "input_activations" else group["weights"])[key] = value
    with pytest.raises(Exception, match="not supported"):
        read_formats(config, {"x": "float32"}, file="config.json")
