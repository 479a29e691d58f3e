"""How codes lie in 16-bit words, and how words become floating-point numbers.

A tile of a weight is `planes * PC` columns of 128 rows, stored as [W, 128, PC] int16 words: W words
hold one code of each plane. Column p*PC + j of a tile is plane p of word j, so unpacking is purely
elementwise, and two neighbouring words in one 32-bit register are unpacked at once:

    kind    bits  planes  W   place of plane p in the words
    int2      2      8    1   bits 2p
    int3      3     16    3   bits 3(p%5) of word p/5; plane 15 in bit 15 of the three words
    int4      4      4    1   bits 4p
    int8      8      2    1   bits 8p
    e4m3      8      2    1   bits 8p
    e2m1      4      4    1   sign and magnitude apart, so that three planes need no second shift

A number is made from a code by moving bits and one `or`: an integer field at mantissa bit t of the
float 2^(m-t) (m = 7 mantissa bits in bf16, 10 in fp16) is the exact number 2^(m-t) + n, whatever t
is. So up to three fields share a shift. int8 has more bits than bf16's mantissa: it becomes *two*
numbers, 128 + low nibble and 2048 + 16 * high nibble, each with a dot of its own. e4m3 and e2m1
keep sign, exponent and mantissa, and are too small by a power of two. `Number.multiply` and `.add`
give the centred value: q - 2^(bits-1) of integers, the level itself of floats; both are exact.

Letters: PC columns a plane (16, 32 or 64), N out features, K in features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

Kind = Literal["int2", "int3", "int4", "int8", "e4m3", "e2m1"]
Floats = Literal["bf16", "fp16"]
PARTS = 3  # most pieces a number is put together from


@dataclass(frozen=True, slots=True)
class Piece:
    """`width` bits of a code from bit `code` on, which lie at bit `bit` of word `word`."""

    word: int
    bit: int
    code: int
    width: int


@dataclass(frozen=True, slots=True)
class Part:
    """(word >> shift) & mask; a negative shift goes left. The mask is 16 bits."""

    word: int
    shift: int
    mask: int


@dataclass(frozen=True, slots=True)
class Number:
    """A 16-bit float: the parts or'ed onto `magic`; centred = number * multiply + add."""

    parts: tuple[Part, ...]
    magic: int
    multiply: float
    add: float


@dataclass(frozen=True, slots=True)
class WordLayout:
    """Where the codes of one kind lie."""

    bits: int
    words: int
    planes: tuple[tuple[Piece, ...], ...]

    @property
    def num_planes(self) -> int:
        """Codes in W words."""
        return len(self.planes)


def _plain(bits: int) -> WordLayout:
    count = 16 // bits
    return WordLayout(bits, 1, tuple((Piece(0, bits * p, 0, bits),) for p in range(count)))


