"""One question asked at every entrance: are these numbers finite?"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import NumericError


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite.

    A sum is the cheapest look at all elements; where that of finite ones overflows, fp64 decides.
    """
    seen = tensor.detach()
    return bool(torch.isfinite(seen.sum()) or torch.isfinite(seen.sum(dtype=torch.float64)))


def require_finite(tensor: Tensor, what: str) -> None:
    """Raise NumericError NU01 naming ``what`` if any element is NaN or infinite."""
    if not is_finite(tensor):
        raise NumericError(
            f"{what} contain NaN or infinity",
            code="NU01",
            why="a non-finite number spreads to every weight that is computed from it",
            fix="check the checkpoint and the calibration texts; try float32 instead of float16",
        )
