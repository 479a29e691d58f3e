"""Writing so that a crash leaves the old file or the new one, never half of it.

Order: write `name.tmp`, fsync it, rename it over `name`, fsync the folder. Modes follow the umask.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path

from compressor.errors import CompressError, ResourceError, Where

_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


def write_atomic(path: Path, data: bytes) -> Path:
    """Write `data` to `path` as a whole or not at all; raises `ResourceError` RE02 or RE04.

    Devices and pipes (`/dev/stdout`, `/dev/null`) are written to, never replaced.
    """
    if path.exists() and not path.is_file():
        return _write_special(path, data)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_synced(temporary, data)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise resource_error(error, path, needed=len(data)) from error
    return path


def _write_special(path: Path, data: bytes) -> Path:
    try:
        with path.open("wb") as file:
            file.write(data)
    except OSError as error:
        raise resource_error(error, path, needed=len(data)) from error
    return path


def _write_synced(path: Path, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o666), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make renames inside `path` survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Flush every file and folder below `path` to the disk."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            with open(Path(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))


def sha256_file(path: Path) -> str:
    """Digest of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep(path: Path) -> list[Path]:
    """Remove what killed writers left below `path`: `*.tmp*` and `*.partial` files."""
    leftovers = [
        file
        for file in path.rglob("*")
        if (".tmp" in file.name or file.name.endswith(".partial")) and not file.is_dir()
    ]
    for file in leftovers:
        file.unlink(missing_ok=True)
    return leftovers


def resource_error(error: OSError, path: Path, *, needed: int = 0) -> CompressError:
    """The user's words for a failed write: disk full (RE02), not allowed (RE04) or the rest."""
    where = Where(file=str(path))
    if error.errno in _FULL:
        mount = mount_of(path)
        free = shutil.disk_usage(mount).free
        return ResourceError(
            f"the disk is full: {mount} has {free} bytes free, this file needs {needed}",
            code="RE02", where=where,
            why="The partial file was removed; finished units are kept.",
            fix=f"free some space on {mount} and run the same command again",
        )  # fmt: skip
    if error.errno in _DENIED:
        return ResourceError(
            f"writing is not allowed here for uid {os.getuid()}: {error.strerror}",
            code="RE04", where=where, fix="choose another folder or change its permissions",
        )  # fmt: skip
    return ResourceError(
        f"the file cannot be written: {error.strerror or error}",
        code="RE04", where=where, fix="check the path and the disk",
    )  # fmt: skip


def mount_of(path: Path) -> Path:
    """The mount point that `path` (or its nearest existing parent) lies on."""
    path = path.absolute()
    while not path.exists() or not os.path.ismount(path):
        if path == path.parent:
            break
        path = path.parent
    return path
