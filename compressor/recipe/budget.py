"""How large an artifact may become."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from compressor.recipe.base import Part
from compressor.recipe.types import Size


class Budget(Part):
    """How large the packed linears may become: average bits a weight, or bytes of all files."""

    average_bits: Annotated[float, Field(ge=1.0, le=16.0)] | None = None
    size: Size | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.average_bits is None) == (self.size is None):
            raise ValueError("give exactly one of average_bits and size")
        return self
