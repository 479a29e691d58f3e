"""What the artifact must hold to be published, and what happens when it does not."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from compressor.recipe.base import Part
from compressor.recipe.types import Fraction, PositiveInt


class Gate(Part):
    """Limits that the artifact must keep; a limit that is left out is not checked.

    `on_fail: repair` gives the units that harm most more bits and tries again, at most
    `repair_rounds` times, before the artifact is kept aside.
    """

    max_kl: Annotated[float, Field(ge=0.0)] | None = None
    max_kl_p99: Annotated[float, Field(ge=0.0)] | None = None
    max_perplexity_ratio: Annotated[float, Field(ge=1.0)] | None = None
    min_top1_agreement: Fraction | None = None
    max_task_drop: Fraction | None = None
    min_tokens: PositiveInt | None = None
    on_fail: Literal["keep_aside", "repair"] = "keep_aside"
    repair_rounds: Annotated[int, Field(ge=1, le=16)] = 3

    def limits(self) -> dict[str, Any]:
        """The limits alone, by name."""
        return self.model_dump(exclude={"on_fail", "repair_rounds"})
