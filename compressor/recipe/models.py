"""The recipe: a model, and the ordered stages that make a smaller one out of it.

Every key is checked: unknown keys, wrong types, out-of-range numbers and values outside a closed
set are refused. Defaults live here and nowhere else.
"""

# ruff: noqa: RUF012 (pydantic copies mutable defaults)
from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from compressor.recipe.base import Part
from compressor.recipe.data import DataConfig, EvaluationData
from compressor.recipe.distillation import DistillConfig
from compressor.recipe.gate import Gate
from compressor.recipe.pruning import PruneConfig
from compressor.recipe.quantization import QuantizeConfig
from compressor.recipe.transforms import TransformConfig
from compressor.recipe.types import PositiveInt, Size, Text

SCHEMA_VERSION = 1


class ModelConfig(Part):
    """Which model to start from."""

    path: Text = Field(description="folder, hub id, or `reference` for the embedded small model")
    revision: str | None = None
    trust_remote_code: bool = False
    allow_missing: list[str] = []


class CalibrateConfig(Part):
    """Fix the token rows on which later stages collect their statistics."""

    kind: Literal["calibrate"]
    data: DataConfig = Field(default_factory=DataConfig)


class PackConfig(Part):
    """Write the artifact: bit-packed weights in a Hugging Face folder."""

    kind: Literal["pack"]
    max_shard_size: Size = "5GB"
    kernels_archs: list[Annotated[str, Field(pattern=r"^sm_\d{2,3}a?$")]] = ["sm_90"]


class VerifyConfig(Part):
    """Reopen what was written and compare it bit for bit; `tokens` go through the model."""

    kind: Literal["verify"]
    tokens: PositiveInt = 64


class EvaluateConfig(Part):
    """Measure the saved artifact against the original on the same tokens; judge it by the gate."""

    kind: Literal["evaluate"]
    data: EvaluationData = Field(default_factory=EvaluationData)
    tasks: list[Text] = []
    task_limit: PositiveInt | None = None
    gate: Gate | None = None


StageConfig = (
    CalibrateConfig
    | TransformConfig
    | QuantizeConfig
    | PruneConfig
    | DistillConfig
    | PackConfig
    | VerifyConfig
    | EvaluateConfig
)

STAGE_CONFIGS: dict[str, type[Part]] = {
    "calibrate": CalibrateConfig,
    "transform": TransformConfig,
    "quantize": QuantizeConfig,
    "prune": PruneConfig,
    "distill": DistillConfig,
    "pack": PackConfig,
    "verify": VerifyConfig,
    "evaluate": EvaluateConfig,
}


class Recipe(Part):
    """Everything a run needs to know."""

    schema_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    model: ModelConfig
    output: Text
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    stages: Annotated[
        list[Annotated[StageConfig, Field(discriminator="kind")]], Field(min_length=1)
    ]
    samples: Annotated[int, Field(ge=0, le=100)] = 3

    def line_of(self, path: str) -> int | None:
        """Line of a dotted key such as `stages.1.bits`, or None if the file does not set it."""
        return self._lines.get(path)