_INT3 = WordLayout(
    3,
    3,
    (
        *((Piece(p // 5, 3 * (p % 5), 0, 3),) for p in range(15)),
        tuple(Piece(word, 15, word, 1) for word in range(3)),
    ),
)
_E2M1 = WordLayout(
    4,
    1,
    (
        (Piece(0, 6, 0, 3), Piece(0, 15, 3, 1)),
        (Piece(0, 3, 0, 3), Piece(0, 12, 3, 1)),
        (Piece(0, 0, 0, 3), Piece(0, 9, 3, 1)),
        (Piece(0, 10, 0, 2), Piece(0, 13, 2, 1), Piece(0, 14, 3, 1)),
    ),
)
LAYOUTS: dict[Kind, WordLayout] = {
    "int2": _plain(2),
    "int3": _INT3,
    "int4": _plain(4),
    "int8": _plain(8),
    "e4m3": _plain(8),
    "e2m1": _E2M1,
}
MANTISSA: dict[Floats, int] = {"bf16": 7, "fp16": 10}
BIAS: dict[Floats, int] = {"bf16": 127, "fp16": 15}
# A level of these kinds, its bits moved under the exponent of the wider float, is too small by 2^n.
TOO_SMALL: dict[tuple[str, Floats], int] = {
    ("e4m3", "bf16"): 120,
    ("e4m3", "fp16"): 8,
    ("e2m1", "bf16"): 126,
    ("e2m1", "fp16"): 14,
}
_MAGNITUDE = {"e4m3": (7, 3), "e2m1": (3, 1)}  # bits below the sign, mantissa bits among them


def columns_a_plane(kind: Kind, group_size: int) -> int:
    """PC: a plane never holds two groups, and a tile at least one group of up to 128 columns."""
    wide = 64 if LAYOUTS[kind].num_planes == 2 else 32
    return wide if group_size == -1 else min(wide, group_size)


@cache
def numbers(kind: Kind, floats: Floats) -> tuple[Number, ...]:
    """The floats that W words become, in the order of planes; int8 has two a plane in bf16."""
    layout = LAYOUTS[kind]
    if kind in ("e4m3", "e2m1"):
        return tuple(_level(kind, floats, pieces) for pieces in layout.planes)
    if layout.bits > MANTISSA[floats]:
        return tuple(
            number
            for plane in range(layout.num_planes)
            for number in (
                Number((Part(0, 8 * plane, 15),), 0x4300, 1.0, -128.0),
                Number((Part(0, 8 * plane + 4, 15),), 0x4500, 1.0, -2176.0),
            )
        )
    return tuple(_integer(layout.bits, floats, pieces) for pieces in layout.planes)


def _integer(bits: int, floats: Floats, pieces: tuple[Piece, ...]) -> Number:
    """2^(m-t) + n with the field at mantissa bit t, where a shift can be shared with others."""
    mantissa = MANTISSA[floats]
    together = mantissa // bits
    place = bits * ((pieces[0].bit // bits) % together) if len(pieces) == 1 else 0
    parts = tuple(
        Part(p.word, p.bit - place - p.code, ((1 << p.width) - 1) << (place + p.code))
        for p in pieces
    )
    exponent = mantissa - place
    magic = (BIAS[floats] + exponent) << mantissa
    return Number(parts, magic, 1.0, -float(2**exponent + 2 ** (bits - 1)))


def _level(kind: Kind, floats: Floats, pieces: tuple[Piece, ...]) -> Number:
    """Sign to bit 15, magnitude to the low end of the exponent."""
    magnitude, mantissa = _MAGNITUDE[kind]
    to = MANTISSA[floats] - mantissa
    parts = []
    for piece in pieces:
        below = min(piece.width, magnitude - piece.code)
        if below > 0:
            target = to + piece.code
            parts.append(Part(piece.word, piece.bit - target, ((1 << below) - 1) << target))
        if piece.code + piece.width > magnitude:
            sign = piece.bit + magnitude - piece.code
            parts.append(Part(piece.word, sign - 15, 0x8000))
    return Number(_merged(parts), 0, 2.0 ** TOO_SMALL[kind, floats], 0.0)


def _merged(parts: list[Part]) -> tuple[Part, ...]:
    """Parts of one shift become one."""
    masks: dict[tuple[int, int], int] = {}
    for part in parts:
        key = (part.word, part.shift)
        masks[key] = masks.get(key, 0) | part.mask
    return tuple(Part(word, shift, mask) for (word, shift), mask in masks.items())


# ------------------------------------------------------------------ for the kernels


def _twice(value: int) -> str:
    return f"0x{value & 0xFFFF:04X}{value & 0xFFFF:04X}"


def float_bits(value: float, floats: Floats) -> int:
    """The 16 bits of a number that the format holds exactly."""
    import torch

    dtype = torch.bfloat16 if floats == "bf16" else torch.float16
    made = torch.tensor(value, dtype=torch.float64).to(dtype)
    if float(made) != value:
        raise ValueError(f"{value} is not a {floats} number")
    return int(made.view(torch.int16)) & 0xFFFF


@cache
def assembly(kind: Kind, floats: Floats, *, centred: bool = True) -> str:
    """PTX that makes numbers $0.. from words; one `lop3` (and `fma`) for two weights."""
    made, words = numbers(kind, floats), LAYOUTS[kind].words
    # inputs are copied first: an output may share its register with an input
    lines = [f"mov.b32 w{index}, ${len(made) + index};" for index in range(words)]
    shifted = {(index, 0): f"w{index}" for index in range(words)}
    for index, number in enumerate(made):
        before = _twice(number.magic) if number.magic else ""
        for part in number.parts:
            source = _shifted(part, shifted, lines)
            if before:
                lines.append(f"lop3.b32 ${index}, {source}, {_twice(part.mask)}, {before}, 0xEA;")
            else:
                lines.append(f"and.b32 ${index}, {source}, {_twice(part.mask)};")
            before = f"${index}"
        if centred:
            lines += _centre(number, index, floats)
    constants = [f"{letter}{i}" for i in range(len(made)) for letter in "ma"]
    names = ", ".join([*shifted.values(), *constants])
    return f"{{ .reg .b32 {names}; {' '.join(lines)} }}"


def _shifted(part: Part, known: dict[tuple[int, int], str], out: list[str]) -> str:
    """Name of the register that holds the shifted word."""
    key = (part.word, part.shift)
    if key not in known:
        known[key] = f"t{len(known)}"
        op = "shr.u32" if part.shift > 0 else "shl.b32"
        out.append(f"{op} {known[key]}, w{part.word}, {abs(part.shift)};")
    return known[key]


def _centre(number: Number, index: int, floats: Floats) -> list[str]:
    """number * multiply + add for both halves of the register."""
    kind = "bf16x2" if floats == "bf16" else "f16x2"
    multiply = _twice(float_bits(number.multiply, floats))
    add = _twice(float_bits(number.add, floats) if number.add else 0x8000)
    return [
        f"mov.b32 m{index}, {multiply};",
        f"mov.b32 a{index}, {add};",
        f"fma.rn.{kind} ${index}, ${index}, m{index}, a{index};",
    ]


@cache
def constraints(kind: Kind, floats: Floats) -> str:
    """Operand constraints of `assembly`."""
    inputs = ",r" * LAYOUTS[kind].words
    return ",".join(["=r"] * len(numbers(kind, floats))) + inputs


@cache
def plan(kind: Kind, floats: Floats) -> tuple[float, ...]:
    """The same as flat numbers for kernels without inline assembly: for each number PARTS times
    word, shift, signed mask, then magic, multiply and add."""
    flat: list[float] = []
    for number in numbers(kind, floats):
        padded = (*number.parts, *(Part(0, 0, 0),) * (PARTS - len(number.parts)))
        for part in padded:
            flat += [part.word, part.shift, part.mask - (part.mask >> 15 << 16)]
        flat += [number.magic, number.multiply, number.add]
    return tuple(flat)
