"""The prune stage: zeros, narrower layers, fewer blocks, fewer experts."""

# ruff: noqa: RUF012 (pydantic copies mutable defaults)
from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from compressor.recipe.base import Part
from compressor.recipe.quantization import Candidate, QuantizeConfig
from compressor.recipe.types import Fraction, KeptFraction, PositiveInt, Size, Text

Engine = Literal["transformers", "vllm", "sglang", "ours"]


class Width(Part):
    """How much of each layer's width stays: a fraction, or a count."""

    mlp: KeptFraction | PositiveInt | None = None
    kv_groups: KeptFraction | PositiveInt | None = None
    hidden: KeptFraction | PositiveInt | None = None
    experts: KeptFraction | PositiveInt | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        given = set(self.model_dump(exclude_none=True))
        if not given:
            raise ValueError("give mlp, kv_groups or both, or hidden, or experts")
        if len(given) > 1 and given & {"hidden", "experts"}:
            raise ValueError("hidden and experts each go in a prune stage of their own")
        return self


class PruneTarget(Part):
    """What the whole model may cost; blocks, widths and bits are chosen together to keep to it.

    The stage prunes; `candidates` are the formats that the quantize stage behind it may use.
    """

    params: PositiveInt | KeptFraction | None = Field(
        default=None, description="parameters: a count, or a fraction of the present ones"
    )
    size: Size | None = None
    decode_ms: Annotated[float, Field(gt=0.0)] | None = None
    device: Text | None = None
    max_dropped: Fraction = Field(default=0.5, description="of the blocks")
    mlp: list[KeptFraction] = [0.75, 0.5]
    kv_groups: list[KeptFraction] = []
    candidates: Annotated[list[Candidate], Field(min_length=1)] = ["W3A16", "W4A16", "W8A16"]
    group_size: Literal[16, 32, 64, 128, -1] | None = None
    engines: list[Engine] = ["ours", "transformers"]
    profile: Text = "auto"
    trials: Annotated[int, Field(ge=1, le=64)] = 3

    @model_validator(mode="after")
    def _limited(self) -> Self:
        if (self.params, self.size, self.decode_ms) == (None, None, None):
            raise ValueError("give at least one of params, size and decode_ms")
        if (self.decode_ms is None) != (self.device is None):
            raise ValueError("decode_ms and device belong together")
        return self

    @property
    def quantize(self) -> QuantizeConfig | None:
        """The quantize stage that could follow; None if only the parameters count."""
        if self.size is None and self.decode_ms is None:
            return None
        limits = {"size": self.size, "decode_ms": self.decode_ms, "device": self.device}
        budget = {"profile": self.profile, "trials": 0}
        budget |= {k: v for k, v in limits.items() if v is not None}
        stage = {"kind": "quantize", "candidates": self.candidates, "engines": self.engines}
        return QuantizeConfig.model_validate(
            {**stage, "group_size": self.group_size, "budget": budget}
        )


class PruneConfig(Part):
    """Take weights (sparsity, n:m pattern), channels (width) or blocks (depth) away."""

    kind: Literal["prune"]
    method: Literal["magnitude", "wanda", "ria", "sparsegpt", "alps"] = "alps"
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
    target: PruneTarget | None = Field(
        default=None, description="choose depth and width so that the model keeps to a budget"
    )
    ignore: list[Text] = ["lm_head"]

    @model_validator(mode="after")
    def _exactly_one_way(self) -> Self:
        ways = [self.sparsity, self.pattern, self.width, self.depth, self.target]
        if sum(way is not None for way in ways) != 1:
            raise ValueError("give exactly one of sparsity, pattern, width, depth and target")
        if self.allocation == "measured" and self.sparsity is None:
            raise ValueError("allocation: measured shares out a sparsity; give one")
        if self.ranking != "auto" and not isinstance(self.depth, int | float):
            raise ValueError("ranking belongs to depth as a fraction or a count")
        return self
