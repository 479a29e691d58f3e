"""Layer formats and bit packing: sizes, exact round trips, and the library's own reader."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from compressor.artifact.formats import GROUP_SIZES, SCALE_DTYPES, LayerFormat, fits
from compressor.artifact.packing import PackedWeight, dense_weight, pack_weight, unpack_weight
from compressor.artifact.schema import quantization_config

formats = st.builds(
    LayerFormat,
    bits=st.integers(2, 8),
    group_size=st.sampled_from(GROUP_SIZES),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(sorted(SCALE_DTYPES)),
)


def random_codes(fmt: LayerFormat, rows: int, columns: int, seed: int = 0) -> Any:
    """Codes, scales representable in the stored dtype, and zero points."""
    generator = torch.Generator().manual_seed(seed)
    groups, levels = fmt.num_groups(columns), 1 << fmt.bits
    codes = torch.randint(0, levels, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = torch.rand(rows, groups, generator=generator) + 0.1
    zero = torch.randint(0, levels, (rows, groups), generator=generator, dtype=torch.int32)
    if fmt.symmetric:
        zero = torch.full_like(zero, levels // 2)
    return codes, scale.to(SCALE_DTYPES[fmt.scale_dtype]).float(), zero


def columns_of(fmt: LayerFormat, groups: int, odd: int) -> int:
    return groups * fmt.group_size if fmt.group_size > 0 else odd


@settings(max_examples=80, deadline=None)
@given(fmt=formats, rows=st.integers(1, 70), groups=st.integers(1, 3), odd=st.integers(1, 200))
def test_sizes_are_those_of_the_tensors_and_packing_is_a_bijection(
    fmt: LayerFormat, rows: int, groups: int, odd: int
) -> None:
    columns = columns_of(fmt, groups, odd)
    meant = random_codes(fmt, rows, columns)
    packed = pack_weight(*meant, fmt)
    assert packed.shape == (rows, columns)
    assert packed.nbytes == fmt.packed_bytes((rows, columns))
    for got, want in zip(unpack_weight(packed), meant, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@settings(max_examples=30, deadline=None)
@given(fmt=formats, rows=st.integers(1, 40), groups=st.integers(1, 3), odd=st.integers(1, 200))
def test_compressed_tensors_reads_the_weight_we_mean(
    fmt: LayerFormat, rows: int, groups: int, odd: int
) -> None:
    # Their reader fails on zero points that fill one word in all (view of a one-row transpose).
    assume(fmt.symmetric or rows * fmt.bits > 32)
    columns = columns_of(fmt, groups, odd)
    packed = pack_weight(*random_codes(fmt, rows, columns), fmt)
    parsed = QuantizationConfig.model_validate(quantization_config({"x": fmt}, ["lm_head"]))
    scheme = parsed.config_groups["group_0"]
    theirs = PackedQuantizationCompressor.decompress(dict(packed.tensors), scheme)["weight"]
    ours = dense_weight(packed).to(theirs.dtype)
    assert theirs.dtype == SCALE_DTYPES[fmt.scale_dtype]
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize(
    ("bits", "signed", "words"),
    [
        (4, list(range(-8, 0)), [0x76543210]),
        (4, list(range(8)), [0xFEDCBA98]),
        (8, [-128, -1, 0, 127], [0xFF807F00]),
        (2, [-2, -1, 0, 1] * 4, [0xE4E4E4E4]),
        (3, [i % 8 - 4 for i in range(32)], [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
    ],
)
def test_known_words(bits: int, signed: list[int], words: list[int]) -> None:
    fmt = LayerFormat(bits, -1, True, "float32")
    codes = torch.tensor([signed]) + (1 << (bits - 1))
    zero = torch.full((1, 1), 1 << (bits - 1), dtype=torch.int32)
    packed = pack_weight(codes.to(torch.uint8), torch.ones(1, 1), zero, fmt)
    got = [w & 0xFFFFFFFF for w in packed.tensors["weight_packed"][0].tolist()]
    assert got == words


def test_zero_points_are_packed_along_the_outputs() -> None:
    fmt = LayerFormat(4, 32, False, "float16")
    codes, scale, zero = random_codes(fmt, 10, 96)
    packed = pack_weight(codes, scale, zero, fmt)
    stored = packed.tensors["weight_zero_point"]
    assert stored.shape == (2, 3)
    word = stored[0, 1].item() & 0xFFFFFFFF
    assert [word >> 4 * i & 15 for i in range(8)] == zero[:8, 1].tolist()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_dense_weight_is_scale_times_code_minus_zero(symmetric: bool) -> None:
    fmt = LayerFormat(3, 32, symmetric, "float32")
    codes, scale, zero = random_codes(fmt, 5, 64)
    dense = dense_weight(pack_weight(codes, scale, zero, fmt))
    for row in range(5):
        for column in (0, 31, 32, 63):
            group = column // 32
            step = float(codes[row, column]) - float(zero[row, group])
            assert dense[row, column] == torch.tensor(step) * scale[row, group]


def test_bits_per_weight_counts_scales_and_zero_points() -> None:
    fmt = LayerFormat(4, 128, False, "bfloat16")
    assert fmt.bits_per_weight((4096, 4096)) == pytest.approx(4 + (16 + 4) / 128, abs=1e-4)
    assert LayerFormat(4, -1, True, "float16").bits_per_weight((4096, 4096)) < 4.01


@given(fmt=formats)
def test_a_format_survives_its_json(fmt: LayerFormat) -> None:
    assert LayerFormat.from_json(fmt.as_json()) == fmt


def test_labels_are_those_people_write() -> None:
    assert LayerFormat(4, 128, True, "float16").label == "W4A16 g128"
    assert LayerFormat(2, 32, False, "float16").label == "W2A16_ASYM g32"
    assert LayerFormat(8, -1, True, "float16").label == "W8A16 channel"


def test_groups_must_divide_the_inputs() -> None:
    assert fits(LayerFormat(4, 32, True, "float16"), 96)
    assert not fits(LayerFormat(4, 64, True, "float16"), 96)
    assert fits(LayerFormat(4, -1, True, "float16"), 97)


def test_a_packed_weight_knows_its_bytes() -> None:
    tensors = {"weight_packed": torch.zeros(4, 2, dtype=torch.int32)}
    assert PackedWeight(tensors, LayerFormat(4, -1, True, "float32")).nbytes == 32
