"""What a weight's format fixes at compile time: the same for launches and ahead-of-time jobs."""

from __future__ import annotations

from typing import Any

import torch

from compressor_kernels.tuning import GemmSpec
from compressor_kernels.words import (
    LAYOUTS,
    Floats,
    assembly,
    columns_a_plane,
    constraints,
    numbers,
    plan,
)

FLOATS: dict[torch.dtype, Floats] = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def wants_asm(device: torch.device) -> bool:
    """Whether to unpack with PTX; without it loops are twice as long on NVIDIA."""
    return device.type == "cuda" and torch.version.hip is None


def constants(spec: GemmSpec, floats: Floats, *, form: str, asm: bool) -> dict[str, Any]:
    """Compile-time arguments that follow from the format of the weight."""
    layout, made = LAYOUTS[spec.kind], numbers(spec.kind, floats)
    shifted = form == "element" and spec.scale_kind != "float" and floats == "bf16"
    centred = form != "raw" and not shifted
    return {
        "PC": columns_a_plane(spec.kind, spec.group_size),
        "PLANES": layout.num_planes,
        "W": layout.words,
        "R": len(made) // layout.num_planes,
        "G": max(spec.group_size, 0),
        "FORM": form,
        "CENTRED": centred,
        "ZERO": ("sums" if form == "raw" else "each") if spec.has_zeros else "none",
        "ZERO_OFFSET": float(2 ** (layout.bits - 1)),
        "SCALE": spec.scale_kind,
        "HAS_FACTOR": spec.scale_kind == "e5m3",
        "ASM": assembly(spec.kind, floats, centred=centred) if asm else "",
        "CONSTRAINTS": constraints(spec.kind, floats) if asm else "",
        "PLAN": plan(spec.kind, floats),
        "FP16": floats == "fp16",
    }
