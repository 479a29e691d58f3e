"""Every bit trick of the unpacking is exact for every code: as PTX, as plain operations."""

import re

import pytest
import torch

from compressor_kernels.layout import pack_words
from compressor_kernels.reference import float_levels
from compressor_kernels.words import (
    LAYOUTS,
    PARTS,
    assembly,
    columns_a_plane,
    constraints,
    numbers,
    plan,
)

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [(kind, floats) for kind in LAYOUTS for floats in FLOATS]


def codes_and_words(kind):
    """Codes [64, K] with every code on every plane, and their words [W, 64 * PC]."""
    layout, pc = LAYOUTS[kind], columns_a_plane(kind, 64)
    columns = layout.num_planes * pc
    codes = 2 * torch.arange(128)[:, None] + torch.arange(columns)
    codes %= 1 << layout.bits
    codes = codes.to(torch.uint8)
    for plane in range(layout.num_planes):
        seen = codes[:, plane * pc : (plane + 1) * pc]
        assert len(seen.unique()) == 1 << layout.bits
    return codes, pack_words(codes, kind, 64)[0, 0].flatten(1), pc


def expected(kind, codes):
    """The centred value of each code."""
    if kind.startswith("int"):
        return codes.double() - (1 << (LAYOUTS[kind].bits - 1))
    return float_levels(LAYOUTS[kind].bits)[codes.int()].double()


def by_planes(kind, floats, values, pc):
    """Numbers [count, 128 * PC] added up by plane and put where the codes are: [128, K]."""
    planes = LAYOUTS[kind].num_planes
    return values.view(planes, -1, 128, pc).sum(1).permute(1, 0, 2).reshape(128, -1)


def run_ptx(kind, floats, words):
    """What the assembly leaves in its outputs: float64 [count, R], two words a register."""
    dtype, count = FLOATS[floats], len(numbers(kind, floats))
    made = registers(assembly(kind, floats), count, pairs_of(words), dtype)
    return halves(made, dtype).flatten(1)


def pairs_of(words):
    """int16 [W, R] -> registers int64 [W, R / 2]."""
    pairs = (words.int() & 0xFFFF).long().view(words.shape[0], -1, 2)
    return pairs[..., 0] | (pairs[..., 1] << 16)


def registers(text, count, inputs, dtype):
    """Outputs int64 [count, R] of a piece of PTX."""
    known = {f"${count + i}": value for i, value in enumerate(inputs)}
    for line in text.strip("{} ").split(";")[1:]:
        if line.strip():
            op, target, *operands = re.split(r"[ ,]+", line.strip())
            values = [known[o] if o in known else torch.tensor(int(o, 0)) for o in operands]
            known[target] = ptx_step(op, values, dtype)
    return torch.stack([known[f"${i}"] for i in range(count)])


def halves(registers, dtype):
    both = torch.stack([registers & 0xFFFF, registers >> 16], dim=-1)
    return both.to(torch.int32).to(torch.int16).view(dtype).double()


def ptx_step(op, values, dtype):
    if op == "mov.b32":
        return values[0]
    if op == "and.b32":
        return values[0] & values[1]
    if op == "prmt.b32":
        return byte_permute(*values)
    if op == "lop3.b32":
        assert int(values[3]) == 0xEA
        return (values[0] & values[1]) | values[2]
    if op.startswith("sh"):
        moved = values[0] >> values[1] if op == "shr.u32" else values[0] << values[1]
        return moved & 0xFFFFFFFF
    assert op == {torch.bfloat16: "fma.rn.bf16x2", torch.float16: "fma.rn.f16x2"}[dtype]
    a, b, c = (halves(v, dtype) for v in torch.broadcast_tensors(*values))
    exact = a * b + c
    rounded = exact.to(dtype)
    assert torch.equal(rounded.double(), exact)
    bits = rounded.view(torch.int16).long() & 0xFFFF
    return bits[..., 0] | (bits[..., 1] << 16)


def byte_permute(low, high, selector):
    """prmt: byte i is the byte that nibble i of the selector names (bit 3 must be clear)."""
    table = torch.stack([(v >> (8 * i)) & 0xFF for v in (low, high) for i in range(4)])
    result = torch.zeros_like(selector)
    for i in range(4):
        nibble = (selector >> (4 * i)) & 15
        assert int(nibble.max()) < 8
        result |= table[nibble] << (8 * i)
    return result


