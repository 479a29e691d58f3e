"""The kernels that belong to an artifact: sources, launch table and compiled binaries.

They are there to be read and compared. The runtime uses the *installed* kernels, says whether
their digest is the artifact's, and never runs code from an artifact.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from compressor.artifact.formats import LayerFormat
from compressor_kernels.bundle import BundleError, artifact_bundle, kernel_digest
from compressor_kernels.bundle import LayerFormat as KernelLayer

log = logging.getLogger("compressor.pack")
FOLDER = "kernels"
KERNEL_BITS = 4


def add_kernels(
    formats: dict[str, LayerFormat],
    shapes: dict[str, tuple[int, int]],
    archs: list[str],
    folder: Path,
) -> dict[str, Any]:
    """Write `kernels/` into an artifact; returns what the report says about it.

    A machine that cannot compile for an architecture still gets the sources: the failure is logged
    and reported, the checkpoint does not depend on it.
    """
    layers = sorted(
        {
            KernelLayer(shapes[name], fmt.group_size, fmt.symmetric)
            for name, fmt in formats.items()
            if fmt.bits == KERNEL_BITS and fmt.number == "int"
        },
        key=str,
    )
    if not formats:
        return {"archs": [], "note": "no quantized layers, no kernels"}
    try:
        artifact_bundle(layers, archs, folder / FOLDER)
    except BundleError as error:
        log.warning("kernels were not compiled: %s", error)
        artifact_bundle(layers, [], folder / FOLDER)
        return {"archs": [], "digest": kernel_digest(), "note": f"not compiled: {error}"}
    compiled = archs if layers else []
    return {"archs": compiled, "digest": kernel_digest(), "num_shapes": len(layers)}


def kernels_match(folder: Path) -> bool | None:
    """Whether the installed kernels are those the artifact was packed with; None if it has none."""
    file = folder / FOLDER / "digests.json"
    if not file.is_file():
        return None
    try:
        listed = json.loads(file.read_bytes())
    except ValueError:
        return False
    return isinstance(listed, dict) and listed.get("kernel_digest") == kernel_digest()
