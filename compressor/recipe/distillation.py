"""The distill stage: who learns, from what, by which loss, and how the training is run."""

# ruff: noqa: RUF012 (pydantic copies mutable defaults)
from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from compressor.recipe.base import Part
from compressor.recipe.data import DataConfig
from compressor.recipe.types import Fraction, KeptFraction, PositiveInt, Text

Weight = Annotated[float, Field(ge=0.0)]


class Student(Part):
    """A smaller network to teach: from a folder, or like the teacher with some sizes changed."""

    path: Text | None = None
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = Field(
        default=None, description="the teacher's blocks that the student starts from"
    )
    depth: KeptFraction | None = Field(
        default=None, description="the part of the teacher's blocks that it starts from"
    )
    num_hidden_layers: PositiveInt | None = None
    hidden_size: PositiveInt | None = None
    intermediate_size: PositiveInt | None = None
    num_attention_heads: PositiveInt | None = None
    num_key_value_heads: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        ways = [self.path, self.layers, self.depth, self.sizes or None]
        if sum(way is not None for way in ways) != 1:
            raise ValueError(
                "give either path, layers, depth, or the sizes in which the student differs"
            )
        if self.layers is not None and self.layers != sorted(set(self.layers)):
            raise ValueError("layers must be different and in the order of the teacher")
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that are given."""
        return self.model_dump(exclude={"path", "layers", "depth"}, exclude_none=True)


class Teacher(Part):
    """How much of the teacher's distribution is learned from, and whether it is kept on disk."""

    targets: Literal["full", "top_k", "sampled"] = Field(
        default="full",
        description="full; top_k: the likeliest tokens and the sum of the rest; sampled: tokens "
        "drawn from it, unbiased",
    )
    count: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=64, description="tokens kept at each position (top_k), or draws (sampled)"
    )
    cache: Text = Field(
        default="none", description="none, auto (the program's cache folder), or a folder"
    )

    @model_validator(mode="after")
    def _cache_fits(self) -> Self:
        if self.targets == "full" and self.cache != "none":
            raise ValueError("a cache keeps top_k or sampled targets, not full distributions")
        if self.targets == "sampled" and self.cache == "none":
            raise ValueError("sampled targets are for a cache; online, full ones cost the same")
        return self

    @property
    def is_cached(self) -> bool:
        """Whether the teacher runs once, before the training."""
        return self.cache != "none"


class OnPolicy(Part):
    """Rows that the student continues itself and the teacher judges (GKD, arXiv 2306.13649)."""

    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    prefix_tokens: PositiveInt = Field(default=16, description="tokens of the text to go on from")
    temperature: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0


class Lora(Part):
    """Adapters of low rank beside dense weights, merged into them (LoRA, arXiv 2106.09685)."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    alpha: Annotated[float, Field(gt=0.0)] = Field(
        default=16.0, description="the product of the factors is multiplied with alpha / rank"
    )
    targets: Annotated[list[Text], Field(min_length=1)] = Field(
        default=["linear"], description="which linears, as patterns; quantized ones are refused"
    )


class DistillConfig(Part):
    """Train the compressed model (or a smaller student) towards the original's distribution."""

    kind: Literal["distill"]
    data: DataConfig = Field(default_factory=DataConfig)
    steps: PositiveInt = 200
    batch_size: PositiveInt = 8
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-4
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    loss: Literal["forward_kl", "reverse_kl", "jsd", "total_variation"] = "forward_kl"
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.5, description="weight of the teacher in the mixture of `loss: jsd`"
    )
    temperature: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    ce_weight: Fraction = 0.0
    hidden_weight: Weight = 0.0
    attention_weight: Weight = Field(
        default=0.0, description="weight of the relations of queries, keys, values (last block)"
    )
    teacher: Teacher = Field(default_factory=Teacher)
    on_policy: OnPolicy | None = None
    train: Literal["auto", "weights", "scales", "scales_and_norms", "codes", "lora"] = "auto"
    lora: Lora | None = Field(default=None, description="adapters of train: lora; null = defaults")
    student: Student | None = None
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of products; parameters and optimizer stay float32"
    )
    micro_batch_tokens: PositiveInt = Field(
        default=4096, description="tokens at once; gradients of a step add up over them"
    )
    gradient_checkpointing: bool = False
    sharding: Literal["none", "fsdp"] = Field(
        default="none", description="fsdp: each process keeps a part of every block"
    )
    gradient_clip: Annotated[float, Field(gt=0.0)] = 1.0
    spike_factor: Annotated[float, Field(gt=1.0)] = Field(
        default=10.0, description="a loss so many times the usual one sends training back"
    )
    spike_retries: Annotated[int, Field(ge=0, le=10)] = 2
    checkpoint_steps: PositiveInt = 50
    checkpoint_minutes: Annotated[float, Field(gt=0.0)] | None = None
    patience: PositiveInt | None = Field(
        default=None, description="stop after so many checkpoints without a better held-out KL"
    )
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = []

    @property
    def adapters(self) -> Lora:
        """The adapters of `train: lora`."""
        return self.lora or Lora()

    @model_validator(mode="before")
    @classmethod
    def _short_runs_warm_up_shortly(cls, data: Any) -> Any:
        steps = data.get("steps") if isinstance(data, dict) else None
        if type(steps) is not int or not 0 < steps < 20:
            return data
        return {"warmup_steps": steps // 2, **data}

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if self.teacher.targets == "sampled" and self.loss != "forward_kl":
            raise ValueError("sampled targets are unbiased for loss: forward_kl only")
        if self.lora is not None and self.train != "lora":
            raise ValueError("lora says how train: lora adapts: set train, or remove it")
        if self.on_policy is not None and self.ce_weight:
            raise ValueError("ce_weight learns from text, which on_policy replaces: set it to 0")
        return self

    @model_validator(mode="after")
    def _cached_teachers_are_away(self) -> Self:
        for key in ("hidden_weight", "attention_weight", "on_policy"):
            if self.teacher.is_cached and getattr(self, key):
                raise ValueError(f"{key} asks the teacher at every step: set teacher.cache to none")
        return self
