"""Repacking loses nothing, and the bit tricks of the kernel are exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor_kernels import cpu
from compressor_kernels.layout import (
    GROUP_SIZES,
    PlanarWeight,
    e5m3,
    from_planar,
    interleave_gate_up,
    planar_float,
    to_planar,
)
from compressor_kernels.planes import from_planes, plane_widths, to_planes
from compressor_kernels.reference import num_groups, pack_codes
from compressor_kernels.words import LAYOUTS


def random_weight(rows, columns, group_size, seed, bits=4):
    generator = torch.Generator().manual_seed(seed)
    groups = num_groups(columns, group_size)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator).to(torch.uint8)
    scale = torch.rand(rows, groups, generator=generator).to(torch.bfloat16)
    zero = torch.randint(0, 1 << bits, (rows, groups), generator=generator).to(torch.uint8)
    return codes, scale, zero


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 600),
    st.sampled_from(GROUP_SIZES),
    st.booleans(),
    st.sampled_from(sorted(LAYOUTS)),
    st.integers(0, 2**31),
)
def test_the_planar_layout_gives_back_what_it_was_given(rows, columns, group_size, sym, kind, seed):
    codes, scale, zero = random_weight(rows, columns, group_size, seed, LAYOUTS[kind].bits)
    weight = to_planar(codes, scale, None if sym else zero, group_size, kind)
    back_codes, back_scale, back_zero = from_planar(weight)
    assert torch.equal(back_codes, codes)
    assert torch.equal(back_scale, scale)
    assert back_zero is None if sym else torch.equal(back_zero, zero)
    assert weight.words.nbytes * 8 == weight.words[:, :, 0].numel() * 16 * LAYOUTS[kind].words


@pytest.mark.parametrize("group_size", [16, 32])
def test_four_scales_of_a_byte_share_a_word(group_size):
    codes = torch.randint(0, 16, (130, 300)).to(torch.uint8)
    scale = torch.randint(0, 255, (130, num_groups(300, group_size))).to(torch.uint8)
    weight = to_planar(codes, scale, None, group_size, "e2m1")
    assert weight.scales.dtype == torch.int32
    assert torch.equal(from_planar(weight)[1], scale)


def test_every_positive_e4m3_scale_has_a_byte_without_subnormals():
    scale = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    code = e5m3(scale).int()
    value = torch.exp2((code >> 3).double() - 16) * (1 + (code & 7).double() / 8)
    assert torch.equal(value[1:], scale.double()[1:])
    assert code[0] == 0


def test_a_scale_below_zero_is_refused():
    with pytest.raises(ValueError, match="zero or more"):
        e5m3(torch.tensor([-1.0]).to(torch.float8_e4m3fn))


def test_a_group_whose_scale_is_zero_has_only_zero_codes():
    tensors = {
        "weight_packed": torch.full((8, 16), 0x77, dtype=torch.uint8),
        "weight_scale": torch.tensor([[0.0, 1.0]] * 8).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([2.0]),
    }
    weight = planar_float(tensors, stored="nvfp4-pack-quantized", group_size=16)
    codes = from_planar(weight)[0]
    assert int(codes[:, :16].max()) == 0
    assert int(codes[:, 16:].min()) == 7
    assert float(weight.factor) == 0.5


def test_a_weight_that_is_not_a_number_is_refused():
    nan = torch.full((2, 16), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    tensors = {"weight": nan, "weight_scale": torch.ones(2, 1)}
    with pytest.raises(ValueError, match="NaN"):
        planar_float(tensors, stored="float-quantized", group_size=-1)


def test_gate_and_up_take_turns_of_64_rows():
    gate, up = torch.arange(128), torch.arange(128) + 1000
    both = interleave_gate_up(gate, up)
    assert both[63] == 63
    assert both[64] == 1000
    assert both[128] == 64
    with pytest.raises(ValueError, match="64 rows"):
        interleave_gate_up(gate[:70], up[:70])


def test_nibble_p_of_word_j_is_column_32_p_plus_j():
    codes = torch.zeros(128, 256, dtype=torch.uint8)
    codes[5, 128 + 2 * 32 + 7] = 9
    weight = to_planar(codes, torch.ones(128, 2), None, 128)
    assert int(weight.words[0, 1, 0, 5, 7]) == 9 << 8
    assert int(weight.words.count_nonzero()) == 1


def test_padding_adds_zero_scales_only():
    codes, scale, zero = random_weight(130, 172, 32, 0)
    weight = to_planar(codes, scale + 1, zero, 32)
    assert weight.scales.count_nonzero() == scale.numel()


def test_a_group_size_without_a_kernel_is_refused():
    codes, scale, _ = random_weight(128, 128, 128, 0)
    with pytest.raises(ValueError, match="group_size must be one of"):
        to_planar(codes, scale, None, 48)


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
