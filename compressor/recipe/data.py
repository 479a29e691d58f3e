"""Where token rows come from, for calibration, training and evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from compressor.recipe.base import Part
from compressor.recipe.types import Fraction, PositiveInt, Text

SELF = "self"
SOURCES = "`reference`, `self`, a .txt/.jsonl/.json/.parquet file, or a name for `datasets`"


class Source(Part):
    """One of several texts; its share of the rows is its weight over the sum of all weights."""

    source: Text = Field(description=SOURCES)
    split: str | None = None
    text_column: Text = "text"
    weight: Annotated[float, Field(gt=0.0)] = 1.0


class Sampling(Part):
    """How the model writes its own text (`source: self`)."""

    temperature: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    prefixes: Text | None = Field(
        default=None,
        description="what a text begins with besides BOS: null = nothing, `random` = one random "
        "token, or a source of texts whose first tokens are taken",
    )
    prefix_tokens: PositiveInt = 4
    batch_size: PositiveInt = 16


class DataConfig(Part):
    """Where token rows come from; `seed` None keeps the order of the source."""

    source: Text = Field(default="reference", description=SOURCES)
    sources: list[Source] = Field(
        default=[], description="several texts with exact shares, instead of `source`"
    )
    sampling: Sampling = Field(default_factory=Sampling)
    split: str | None = None
    text_column: Text = "text"
    num_samples: PositiveInt = 128
    seq_len: Annotated[int, Field(ge=2)] = 256
    skip_bad_rows: Annotated[int, Field(ge=0)] = 0
    min_fraction: Fraction = 0.25
    packing: Literal["rows", "packed", "joined"] = Field(
        default="rows",
        description="rows: a row is the beginning of a document; packed: a row is filled with "
        "documents that do not see each other; joined: they do",
    )
    seed: int | None = None

    @model_validator(mode="after")
    def _one_way_to_name_sources(self) -> Self:
        if self.sources and (
            self.source != "reference" or self.split or self.text_column != "text"
        ):
            raise ValueError("give sources, or source with its split and text_column, not both")
        if len(self.sources) > self.num_samples:
            raise ValueError(f"{len(self.sources)} sources need at least as many rows")
        return self

    @property
    def names(self) -> list[str]:
        """Every source that is read, those of prefixes included."""
        found = [s.source for s in self.sources] or [self.source]
        extra = self.sampling.prefixes
        return [*found, *([extra] if SELF in found and extra not in (None, "random") else [])]

    def renamed(self, names: dict[str, str]) -> Self:
        """The same data with its sources called otherwise (to show them without folders)."""
        prefixes = self.sampling.prefixes
        shown = None if prefixes is None else names.get(prefixes, prefixes)
        parts = [
            s.model_copy(update={"source": names.get(s.source, s.source)}) for s in self.sources
        ]
        changes = {
            "source": names.get(self.source, self.source),
            "sources": parts,
            "sampling": self.sampling.model_copy(update={"prefixes": shown}),
        }
        return self.model_copy(update=changes)


class EvaluationData(DataConfig):
    """Like `DataConfig`, but the embedded text defaults to the rows that calibration never sees."""

    max_contamination: Fraction | None = Field(
        default=None,
        description="largest share of evaluation rows that may stand in the text the model was "
        "calibrated or trained on; null = warn only",
    )

    @model_validator(mode="before")
    @classmethod
    def _held_out(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("sources"):
            parts = data["sources"]
            return {
                **data,
                "sources": [_held_out(p) for p in parts] if isinstance(parts, list) else parts,
            }
        return _held_out({"source": "reference", **data})

    @model_validator(mode="after")
    def _not_by_itself(self) -> Self:
        if SELF in self.names:
            raise ValueError("`self` is text the model wrote: it cannot judge the model")
        return self


def _held_out(part: Any) -> Any:
    is_reference = isinstance(part, dict) and part.get("source") == "reference"
    return {"split": "evaluation", **part} if is_reference else part
