"""The manifest: what an artifact is made of and where it came from, with a digest of everything.

`manifest.json` lists the SHA-256 of every tensor's bytes and of every other file, the resolved
recipe's digest, the original's identity, data digests, seed and versions. It holds no times and no
paths, so the same run gives the same manifest.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compressor.errors import VerificationError, Where

FILE = "manifest.json"
# Written after the manifest, or holding times: not part of the artifact's identity.
NOT_LISTED = (FILE, "report.html", "report.json", "README.md", "pareto.json")


@dataclass(frozen=True, slots=True)
class Manifest:
    """See the module's docstring; `tensors` maps a name to its SHA-256."""

    base: dict[str, Any]
    recipe_sha256: str
    data: dict[str, str]
    seed: int
    versions: dict[str, str]
    tensors: dict[str, str]
    formats: dict[str, dict[str, Any]]
    masked: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    manifest_version: int = 1


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed_files(folder: Path) -> dict[str, str]:
    """Digests of every file of the artifact but the weights (tensors have their own)."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    chosen = [n for n in names if n not in NOT_LISTED and not n.endswith(".safetensors")]
    return {name: file_digest(folder / name) for name in chosen}


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `manifest.json` (files are listed as they are now)."""
    body = asdict(manifest) | {"files": listed_files(folder)}
    text = json.dumps(body, indent=1, sort_keys=True) + "\n"
    (folder / FILE).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`.

    Raises:
        VerificationError: missing or not what we write.
    """
    path = folder / FILE
    try:
        return Manifest(**json.loads(path.read_bytes()))
    except FileNotFoundError as error:
        raise VerificationError(
            "the folder has no manifest",
            code="CK40",
            where=Where(str(path)),
            fix="only artifacts written by `compress` can be verified",
        ) from error
    except (ValueError, TypeError) as error:
        raise VerificationError(
            f"the manifest is damaged: {error}", code="CK40", where=Where(str(path))
        ) from error
