"""Scheme labels: what `W4A16` and its relatives stand for, and which engine reads which.

`W<bits>A16` stores the weights of a linear layer in `bits` bits and leaves activations at 16 bit;
`_ASYM` adds an integer zero point to each group, so that the grid follows the group's range. Group
size, bits and symmetry of these may be changed by keys of the recipe. The others are fixed by the
formats that hardware multiplies:

    W8A8         int8 weights, a scale each output channel; int8 activations, a scale each token
    W4A8         int4 weights, a scale each 128 inputs; activations as W8A8
    W4AFP8       the same with activations in 8-bit floats (e4m3)
    FP8_DYNAMIC  e4m3 weights and activations, otherwise as W8A8
    FP8A16       8-bit float weights, 16-bit activations
    FP8_BLOCK    8-bit float weights, a scale each 128 x 128 block; activations a scale each 128
    NVFP4        4-bit floats (e2m1), an 8-bit float scale each 16, one 32-bit scale each tensor
    MXFP4        4-bit floats, a power-of-two scale each 32 (OCP Microscaling 1.0)

`NVFP4A16` and `MXFP4A16` leave the activations alone. Candidates of a budget may have a group size
of their own, `W3A16@32` or `W3A16@channel`, and one of them may be `BF16`: "left as it is".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

KEEP: Final = "BF16"
GROUP_MARK: Final = "@"
CANDIDATE_GROUPS: Final = {"16": 16, "32": 32, "64": 64, "128": 128, "channel": -1}
SCALE_BITS: Final = 16
DEFAULT_GROUP_SIZE: Final = 128
BLOCK_EDGE: Final = 128

Number = Literal["int", "float"]
Activations = Literal["none", "int8", "fp8", "fp8_group", "nvfp4", "mxfp4"]


@dataclass(frozen=True, slots=True)
class Preset:
    """How a linear layer is stored and fed.

    Args:
        bits: of one weight.
        symmetric: without zero points.
        group_size: inputs that share a scale; -1 is one group a row.
        number: integers, or floats (e4m3 at 8 bits, e2m1 at 4 bits).
        activations: how inputs are rounded: int8/fp8 with a scale each token, fp8_group with a
            scale each 128 inputs, nvfp4/mxfp4 as the weights of that name.
        block: edge of the square blocks that share a scale, 0 = groups.
    """

    bits: int
    symmetric: bool
    group_size: int = DEFAULT_GROUP_SIZE
    number: Number = "int"
    activations: Activations = "none"
    block: int = 0

    @property
    def is_fixed(self) -> bool:
        """Whether bits, symmetry and group size belong to the format and cannot be chosen."""
        return self.number == "float" or self.activations != "none"

    @property
    def bits_per_weight(self) -> float:
        """Code, scale and zero point in bits a weight, for rows much longer than a group."""
        if self.block:
            return self.bits + SCALE_BITS / self.block**2
        if self.group_size == -1:
            return float(self.bits)
        if self.number == "float":
            return self.bits + 8 / self.group_size  # scales of one byte
        zero_point_bits = 0 if self.symmetric else self.bits
        return self.bits + (SCALE_BITS + zero_point_bits) / self.group_size


SCHEMES: Final[dict[str, Preset]] = {
    **{f"W{bits}A16": Preset(bits, True) for bits in range(2, 9)},
    **{f"W{bits}A16_ASYM": Preset(bits, False) for bits in range(2, 9)},
    "W8A8": Preset(8, True, -1, activations="int8"),
    "W4A8": Preset(4, True, activations="int8"),
    "W4AFP8": Preset(4, True, activations="fp8"),
    "FP8_DYNAMIC": Preset(8, True, -1, "float", "fp8"),
    "FP8A16": Preset(8, True, -1, "float"),
    "FP8_BLOCK": Preset(8, True, -1, "float", "fp8_group", BLOCK_EDGE),
    "NVFP4": Preset(4, True, 16, "float", "nvfp4"),
    "NVFP4A16": Preset(4, True, 16, "float"),
    "MXFP4": Preset(4, True, 32, "float", "mxfp4"),
    "MXFP4A16": Preset(4, True, 32, "float"),
}
FIXED: Final = tuple(label for label, preset in SCHEMES.items() if preset.is_fixed)


@dataclass(frozen=True, slots=True)
class Loader:
    """What one engine loads: widths of integer weights by symmetry, group sizes, fixed schemes."""

    symmetric: frozenset[int]
    asymmetric: frozenset[int]
    group_sizes: frozenset[int]
    fixed: frozenset[str]


_ALL_BITS = frozenset(range(2, 9))
_ALL_GROUPS = frozenset({16, 32, 64, 128, -1})
_KERNEL_GROUPS = frozenset({32, 64, 128, -1})

# The single table of engine legality, from the engines' sources in autumn 2026; `transformers` is
# checked by tests with the installed one (5.23): it misreads packed zero points.
LOADERS: Final[dict[str, Loader]] = {
    "ours": Loader(_ALL_BITS, _ALL_BITS, _ALL_GROUPS, frozenset(FIXED)),
    "transformers": Loader(_ALL_BITS, frozenset(), _ALL_GROUPS, frozenset(FIXED)),
    "vllm": Loader(
        _ALL_BITS,
        frozenset({4, 8}),
        _KERNEL_GROUPS,
        frozenset(FIXED) - {"MXFP4", "W4A8", "W4AFP8"},  # the last two: not looked at
    ),
    "sglang": Loader(
        frozenset({4, 8}),
        frozenset({4, 8}),
        _KERNEL_GROUPS,
        frozenset({"W8A8", "FP8_DYNAMIC", "FP8A16", "FP8_BLOCK", "NVFP4"}),
    ),
}


def loads(engine: str, preset: Preset) -> bool:
    """Whether an engine ("ours", "transformers", "vllm", "sglang") reads layers stored so."""
    loader = LOADERS[engine]
    if preset.is_fixed:
        return any(SCHEMES[label] == preset for label in loader.fixed)
    widths = loader.symmetric if preset.symmetric else loader.asymmetric
    return preset.bits in widths and preset.group_size in loader.group_sizes


def loads_embedding(engine: str, scheme: str) -> bool:
    """Whether an engine reads a quantized embedding; "none" is read by all.

    transformers (5.23) reads int8 ones and fails on packed ones; the others read none.
    """
    if scheme == "none" or engine == "ours":
        return True
    return engine == "transformers" and scheme == "W8A16"


def candidate_preset(label: str, group_size: int) -> Preset | None:
    """The storage a budget candidate stands for; None is "keep 16 bit".

    A label without a group of its own takes `group_size`. Raises KeyError for an unknown label.
    """
    if label == KEEP:
        return None
    scheme, marked, group = label.partition(GROUP_MARK)
    preset = SCHEMES[scheme]
    if not marked:
        return preset if preset.is_fixed else replace(preset, group_size=group_size)
    if preset.is_fixed:
        raise KeyError(label)
    return replace(preset, group_size=CANDIDATE_GROUPS[group])
