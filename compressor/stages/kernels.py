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
from compressor.artifact.schema import read_formats
from compressor.errors import UnsupportedError, Where
from compressor.modeling.checkpoint import Checkpoint, open_checkpoint
from compressor.modeling.state import stored_scale
from compressor_kernels import gpu
from compressor_kernels.bundle import BundleError, artifact_bundle, kernel_digest
from compressor_kernels.tuning import GemmSpec

log = logging.getLogger("compressor.pack")
FOLDER = "kernels"
SCALE = ".weight_scale"
_ONE_BYTE = {"nvfp4-pack-quantized": "e5m3", "mxfp4-pack-quantized": "e8m0"}


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
    if not formats:
        return {"archs": [], "note": "no quantized layers, no kernels"}
    layers = kernel_layers(formats, shapes)
    try:
        artifact_bundle(layers, archs, folder / FOLDER)
    except BundleError as error:
        log.warning("kernels were not compiled: %s", error)
        artifact_bundle(layers, [], folder / FOLDER)
        return {"archs": [], "digest": kernel_digest(), "note": f"not compiled: {error}"}
    compiled = archs if layers else []
    return {"archs": compiled, "digest": kernel_digest(), "num_shapes": len(layers)}


def kernel_layers(
    formats: dict[str, LayerFormat], shapes: dict[str, tuple[int, int]]
) -> list[GemmSpec]:
    """The distinct weights of a model that the GPU kernels compute, in a stable order."""
    found = {_spec(fmt, shapes[name]) for name, fmt in formats.items()}
    return sorted((spec for spec in found if spec is not None), key=str)


def _spec(fmt: LayerFormat, shape: tuple[int, int]) -> GemmSpec | None:
    kind = gpu.kind_of(fmt.stored, fmt.bits)
    group_size = fmt.block or fmt.group_size
    known = gpu.takes(fmt.stored, fmt.bits, group_size=fmt.group_size, block=fmt.block)
    if kind is None or not known:
        return None
    scale_kind = _ONE_BYTE.get(fmt.stored, "float")
    return GemmSpec(kind, group_size, shape, not fmt.symmetric, scale_kind)


def artifact_layers(path: Path) -> list[GemmSpec]:
    """The distinct weights of an artifact that the GPU kernels compute.

    Raises UnsupportedError (KE02) when there are none.
    """
    checkpoint = open_checkpoint(path)
    config = checkpoint.config.get("quantization_config")
    stems = [n.removesuffix(SCALE) for n in checkpoint.tensors if n.endswith(SCALE)]
    found: list[GemmSpec] = []
    if config is not None and stems:
        scales = {s: stored_scale(checkpoint.tensors[s + SCALE].dtype) for s in stems}
        formats = read_formats(config, scales, file=str(checkpoint.path / "config.json"))
        found = kernel_layers(formats, {s: _shape(checkpoint, s, formats[s]) for s in formats})
    if not found:
        raise UnsupportedError(
            f"{path.name} has no packed layers that the GPU kernels compute",
            code="KE02",
            where=Where(str(path)),
            fix="quantize it to 2, 3, 4 or 8 bits, or to a float format of 4 or 8 bits",
        )
    return found


def _shape(checkpoint: Checkpoint, stem: str, fmt: LayerFormat) -> tuple[int, int]:
    if f"{stem}.weight_shape" in checkpoint.tensors:
        rows, columns = checkpoint.read(f"{stem}.weight_shape").tolist()
        return int(rows), int(columns)
    packed = f"{stem}.weight_packed"
    rows, columns = checkpoint.tensors[packed if fmt.bits == 4 else f"{stem}.weight"].shape
    return int(rows), int(columns) * (2 if fmt.bits == 4 else 1)


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
