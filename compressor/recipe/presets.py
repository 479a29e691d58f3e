"""Scheme labels: what `W4A16` and its relatives stand for.

`W<bits>A16` stores the weights of a linear layer in `bits` bits and leaves activations at 16 bit;
`_ASYM` adds an integer zero point to each group, so that the grid follows the group's range.
`BF16` means "left as it is" and is allowed only among the candidates of a budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

KEEP: Final = "BF16"
SCALE_BITS: Final = 16
DEFAULT_GROUP_SIZE: Final = 128


@dataclass(frozen=True, slots=True)
class Preset:
    """How the weights of a linear layer are stored; `group_size` -1 is one group a row."""

    bits: int
    symmetric: bool
    group_size: int = DEFAULT_GROUP_SIZE

    @property
    def bits_per_weight(self) -> float:
        """Code, scale and zero point in bits a weight, for rows much longer than a group."""
        if self.group_size == -1:
            return float(self.bits)
        zero_point_bits = 0 if self.symmetric else self.bits
        return self.bits + (SCALE_BITS + zero_point_bits) / self.group_size


SCHEMES: Final[dict[str, Preset]] = {
    "W2A16": Preset(2, True),
    "W2A16_ASYM": Preset(2, False),
    "W3A16": Preset(3, True),
    "W3A16_ASYM": Preset(3, False),
    "W4A16": Preset(4, True),
    "W4A16_ASYM": Preset(4, False),
    "W5A16": Preset(5, True),
    "W6A16": Preset(6, True),
    "W8A16": Preset(8, True),
    "W8A16_ASYM": Preset(8, False),
}


# Widths that the loaders of other engines read (symmetric, asymmetric), autumn 2026.
ENGINE_BITS: Final[dict[str, tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "vllm": ((2, 3, 4, 5, 6, 7, 8), (4, 8)),
    "sglang": ((4, 8), (4, 8)),
}


def candidate_preset(label: str, group_size: int) -> Preset | None:
    """The storage a budget candidate stands for; None is "keep 16 bit"."""
    if label == KEEP:
        return None
    preset = SCHEMES[label]
    return Preset(preset.bits, preset.symmetric, group_size)
