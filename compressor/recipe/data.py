"""Where token rows come from, for calibration, training and evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from compressor.recipe.base import Part
from compressor.recipe.types import Fraction, PositiveInt, Text


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
