"""The prune stage: zeros, narrower layers, fewer blocks, fewer experts."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from compressor.recipe.base import Part
from compressor.recipe.types import KeptFraction, PositiveInt, Text


class Width(Part):
    """How much of each layer's width stays: a fraction, or a count."""

    mlp: KeptFraction | PositiveInt | None = None
    kv_groups: KeptFraction | PositiveInt | None = None
    experts: KeptFraction | PositiveInt | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.experts is not None and (self.mlp, self.kv_groups) != (None, None):
            raise ValueError("experts go in a prune stage of their own")
        if not self.model_dump(exclude_none=True):
            raise ValueError("give mlp, kv_groups or both, or experts")
        return self


class PruneConfig(Part):
    """Take weights (sparsity, n:m pattern), channels (width) or blocks (depth) away."""

    kind: Literal["prune"]
    method: Literal["magnitude", "wanda", "ria", "sparsegpt"] = "sparsegpt"
    sparsity: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    allocation: Literal["uniform", "measured"] = Field(
        default="uniform", description="measured: more zeros where they harm less"
    )
    pattern: Literal["2:4", "4:8"] | None = None
    reconstruct: bool = True
    width: Width | None = None
    depth: KeptFraction | PositiveInt | Annotated[list[int], Field(min_length=1)] | None = Field(
        default=None, description="kept blocks: a fraction, a count, or their indices"
    )
    ranking: Literal["auto", "kl", "influence", "contiguous"] = Field(
        default="auto", description="which blocks go; auto: kl, or influence for large models"
    )
    ignore: list[Text] = ["lm_head"]  # noqa: RUF012 (pydantic copies mutable defaults)

    @model_validator(mode="after")
    def _exactly_one_way(self) -> Self:
        ways = [self.sparsity, self.pattern, self.width, self.depth]
        if sum(way is not None for way in ways) != 1:
            raise ValueError("give exactly one of sparsity, pattern, width and depth")
        if self.allocation == "measured" and self.sparsity is None:
            raise ValueError("allocation: measured shares out a sparsity; give one")
        if self.ranking != "auto" and not isinstance(self.depth, int | float):
            raise ValueError("ranking belongs to depth as a fraction or a count")
        return self