@pytest.mark.parametrize(("kind", "floats"), CASES)
def test_the_assembly_makes_the_exact_value_of_every_code_on_every_plane(kind, floats):
    codes, words, pc = codes_and_words(kind)
    values = by_planes(kind, floats, run_ptx(kind, floats, words), pc)
    nan = torch.isnan(expected(kind, codes))  # e4m3 has one; the loader refuses it
    assert torch.equal(values[~nan], expected(kind, codes)[~nan])


@pytest.mark.parametrize(("kind", "floats"), CASES)
def test_the_plain_plan_makes_the_same_values(kind, floats):
    codes, words, pc = codes_and_words(kind)
    flat = torch.tensor(plan(kind, floats), dtype=torch.float64).view(-1, 3 * PARTS + 3)
    values = []
    for row in flat:
        bits = torch.full_like(words[0], int(row[-3]), dtype=torch.int32)
        for word, shift, mask in row[:-3].int().view(-1, 3).tolist():
            source = words[word].int()
            bits |= (source >> shift if shift >= 0 else source << -shift) & mask
        number = bits.to(torch.int16).view(FLOATS[floats]).double()
        values.append(number * row[-2] + row[-1])
    values = by_planes(kind, floats, torch.stack(values), pc)
    nan = torch.isnan(expected(kind, codes))
    assert torch.equal(values[~nan], expected(kind, codes)[~nan])


@pytest.mark.parametrize(("kind", "floats"), CASES)
def test_inputs_are_read_before_any_output_is_written(kind, floats):
    made, words = len(numbers(kind, floats)), LAYOUTS[kind].words
    lines = assembly(kind, floats).split(";")
    inputs = [i for i, line in enumerate(lines) for n in range(words) if f"${made + n}" in line]
    outputs = [i for i, line in enumerate(lines) if re.search(r"(lop3|and).b32 \$", line)]
    assert max(inputs) < min(outputs)
    assert constraints(kind, floats).count("=r") == made


def test_three_bits_take_three_bits():
    layout = LAYOUTS["int3"]
    used = [(p.word, p.bit + i) for pieces in layout.planes for p in pieces for i in range(p.width)]
    assert sorted(used) == [(word, bit) for word in range(3) for bit in range(16)]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_weights_for_eight_bit_inputs_come_back_from_their_words(dtype, is_symmetric):
    from compressor_kernels.reference import dequantize
    from compressor_kernels.w4a8 import to_bytes

    codes, scale = torch.randint(0, 16, (130, 300)).to(torch.uint8), torch.rand(130, 5)
    zero = None if is_symmetric else torch.randint(0, 16, (130, 5)).to(torch.uint8)
    weight = to_bytes(codes, scale, zero, group_size=64, dtype=dtype)
    assert torch.equal(weight.codes(), codes)
    expected = dequantize(codes, scale, 8.0 if zero is None else zero, 64)
    assert torch.equal(weight.dense(), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_the_eight_bit_unpacking_is_exact_for_every_code_on_every_plane(dtype):
    from compressor_kernels.w4a8 import E4M3_ASM, INT8_ASM, to_bytes

    codes = (torch.arange(128)[:, None] + torch.arange(128)).remainder(16).to(torch.uint8)
    weight = to_bytes(codes, torch.ones(128, 1), None, group_size=-1, dtype=dtype)
    pairs = pairs_of(weight.words.view(1, -1)).view(-1, 2).t()
    text = INT8_ASM if dtype == torch.int8 else E4M3_ASM
    made = registers(text, 4, pairs, torch.bfloat16) & 0xFFFFFFFF
    lanes = torch.stack([(made >> (8 * i)) & 0xFF for i in range(4)], dim=-1)  # [4, R, 4]
    values = lanes.view(4, 128, 8, 4).permute(1, 0, 2, 3).reshape(128, 128).to(torch.uint8)
    if dtype == torch.int8:
        assert torch.equal(values, codes)
    else:
        assert torch.equal(values.view(dtype).float(), 2 * codes.float() - 15)
