"""Types that several parts of a recipe share: fractions, counts, texts and sizes."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

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
