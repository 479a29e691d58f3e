"""What an artifact may cost: bits, bytes, milliseconds, and what damage it may have.

Limits may be combined; each one is kept. `max_kl` alone asks for the smallest artifact that holds
it; together with other limits, for the smallest one within them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from compressor.recipe.base import Part
from compressor.recipe.types import Size, Text, parse_size

_CONTEXT = re.compile(r"(\d+)(k?)")


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory for weights and KV cache together: bytes, and the tokens of context to hold."""

    num_bytes: int
    context: int


def parse_footprint(text: str) -> Footprint:
    """ "24GB@32k": bytes, and tokens of context (k = 1024); raises ValueError otherwise."""
    size, _, context = text.partition("@")
    match = _CONTEXT.fullmatch(context.strip())
    if match is None or int(match[1]) == 0:
        raise ValueError(f"{text!r} is no size at a context; write for example 24GB@32k")
    return Footprint(parse_size(size), int(match[1]) * (1024 if match[2] else 1))


def _checked_footprint(text: str) -> str:
    parse_footprint(text)
    return text


class Budget(Part):
    """Limits of a mixture: at least one; and how the mixture is looked for."""

    average_bits: Annotated[float, Field(ge=1.0, le=16.0)] | None = None
    size: Size | None = None
    decode_ms: Annotated[float, Field(gt=0.0)] | None = None
    device: Text | None = Field(
        default=None, description="for decode_ms: a shipped device, or a JSON file"
    )
    fits: Annotated[str, AfterValidator(_checked_footprint)] | None = None
    max_kl: Annotated[float, Field(gt=0.0)] | None = None
    profile: Text = Field(
        default="auto", description="auto = the user's cache, none = no cache, else a JSON file"
    )
    trials: Annotated[int, Field(ge=0, le=64)] = 2

    @model_validator(mode="after")
    def _limited(self) -> Self:
        limits = (self.average_bits, self.size, self.decode_ms, self.fits, self.max_kl)
        if all(limit is None for limit in limits):
            raise ValueError("give at least one of average_bits, size, decode_ms, fits and max_kl")
        if (self.decode_ms is None) != (self.device is None):
            raise ValueError("decode_ms and device belong together")
        return self
