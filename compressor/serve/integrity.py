"""What a server checks before it loads an artifact."""

from __future__ import annotations

from pathlib import Path

from compressor.artifact.manifest import FILE, read_manifest
from compressor.errors import CheckpointError, VerificationError
from compressor.modeling.integrity import check_files, check_tensors, open_artifact


def check_digests(folder: Path) -> str:
    """Compare everything the manifest lists; returns a note.

    Raises CheckpointError (SV33) naming the first file or tensor that differs. A folder without a
    manifest was not written by `compress`: nothing is compared, and the note says so.
    """
    if not (folder / FILE).is_file():
        return "no manifest: digests were not checked"
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest, allow_more=True)
        check_tensors(open_artifact(folder), manifest)
    except VerificationError as error:
        raise CheckpointError(
            error.message,
            code="SV33",
            where=error.where,
            why="the folder was changed or damaged after it was written.",
            fix="copy the artifact again, or serve it with verification off.",
        ) from error
    return f"digests of {len(manifest.tensors)} tensors and {len(manifest.files)} files match"
