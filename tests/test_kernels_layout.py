"""Repacking loses nothing, and the bit tricks of the kernel are exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor_kernels import cpu
from compressor_kernels.layout import GROUP_SIZES, PlanarWeight, from_planar, to_planar
from compressor_kernels.planes import from_planes, plane_widths, to_planes
from compressor_kernels.reference import num_groups, pack_codes


def random_weight(rows, columns, group_size, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = num_groups(columns, group_size)
    codes = torch.randint(0, 16, (rows, columns), generator=generator).to(torch.uint8)
    scale = torch.rand(rows, groups, generator=generator).to(torch.bfloat16)
    zero = torch.randint(0, 16, (rows, groups), generator=generator).to(torch.uint8)
    return codes, scale, zero


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from(GROUP_SIZES),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_the_planar_layout_gives_back_what_it_was_given(rows, columns, group_size, sym, seed):
    codes, scale, zero = random_weight(rows, columns, group_size, seed)
    weight = to_planar(codes, scale, None if sym else zero, group_size)
    back_codes, back_scale, back_zero = from_planar(weight)
    assert torch.equal(back_codes, codes)
    assert torch.equal(back_scale, scale)
    assert back_zero is None if sym else torch.equal(back_zero, zero)


def test_nibble_p_of_word_j_is_column_32_p_plus_j():
    codes = torch.zeros(128, 256, dtype=torch.uint8)
    codes[5, 128 + 2 * 32 + 7] = 9
    weight = to_planar(codes, torch.ones(128, 2), None, 128)
    assert int(weight.words[0, 1, 5, 7]) == 9 << 8
    assert int(weight.words.count_nonzero()) == 1


def test_padding_adds_zero_scales_only():
    codes, scale, zero = random_weight(130, 172, 32, 0)
    weight = to_planar(codes, scale + 1, zero, 32)
    assert weight.scales.count_nonzero() == scale.numel()


def test_a_group_size_without_a_kernel_is_refused():
    codes, scale, _ = random_weight(128, 128, 128, 0)
    with pytest.raises(ValueError, match="group_size must be one of"):
        to_planar(codes, scale, None, 16)


def test_tensors_of_another_shape_are_refused():
    codes, scale, _ = random_weight(128, 128, 128, 0)
    weight = to_planar(codes, scale, None, 128)
    with pytest.raises(ValueError, match="needs int16"):
        PlanarWeight(weight.words, weight.scales, None, (128, 256), 128)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(1, 9), st.integers(1, 90), st.integers(0, 2**31))
def test_bit_planes_give_back_the_codes_in_as_many_bits(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator).to(torch.uint8)
    planes = to_planes(codes, bits)
    assert torch.equal(from_planes(planes, bits, slice(0, rows))[:, :columns], codes)
    padded = columns + -columns % 8
    assert sum(plane.numel() for plane in planes.values()) == rows * padded * bits // 8
    assert sum(plane_widths(bits)) == bits


@pytest.mark.parametrize("bits", [2, 4])
def test_byte_rows_hold_the_packed_stream_and_unpack_to_centred_codes(bits):
    if not cpu.unpacks_bytes(bits):
        pytest.skip("this torch build has no embedding unpack")
    codes = torch.randint(0, 1 << bits, (5, 36)).to(torch.uint8)
    rows = cpu.pack_byte_rows(codes, bits)
    assert rows.shape == (5, 36 * bits // 8 + 4)
    stream = pack_codes(codes, bits).view(torch.uint8)[:, : 36 * bits // 8]
    assert torch.equal(rows[:, :-4], stream)
    assert torch.equal(cpu.unpack_byte_rows(rows, bits), codes.float() - (1 << (bits - 1)))


@pytest.mark.parametrize(
    ("dtype", "magic", "offset"),
    [(torch.bfloat16, 0x4300, 128.0), (torch.float16, 0x6400, 1024.0)],
)
def test_a_nibble_or_magic_is_exactly_the_offset_plus_the_nibble(dtype, magic, offset):
    nibbles = torch.arange(16, dtype=torch.int16)
    assert torch.equal((nibbles | magic).view(dtype).float() - offset, nibbles.float())
