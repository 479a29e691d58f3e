"""Resource faults RE01-RE11: what the machine refuses, and at which call."""

from __future__ import annotations

import errno
import os
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Usage = namedtuple("Usage", "total used free")


def tiny_disk(*_: Any) -> Usage:
    """What `shutil.disk_usage` says of a disk with 1000 bytes left."""
    return Usage(10**9, 10**9 - 1000, 1000)


def refuse(number: int) -> Callable[..., Any]:
    """A call that fails as the kernel lets it fail."""

    def call(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number), "the-file")

    return call


@dataclass(frozen=True)
class Refusal:
    """One refused call: its id, what is replaced, the error number, and the code told."""

    name: str
    target: str
    number: int
    code: str


REFUSALS = (
    Refusal("RE02 disk full in a unit", "compressor.run_dir.files._write_synced",
            errno.ENOSPC, "RE02"),
    Refusal("RE02 quota in a unit", "compressor.run_dir.files._write_synced",
            errno.EDQUOT, "RE02"),
    Refusal("RE03 disk full in the journal", "compressor.run_dir.journal.os.fsync",
            errno.ENOSPC, "RE02"),
    Refusal("RE02 disk full in a shard", "compressor.stages.pack.write_tensors",
            errno.ENOSPC, "RE02"),
    Refusal("RE02 disk full in a copied tokenizer", "compressor.stages.pack.shutil.copyfile",
            errno.ENOSPC, "RE02"),
    Refusal("RE02 disk full in the manifest", "compressor.stages.pack.write_manifest",
            errno.ENOSPC, "RE02"),
    Refusal("RE02 disk full in the report", "compressor.report.write_report",
            errno.ENOSPC, "RE02"),
    Refusal("RE04 read-only when publishing", "os.rename",
            errno.EROFS, "RE04"),
    Refusal("RE04 not allowed in a shard", "compressor.stages.pack.write_tensors",
            errno.EACCES, "RE04"),
)  # fmt: skip


def below_a_file(folder: Path) -> Path:
    """An output that can never be made: its parent is a file (root cannot write there either)."""
    (folder / "file").write_text("")
    return folder / "file" / "out"
