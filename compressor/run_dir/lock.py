"""One run a folder: a lock that says who holds it and that dies with its holder.

The kernel's `flock` decides on one machine; it vanishes when the process does, so a killed run
leaves no obstacle. The text in the file (pid, host, start) is for messages, and for the one case
the kernel cannot see: a folder shared with another host.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import psutil

from compressor.errors import OutputError, Where
from compressor.run_dir.files import resource_error

log = logging.getLogger("compressor.run_dir")


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock; `created` is the process's start in seconds since 1970."""

    pid: int
    host: str
    created: float
    started_utc: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started_utc}"

    @property
    def is_other_host(self) -> bool:
        return self.host != socket.gethostname()

    @property
    def is_alive(self) -> bool:
        """Is the very same process (not a reused pid) still there on this host?"""
        try:
            return bool(abs(psutil.Process(self.pid).create_time() - self.created) < 2.0)
        except psutil.Error:
            return False


class FolderLock:
    """Exclusive use of a run folder from construction to `release`."""

    def __init__(self, path: Path, *, break_lock: bool = False) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise resource_error(error, path) from error
        try:
            self._acquire(break_lock)
        except BaseException:
            os.close(self._descriptor)
            raise

    def _acquire(self, break_lock: bool) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._held(self._holder(), "KI11", "wait for it, or stop it") from error
        holder = self._holder()
        if holder is not None and holder.is_other_host and not break_lock:
            fix = "if that run is surely gone, add --break-lock"
            raise self._held(holder, "KI12", fix)
        if holder is not None and holder.pid != os.getpid():
            if not holder.is_other_host and holder.is_alive:
                raise self._held(holder, "KI11", "wait for it, or stop it")
            log.warning("took over the lock of %s, which is gone", holder)
        self._write(_myself())

    def _holder(self) -> Holder | None:
        try:
            return Holder(**json.loads(os.pread(self._descriptor, 4096, 0)))
        except (ValueError, TypeError):
            return None

    def _held(self, holder: Holder | None, code: str, fix: str) -> OutputError:
        return OutputError(
            f"another run uses this folder: {holder or 'unknown process'}",
            code=code, where=Where(file=str(self._path.parent)),
            why="Nothing was written.", fix=fix,
        )  # fmt: skip

    def _write(self, holder: Holder | None) -> None:
        text = json.dumps(asdict(holder)).encode() if holder else b""
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, text, 0)
            os.fsync(self._descriptor)
        except OSError as error:
            raise resource_error(error, self._path, needed=len(text)) from error

    def release(self) -> None:
        """Give the folder back; the empty file stays, because removing it would be a race."""
        if self._descriptor >= 0:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _myself() -> Holder:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    created = psutil.Process().create_time()
    return Holder(os.getpid(), socket.gethostname(), created, now)
