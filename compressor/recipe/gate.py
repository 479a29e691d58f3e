"""What the artifact must hold to be published."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from compressor.recipe.base import Part
from compressor.recipe.types import Fraction, PositiveInt


class Gate(Part):
    """Limits that the artifact must keep; a limit that is left out is not checked."""

    max_kl: Annotated[float, Field(ge=0.0)] | None = None
    max_kl_p99: Annotated[float, Field(ge=0.0)] | None = None
    max_perplexity_ratio: Annotated[float, Field(ge=1.0)] | None = None
    min_top1_agreement: Fraction | None = None
    max_task_drop: Fraction | None = None
    min_tokens: PositiveInt | None = None
