"""Give the finished folder its final name.

Without `overwrite` one rename does it. With it, two renames do: OUT -> .OUT.old, new -> OUT; a
kill between them leaves no OUT but a complete `.OUT.old`, and `recover_output` puts it back.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from compressor.errors import OutputError, Where
from compressor.run_dir.files import resource_error, sync_folder, sync_tree


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, before any work starts; repairs a killed publish first."""
    recover_output(output)
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise OutputError(
            "the output exists already",
            code="KI07", where=Where(file=str(output)), why="Nothing was changed.",
            fix="choose another output with -o, or add --overwrite",
        )  # fmt: skip
    if output.is_symlink() or not output.is_dir() or not _is_replaceable(output):
        raise OutputError(
            "--overwrite replaces model folders only, and this is none (it has no config.json)",
            code="KI07", where=Where(file=str(output)), why="Nothing was changed.",
            fix="choose another output with -o",
        )  # fmt: skip


def _is_replaceable(output: Path) -> bool:
    return (output / "config.json").is_file() or not any(output.iterdir())


def recover_output(output: Path) -> None:
    """Finish or undo a publish that was killed between its two renames."""
    old = _sibling(output, "old")
    if old.is_dir() and not os.path.lexists(output):
        os.rename(old, output)
    elif old.is_dir():
        shutil.rmtree(old)
    shutil.rmtree(_sibling(output, "incoming"), ignore_errors=True)


def publish(artifact: Path, output: Path, *, overwrite: bool) -> None:
    """Move the folder `artifact` to `output`: readers see the old one or the new one, complete.

    Raises `OutputError` when `output` exists and `overwrite` is off, `ResourceError` when the
    file system refuses.
    """
    output = output.absolute()
    check_output(output, overwrite=overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        sync_tree(artifact)
        source = _on_same_device(artifact, output)
        old = _sibling(output, "old")
        if output.exists():
            os.rename(output, old)
        os.rename(source, output)
        sync_folder(output.parent)
        shutil.rmtree(old, ignore_errors=True)
        if source != artifact:
            shutil.rmtree(artifact, ignore_errors=True)
    except OSError as error:
        recover_output(output)
        raise resource_error(error, output, needed=_size(artifact)) from error


def _on_same_device(artifact: Path, output: Path) -> Path:
    """The artifact itself, or a synced copy beside `output` if that is another file system."""
    if artifact.stat().st_dev == output.parent.stat().st_dev:
        return artifact
    incoming = _sibling(output, "incoming")
    shutil.copytree(artifact, incoming)
    sync_tree(incoming)
    return incoming


def _sibling(output: Path, word: str) -> Path:
    return output.with_name(f".{output.name}.{word}")


def _size(folder: Path) -> int:
    try:
        return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    except OSError as error:
        if error.errno == errno.ENOENT:
            return 0
        raise
