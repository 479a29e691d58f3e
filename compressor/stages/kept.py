"""How many of something stay: a count is taken as it is, a fraction is rounded to aligned sizes."""

from __future__ import annotations

import math

from compressor.errors import RecipeError
from compressor.recipe import PruneConfig


def kept_count(config: PruneConfig, key: str, asked: float | int, of: tuple[int, int]) -> int:
    """The kept number for `width.<key>`; `of` is how many there are, and the alignment.

    Raises:
        RecipeError: more than there are (RC17).
    """
    size, step = of
    kept = asked
    if not isinstance(asked, int):
        kept = max(step, math.floor(asked * size / step + 0.5) * step)
    if kept > size:
        raise RecipeError(
            f"width.{key} asks for {kept} of {size}",
            code="RC17",
            where=config.where(f"width.{key}"),
            fix=f"keep at most {size}",
        )
    return int(kept)
