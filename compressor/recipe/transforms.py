"""The transform stage: other weights, the same function, easier to quantize."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from compressor.recipe.base import Part

PairKind = Literal["norm", "value", "mlp"]

# Keys that only some methods read; changing one for another method is refused.
_READERS: Final[dict[str, tuple[str, ...]]] = {
    "pairs": ("awq", "smoothquant"),
    "scales": ("awq", "smoothquant"),
    "alpha": ("smoothquant",),
    "grid_points": ("awq",),
    "bits": ("awq",),
    "group_size": ("awq",),
    "symmetric": ("awq",),
    "rotation": ("rotate",),
    "values": ("rotate",),
    "seed": ("rotate",),
}


class TransformConfig(Part):
    """Scale channels (awq, smoothquant) or rotate them, without changing what the model computes.

    `bits`, `group_size` and `symmetric` are those of the quantize stage that follows: awq searches
    the scales for that grid.
    """

    kind: Literal["transform"]
    method: Literal["awq", "smoothquant", "rotate"] = "awq"
    pairs: Annotated[list[PairKind], Field(min_length=1)] | None = Field(
        default=None,
        description="smoothquant: norm; awq: all three (mlp is up -> down)",
    )
    alpha: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.5, description="smoothquant: 0 leaves activations alone, 1 leaves weights alone"
    )
    grid_points: Annotated[int, Field(ge=2, le=100)] = Field(
        default=20, description="awq: exponents tried between 0 and 1"
    )
    scales: Literal["auto", "any", "power_of_two"] = Field(
        default="auto", description="auto: powers of two where the checkpoint has 16 bit or less"
    )
    bits: Annotated[int, Field(ge=2, le=8)] = 4
    group_size: Literal[32, 64, 128, -1] = 128
    symmetric: bool = True
    rotation: Literal["hadamard", "random"] = "hadamard"
    values: bool = Field(default=True, description="rotate: the value heads, too")
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None

    @model_validator(mode="after")
    def _only_keys_of_the_method(self) -> Self:
        for key, methods in _READERS.items():
            changed = getattr(self, key) != type(self).model_fields[key].default
            if changed and self.method not in methods:
                raise ValueError(f"{key} says nothing to method: {self.method}")
        return self

    @property
    def chosen_pairs(self) -> tuple[PairKind, ...]:
        """The kinds of pairs to scale."""
        if self.pairs is not None:
            return tuple(self.pairs)
        return ("norm",) if self.method == "smoothquant" else ("norm", "value", "mlp")
