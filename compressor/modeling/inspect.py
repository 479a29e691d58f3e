"""List what a model folder stores, linear by linear: scheme, shape, bits and bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compressor.artifact.formats import LayerFormat
from compressor.artifact.packing import SUFFIXES
from compressor.artifact.schema import read_formats
from compressor.modeling.checkpoint import Checkpoint, open_checkpoint
from compressor.modeling.load import SCALE_NAMES


def inspect_artifact(path: Path) -> Iterator[dict[str, Any]]:
    """One row for each quantized linear and each other tensor, in order of name, then the total.

    Raises:
        CheckpointError: the folder is not sound.
    """
    checkpoint = open_checkpoint(Path(path))
    formats = _formats(checkpoint)
    total = 0
    for name in sorted(_subjects(checkpoint)):
        row = _row(checkpoint, name, formats.get(name))
        total += row["bytes"]
        yield row
    yield {"name": "total", "scheme": "", "shape": "", "bits": "", "bytes": total}


def _subjects(checkpoint: Checkpoint) -> set[str]:
    """Tensor names, with the parts of a packed linear under the linear's name."""
    subjects = set()
    for name in checkpoint.tensors:
        stem, _, suffix = name.rpartition(".")
        subjects.add(stem if suffix in SUFFIXES else name)
    return subjects


def _formats(checkpoint: Checkpoint) -> dict[str, LayerFormat]:
    config = checkpoint.config.get("quantization_config")
    if config is None:
        return {}
    ending = ".weight_scale"
    scales = {
        n.removesuffix(ending): SCALE_NAMES[info.dtype]
        for n, info in checkpoint.tensors.items()
        if n.endswith(ending)
    }
    return read_formats(config, scales, file=str(checkpoint.path / "config.json"))


def _row(checkpoint: Checkpoint, name: str, fmt: LayerFormat | None) -> dict[str, Any]:
    tensors = checkpoint.tensors
    if fmt is None:
        info = tensors[name]
        bits = 8 * info.dtype.itemsize
        shape = " x ".join(map(str, info.shape))
        row = {"name": name, "scheme": info.dtype_name, "shape": shape}
        return row | {"bits": bits, "bytes": info.nbytes}
    parts = [f"{name}.{s}" for s in SUFFIXES if f"{name}.{s}" in tensors]
    size = sum(tensors[p].nbytes for p in parts)
    rows, columns = checkpoint.read(f"{name}.weight_shape").tolist()
    row = {"name": name, "scheme": fmt.label, "shape": f"{rows} x {columns}"}
    return row | {"bits": round(8 * size / (rows * columns), 3), "bytes": size}
