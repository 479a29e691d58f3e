"""Is this folder what `compress` wrote? Digests of files and tensors against the manifest."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from compressor.artifact.manifest import Manifest, listed_files
from compressor.errors import CompressError, VerificationError, Where
from compressor.modeling.checkpoint import Checkpoint, open_checkpoint


def open_artifact(path: Path) -> Checkpoint:
    """The strict reader's view of an artifact; whatever it refuses is a failed verification."""
    try:
        return open_checkpoint(path, strict=True)
    except CompressError as error:
        raise VerificationError(
            error.message, code=error.code or "CK40", where=error.where, fix="write it again"
        ) from error


def check_files(path: Path, manifest: Manifest, *, allow_more: bool = False) -> None:
    """Every file but the weights: there and unchanged, and no others unless allowed (CK40)."""
    found = listed_files(path)
    for name in sorted({*manifest.files} if allow_more else {*found, *manifest.files}):
        if found.get(name) == manifest.files.get(name):
            continue
        state = "is missing" if name not in found else "has changed"
        state = "is not listed in the manifest" if name not in manifest.files else state
        raise VerificationError(
            f"{name} {state}",
            code="CK40",
            where=Where(str(path / name)),
            fix="copy the artifact again, or run the recipe again",
        )


def check_weight_files(checkpoint: Checkpoint) -> None:
    """Weight files that no loader of this folder reads are nobody's."""
    there = {
        p.relative_to(checkpoint.path).as_posix() for p in checkpoint.path.rglob("*.safetensors")
    }
    for name in sorted(there - set(checkpoint.index_files)):
        where = Where(str(checkpoint.path / name))
        raise VerificationError(f"{name} does not belong to the model", code="CK40", where=where)


def check_tensors(checkpoint: Checkpoint, manifest: Manifest) -> None:
    """Every tensor: there, listed, and with the bytes that were written (CK40)."""
    for name in sorted({*checkpoint.tensors, *manifest.tensors}):
        if name not in checkpoint.tensors or name not in manifest.tensors:
            where = Where(str(checkpoint.path), tensor=name)
            side = "manifest" if name in checkpoint.tensors else "weight files"
            raise VerificationError(f"tensor is not in the {side}", code="CK40", where=where)
        digest = hashlib.sha256(raw_bytes(checkpoint.read(name)).numpy().data).hexdigest()
        if digest != manifest.tensors[name]:
            raise VerificationError(
                "the bytes of a tensor have changed",
                code="CK40",
                where=Where(str(checkpoint.path / checkpoint.tensors[name].file), tensor=name),
                why="A bit flip on disk or in a copy, or somebody edited the file.",
                fix="copy the artifact again, or run the recipe again",
            )


def raw_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as they lie in a file, uint8 [n]."""
    return tensor.contiguous().flatten().view(torch.uint8)
