"""One question asked at every entrance: are these numbers finite?"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import NumericError


def require_finite(tensor: Tensor, what: str) -> None:
    """Raise NumericError NU01 naming ``what`` if any element is NaN or infinite.

    One reduction in fp64, so finite fp32 or bf16 elements cannot overflow the sum.
    """
    total = tensor.detach().sum(dtype=torch.float64)
    if not bool(torch.isfinite(total)):
        raise NumericError(
            f"{what} contain NaN or infinity",
            code="NU01",
            why="a non-finite number spreads to every weight that is computed from it",
            fix="check the checkpoint and the calibration texts; try float32 instead of float16",
        )
