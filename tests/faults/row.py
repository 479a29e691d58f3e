"""The shape of a fault row, and a digest of a folder that shows whether anything touched it."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from compressor.errors import CompressError


@dataclass(frozen=True)
class Row:
    """One fault: how to make it, and what the user must be told.

    Attributes:
        name: fault id and a few words; the test's id.
        build: changes a sound input (a folder) into the bad one.
        error: class of the error (its exit code with it).
        code: fault id in the message.
        tells: pieces the message must contain.
    """

    name: str
    build: Callable[[Path], object]
    error: type[CompressError]
    code: str
    tells: tuple[str, ...]


def folder_digest(path: Path) -> str:
    """SHA-256 over names, kinds, link targets, sizes and bytes; special files are not opened."""
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        status = file.lstat()
        total.update(f"{file.relative_to(path)!r} {status.st_mode} {status.st_size}".encode())
        if file.is_symlink():
            total.update(str(file.readlink()).encode())
        elif stat.S_ISREG(status.st_mode) and status.st_size < 1 << 26:
            total.update(file.read_bytes())
    return total.hexdigest()
