"""The specification itself: the bit layout of compressed-tensors, dequantization, group sums."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor_kernels.reference import (
    dequant_gemm,
    dequantize,
    group_sums,
    pack_codes,
    pack_zero_point,
    read_checkpoint,
    unpack_codes,
    unpack_zero_point,
)

KNOWN_WORDS = [
    (4, list(range(8)), [0x76543210]),
    (4, list(range(8, 16)), [0xFEDCBA98]),
    (8, [0, 127, 128, 255], [0xFF807F00]),
    (2, [0, 1, 2, 3] * 4, [0xE4E4E4E4]),
    (3, [i % 8 for i in range(32)], [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
]


@pytest.mark.parametrize(("bits", "codes", "words"), KNOWN_WORDS)
def test_known_codes_give_the_known_words(bits, codes, words):
    row = torch.tensor([codes], dtype=torch.uint8)
    packed = pack_codes(row, bits)
    assert [value & 0xFFFFFFFF for value in packed[0].tolist()] == words
    assert torch.equal(unpack_codes(packed, bits, (1, len(codes))), row)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 100), st.integers(0, 2**31))
def test_unpacking_undoes_packing_at_any_width_and_shape(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator).to(torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, -(-columns * bits // 32))
    assert torch.equal(unpack_codes(packed, bits, (rows, columns)), codes)
    zeros = pack_zero_point(codes, bits)
    assert torch.equal(unpack_zero_point(zeros, bits, (rows, columns)), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_bit_layout_is_that_of_compressed_tensors(bits):
    pack_module = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    signed = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (6, 70)).to(torch.int8)
    theirs = pack_module.pack_to_int32(signed, bits)
    ours = pack_codes((signed.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8), bits)
    assert torch.equal(ours, theirs)


def test_dequantize_equals_a_loop_over_every_weight():
    codes = torch.randint(0, 16, (3, 70))
    scale, zero = torch.rand(3, 3), torch.randint(0, 16, (3, 3))
    weight = dequantize(codes, scale, zero, 32)
    for o in range(3):
        for i in range(70):
            expected = scale[o, i // 32] * (codes[o, i] - zero[o, i // 32])
            assert weight[o, i] == pytest.approx(float(expected))


def test_a_scale_of_the_wrong_shape_is_refused():
    tensors = {
        "weight_packed": pack_codes(torch.zeros(4, 64, dtype=torch.uint8), 4),
        "weight_scale": torch.ones(4, 3),
        "weight_shape": torch.tensor([4, 64]),
    }
    with pytest.raises(ValueError, match="weight_scale has shape"):
        read_checkpoint(tensors, 4, 32)


def test_packed_codes_of_the_wrong_width_are_refused():
    with pytest.raises(ValueError, match="need"):
        unpack_codes(torch.zeros(2, 5, dtype=torch.int32), 4, (2, 64))


def test_group_sums_pad_the_last_group_with_zeros():
    x = torch.arange(5.0).view(1, 5)
    assert group_sums(x, 2).tolist() == [[1.0], [5.0], [4.0]]
    assert group_sums(x, -1).tolist() == [[10.0]]


def test_the_reference_product_adds_the_bias():
    x, weight, bias = torch.randn(2, 8), torch.randn(3, 8), torch.randn(3)
    torch.testing.assert_close(
        dequant_gemm(x, weight, bias), torch.nn.functional.linear(x, weight, bias)
    )
