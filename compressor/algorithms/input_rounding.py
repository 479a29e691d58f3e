"""Rounding of activations, exactly as compressed-tensors (and the kernels of engines) do it.

    int8, fp8    one scale for each token: absmax / 127.5 or absmax / 448
    fp8_group    one for each 128 inputs of a token: absmax / 448
    nvfp4        one for each 16: e4m3(absmax / 6 * g) / g, with a calibrated global scale g
    mxfp4        one for each 32: 2^(floor(log2 absmax) - 2), one more if the mantissa is >= 1.75

Scales are made of the values of the moment, so nothing has to be stored but g. The result has the
dtype of x; what is computed is x rounded to the format and back ("fake quantization").

# N tokens, I inputs, g columns in a group
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.algorithms.float_grid import TOP, power_of_two_scale, round_to_level

GROUPS = {"fp8_group": 128, "nvfp4": 16, "mxfp4": 32}
SMALLEST_E4M3_SCALE = 0.125  # what compressed-tensors takes for groups of zeros


def round_inputs(x: Tensor, kind: str, global_scale: Tensor | None = None) -> Tensor:
    """Round x [..., I] to `kind` ("none" gives x back) and return it in its own dtype.

    global_scale: fp32 [1] for "nvfp4"; from the absmax of x if it is not calibrated yet.
    """
    if kind == "none" or x.numel() == 0:
        return x
    groups = x.reshape(*x.shape[:-1], -1, GROUPS[kind]) if kind in GROUPS else x
    absmax = groups.abs().amax(-1, keepdim=True)
    if kind == "int8":
        scale = _positive(absmax / 127.5)
        return (groups / scale).clamp(-128, 127).round() * scale
    if kind in ("fp8", "fp8_group"):
        scale = _positive(absmax / TOP[8])
        return (round_to_level(groups / scale, 8) * scale).view(x.shape)
    scale = _power(absmax) if kind == "mxfp4" else _local(absmax, global_scale)
    return (round_to_level(groups / scale, 4) * scale).to(x.dtype).view(x.shape)


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


def _local(absmax: Tensor, global_scale: Tensor | None) -> Tensor:
    if global_scale is None:
        largest = float(absmax.max())
        global_scale = torch.tensor([power_of_two_scale(largest, margin=1.0)])
    wide = global_scale.to(absmax.device)
    local = (absmax / TOP[4] * wide).clamp(max=TOP[8]).to(torch.float8_e4m3fn).float()
    return torch.where(local == 0, SMALLEST_E4M3_SCALE, local) / wide


def _power(absmax: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(absmax.float())  # absmax = mantissa * 2^exponent, 0.5..1
    power = exponent - 3 + (mantissa >= 0.875).int()
    power = torch.where(absmax == 0, -127, power).clamp(-127, 127)
    return torch.ldexp(torch.ones_like(mantissa), power).to(absmax.dtype)
