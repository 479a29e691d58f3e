"""The recipe: a model, and the ordered stages that make a smaller one out of it.

Every key is checked: unknown keys, wrong types, out-of-range numbers and values outside a closed
set are refused. Defaults live here and nowhere else.
"""

# ruff: noqa: RUF012 (pydantic copies mutable defaults)
from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from compressor.recipe.base import Part
from compressor.recipe.presets import DEFAULT_GROUP_SIZE, SCHEMES, Preset

SCHEMA_VERSION = 1

Scheme = Literal[
    "W2A16", "W2A16_ASYM", "W3A16", "W3A16_ASYM", "W4A16", "W4A16_ASYM",
    "W5A16", "W6A16", "W8A16", "W8A16_ASYM",
]  # fmt: skip
Candidate = Literal[
    "W2A16", "W2A16_ASYM", "W3A16", "W3A16_ASYM", "W4A16", "W4A16_ASYM",
    "W5A16", "W6A16", "W8A16", "W8A16_ASYM", "BF16",
]  # fmt: skip
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
KeptFraction = Annotated[float, Field(gt=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_size(text: str) -> int:
    """Bytes of a size such as "6GiB" or "500 MB"; raises ValueError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{text!r} is not a size; write a number and a unit, for example 6GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def _checked_size(text: str) -> str:
    parse_size(text)
    return text


Size = Annotated[str, AfterValidator(_checked_size)]


class ModelConfig(Part):
    """Which model to start from."""

    path: Text = Field(description="folder, hub id, or `reference` for the embedded small model")
    revision: str | None = None
    trust_remote_code: bool = False
    allow_missing: list[str] = []


class DataConfig(Part):
    """Where token rows come from; `seed` None means the recipe's seed."""

    source: Text = Field(
        default="reference",
        description="`reference`, a .txt/.jsonl/.json/.parquet file, or a name for `datasets`",
    )
    split: str | None = None
    text_column: Text = "text"
    num_samples: PositiveInt = 128
    seq_len: Annotated[int, Field(ge=2)] = 256
    skip_bad_rows: Annotated[int, Field(ge=0)] = 0
    min_fraction: Fraction = 0.25
    packing: Literal["rows", "packed"] = "rows"
    seed: int | None = None


class EvaluationData(DataConfig):
    """Like `DataConfig`, but the embedded text defaults to the rows that calibration never sees."""

    @model_validator(mode="before")
    @classmethod
    def _held_out(cls, data: Any) -> Any:
        is_reference = isinstance(data, dict) and data.get("source", "reference") == "reference"
        return {"split": "evaluation", **data} if is_reference else data


class Budget(Part):
    """How large the packed linears may become: average bits a weight, or bytes of all files."""

    average_bits: Annotated[float, Field(ge=1.0, le=16.0)] | None = None
    size: Size | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.average_bits is None) == (self.size is None):
            raise ValueError("give exactly one of average_bits and size")
        return self


class Width(Part):
    """How much of each layer's width stays: a fraction, or a count."""

    mlp: KeptFraction | PositiveInt | None = None
    kv_groups: KeptFraction | PositiveInt | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.mlp is None and self.kv_groups is None:
            raise ValueError("give mlp, kv_groups or both")
        return self


class Gate(Part):
    """Limits that the artifact must keep; a limit that is left out is not checked."""

    max_kl: Annotated[float, Field(ge=0.0)] | None = None
    max_kl_p99: Annotated[float, Field(ge=0.0)] | None = None
    max_perplexity_ratio: Annotated[float, Field(ge=1.0)] | None = None
    min_top1_agreement: Fraction | None = None
    max_task_drop: Fraction | None = None
    min_tokens: PositiveInt | None = None


class CalibrateConfig(Part):
    """Fix the token rows on which later stages collect their statistics."""

    kind: Literal["calibrate"]
    data: DataConfig = Field(default_factory=DataConfig)


class QuantizeConfig(Part):
    """Store linear layers in few bits: one scheme for all, or a mixture within a budget."""

    kind: Literal["quantize"]
    scheme: Scheme = "W4A16"
    bits: Annotated[int, Field(ge=2, le=8)] | None = None
    group_size: Literal[32, 64, 128, -1] | None = None
    symmetric: bool | None = None
    method: Literal["rtn", "gptq"] = "gptq"
    targets: list[Text] = ["linear"]
    ignore: list[Text] = ["lm_head"]
    protect: list[Text] = []
    protect_auto: Fraction = 0.0
    asymmetric_target: bool = True
    true_sequential: bool = True
    dampening: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01
    grid: Literal["minmax", "mse"] = "mse"
    indivisible: Literal["smaller_group", "error"] = Field(
        default="smaller_group", description="when group_size does not divide a layer's inputs"
    )
    scale_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    budget: Budget | None = None
    candidates: Annotated[list[Candidate], Field(min_length=1)] = [
        "W2A16", "W3A16", "W4A16", "W8A16", "BF16",
    ]  # fmt: skip
    scores: Literal["auto", "output_fisher", "swap_in_kl"] = "auto"
    engines: list[Literal["transformers", "vllm", "sglang", "ours"]] = ["ours", "transformers"]

    @property
    def preset(self) -> Preset:
        """Bits, symmetry and group size after `bits`, `symmetric`, `group_size` had their say."""
        named = SCHEMES[self.scheme]
        symmetric = named.symmetric if self.symmetric is None else self.symmetric
        return Preset(self.bits or named.bits, symmetric, self.group_size or DEFAULT_GROUP_SIZE)


class PruneConfig(Part):
    """Take weights (sparsity, n:m pattern), channels (width) or blocks (depth) away."""

    kind: Literal["prune"]
    method: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"
    sparsity: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    pattern: Literal["2:4", "4:8"] | None = None
    reconstruct: bool = True
    width: Width | None = None
    depth: KeptFraction | PositiveInt | Annotated[list[int], Field(min_length=1)] | None = Field(
        default=None, description="kept blocks: a fraction, a count, or their indices"
    )
    ignore: list[Text] = ["lm_head"]

    @model_validator(mode="after")
    def _exactly_one_way(self) -> Self:
        ways = [self.sparsity, self.pattern, self.width, self.depth]
        if sum(way is not None for way in ways) != 1:
            raise ValueError("give exactly one of sparsity, pattern, width and depth")
        return self


class Student(Part):
    """A smaller network to teach: from a folder, or like the teacher with some sizes changed."""

    path: Text | None = None
    num_hidden_layers: PositiveInt | None = None
    hidden_size: PositiveInt | None = None
    intermediate_size: PositiveInt | None = None
    num_attention_heads: PositiveInt | None = None
    num_key_value_heads: PositiveInt | None = None

    @model_validator(mode="after")
    def _path_or_sizes(self) -> Self:
        sizes = self.model_dump(exclude={"path"}, exclude_none=True)
        if (self.path is None) == (not sizes):
            raise ValueError("give either path, or the sizes in which the student differs")
        return self


class DistillConfig(Part):
    """Train the compressed model (or a smaller student) towards the original's distribution."""

    kind: Literal["distill"]
    data: DataConfig = Field(default_factory=DataConfig)
    steps: PositiveInt = 200
    batch_size: PositiveInt = 8
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-4
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    temperature: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    ce_weight: Fraction = 0.0
    hidden_weight: Annotated[float, Field(ge=0.0)] = 0.0
    train: Literal["auto", "weights", "scales"] = "auto"
    student: Student | None = None
    checkpoint_steps: PositiveInt = 50
    gradient_clip: Annotated[float, Field(gt=0.0)] = 1.0

    @model_validator(mode="before")
    @classmethod
    def _short_runs_warm_up_shortly(cls, data: Any) -> Any:
        steps = data.get("steps") if isinstance(data, dict) else None
        if type(steps) is not int or not 0 < steps < 20:
            return data
        return {"warmup_steps": steps // 2, **data}


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
    | QuantizeConfig
    | PruneConfig
    | DistillConfig
    | PackConfig
    | VerifyConfig
    | EvaluateConfig
)

STAGE_CONFIGS: dict[str, type[Part]] = {
    "calibrate": CalibrateConfig,
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
