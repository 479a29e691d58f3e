"""Is this folder what `compress` wrote? Digests of files and tensors against the manifest."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from compressor.artifact.manifest import FILE, Manifest, listed_files, read_manifest
from compressor.errors import CheckpointError, Where
from compressor.modeling.checkpoint import open_checkpoint


def check_digests(folder: Path) -> str:
    """Compare everything the manifest lists; returns a note.

    Raises CheckpointError (SV33) naming the first file or tensor that differs. A folder without a
    manifest was not written by `compress`: nothing is compared, and the note says so.
    """
    if not (folder / FILE).is_file():
        return "no manifest: digests were not checked"
    manifest = read_manifest(folder)
    _check_files(folder, manifest)
    checkpoint = open_checkpoint(folder)
    for name, digest in manifest.tensors.items():
        if name not in checkpoint.tensors:
            raise _differs(folder, name, "is missing")
        data = checkpoint.read(name).contiguous().flatten().view(torch.uint8).numpy()
        if hashlib.sha256(data.data).hexdigest() != digest:
            raise _differs(folder, name, "differs from the manifest")
    return f"digests of {len(manifest.tensors)} tensors and {len(manifest.files)} files match"


def _check_files(folder: Path, manifest: Manifest) -> None:
    present = listed_files(folder)
    for name, digest in manifest.files.items():
        if present.get(name) != digest:
            problem = "differs from the manifest" if name in present else "is missing"
            raise CheckpointError(
                f"{name} {problem}",
                code="SV33",
                where=Where(str(folder / name)),
                why="the folder was changed or damaged after it was written.",
                fix="copy the artifact again, or serve it with verification off.",
            )


def _differs(folder: Path, tensor: str, problem: str) -> CheckpointError:
    return CheckpointError(
        f"tensor {problem}",
        code="SV33",
        where=Where(str(folder), tensor=tensor),
        why="the folder was changed or damaged after it was written.",
        fix="copy the artifact again, or serve it with verification off.",
    )
