"""The quantize stage: formats, methods, and what may be spent."""

# ruff: noqa: RUF012 (pydantic copies mutable defaults)
from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from compressor.recipe.base import Part
from compressor.recipe.budget import Budget
from compressor.recipe.presets import DEFAULT_GROUP_SIZE, KEEP, SCHEMES, Preset, candidate_preset
from compressor.recipe.types import Fraction, PositiveInt, Text

Scheme = Literal[
    "W2A16", "W3A16", "W4A16", "W5A16", "W6A16", "W7A16", "W8A16",
    "W2A16_ASYM", "W3A16_ASYM", "W4A16_ASYM", "W5A16_ASYM", "W6A16_ASYM", "W7A16_ASYM",
    "W8A16_ASYM", "W8A8", "W4A8", "W4AFP8", "FP8_DYNAMIC", "FP8A16", "FP8_BLOCK", "NVFP4",
    "NVFP4A16", "MXFP4", "MXFP4A16",
]  # fmt: skip


def _known_candidate(label: str) -> str:
    try:
        candidate_preset(label, DEFAULT_GROUP_SIZE)
    except KeyError:
        near = get_close_matches(label, [*SCHEMES, KEEP], n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(
            f"{label!r} is no candidate{hint} Known are {KEEP}, {', '.join(SCHEMES)}, and integer "
            "ones with a group size: W3A16@32, W3A16@channel"
        ) from None
    return label


Candidate = Annotated[str, AfterValidator(_known_candidate)]
OuterScheme = Literal["none", "W8A16", "W4A16"]


LEARNING_STEPS = {"high": 125, "max": 200}  # a fifth more: 14 % more time, 1-2 % less KL
FEW_BITS, MORE_STEPS = 2, 300  # for so few bits; twice as many: 16 % less KL


class Learning(Part):
    """Learned rounding (`effort: high` and `max`); rates are in steps of the grid."""

    steps: PositiveInt | None = Field(
        default=None, description="125 at high, 200 at max, 300 at 2 bits"
    )
    batch_size: PositiveInt = 3
    rate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.0175
    scale_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 0.005


class Recovery(Part):
    """Training of scales, norms and biases, or codes too, through the whole model (`max`)."""

    steps: PositiveInt = 200
    batch_size: PositiveInt = 8
    rate: Annotated[float, Field(gt=0.0, le=1.0)] = 2e-3
    train: Literal["scales_and_norms", "codes"] = "scales_and_norms"
    own_rows: Annotated[int, Field(ge=0)] = Field(
        default=512, description="rows that the model writes itself, beside the calibration rows"
    )


class QuantizeConfig(Part):
    """Store linear layers in few bits: one scheme for all, or a mixture within a budget."""

    kind: Literal["quantize"]
    scheme: Scheme = "W4A16"
    bits: Annotated[int, Field(ge=2, le=8)] | None = None
    group_size: Literal[16, 32, 64, 128, -1] | None = None
    symmetric: bool | None = None
    method: Literal["rtn", "gptq"] = "gptq"
    effort: Literal["fast", "default", "high", "max"] = Field(
        default="default",
        description="fast: no data; default: GPTQ; high: learned rounding; max: and recovery",
    )
    learning: Learning | None = None
    recovery: Recovery | None = None
    targets: list[Text] = ["linear"]
    ignore: list[Text] = ["lm_head"]
    protect: list[Text] = []
    protect_auto: Fraction = 0.0
    protect_shared_experts: bool = Field(
        default=True, description="leave experts that see every token as they are"
    )
    asymmetric_target: bool = True
    true_sequential: bool = True
    dampening: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01
    grid: Literal["minmax", "mse"] = "mse"
    indivisible: Literal["smaller_group", "error"] = Field(
        default="smaller_group", description="when group_size does not divide a layer's inputs"
    )
    scale_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    head: OuterScheme = Field(default="none", description="storage of the output head")
    embeddings: OuterScheme = Field(default="none", description="storage of the embedding")
    kv_cache: Literal["none", "fp8"] = Field(
        default="none", description="store calibrated scales for a cache of keys and values"
    )
    budget: Budget | None = None
    candidates: Annotated[list[Candidate], Field(min_length=1)] = [
        "W2A16", "W2A16@32", "W3A16", "W3A16@32", "W4A16", "W4A16@32", "W8A16", "BF16",
    ]  # fmt: skip
    scores: Literal["auto", "output_fisher", "swap_in_kl"] = "auto"
    engines: list[Literal["transformers", "vllm", "sglang", "ours"]] = ["ours", "transformers"]

    @model_validator(mode="after")
    def _effort_agrees(self) -> Self:
        learns = self.learns
        if learns and self.method == "rtn":
            raise ValueError("effort high and max learn from activations; leave method away")
        if self.learning is not None and not learns:
            raise ValueError("learning has an effect with effort high and max only")
        if self.recovery is not None and self.effort != "max":
            raise ValueError("recovery has an effect with effort max only")
        return self

    @property
    def is_data_free(self) -> bool:
        """Whether weights are rounded without looking at activations."""
        return self.method == "rtn" or self.effort == "fast"

    @property
    def learns(self) -> bool:
        """Whether rounding is learned from activations."""
        return self.effort in ("high", "max")

    @property
    def learning_settings(self) -> Learning:
        """`learning`, or its defaults."""
        return self.learning or Learning()

    @property
    def learning_steps(self) -> int:
        """Steps of learned rounding for each block; 0 below `high`."""
        default = LEARNING_STEPS.get(self.effort, 0)
        if default and self.preset.bits <= FEW_BITS:
            default = MORE_STEPS
        return self.learning_settings.steps or default

    @property
    def recovery_settings(self) -> Recovery:
        """`recovery`, or its defaults."""
        return self.recovery or Recovery()

    @property
    def labels(self) -> list[str]:
        """Every scheme that linears may get."""
        return list(self.candidates) if self.budget is not None else [self.scheme]

    @property
    def preset(self) -> Preset:
        """Bits, symmetry and group size after `bits`, `symmetric`, `group_size` had their say."""
        named = SCHEMES[self.scheme]
        if named.is_fixed:  # `order` refuses bits, symmetric and group_size beside it
            return named
        symmetric = named.symmetric if self.symmetric is None else self.symmetric
        return Preset(self.bits or named.bits, symmetric, self.group_size or DEFAULT_GROUP_SIZE)
