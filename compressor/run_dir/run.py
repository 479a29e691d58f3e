"""The run folder: everything a killed run needs to go on where it was.

RUN/run.json          what this run is a run of (digests of recipe, model, data, version)
RUN/lock              who is working here
RUN/journal.jsonl     one line for every finished unit
RUN/units/01-quantize/block-0007.safetensors
RUN/artifact/         the output while it is being built
RUN/log.jsonl  RUN/log.txt
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from compressor.errors import Interrupted, OutputError, RecipeError, ResourceError, Where
from compressor.run_dir.files import resource_error, sha256_file, sweep, write_atomic
from compressor.run_dir.journal import Journal, Record
from compressor.run_dir.lock import FolderLock
from compressor.run_dir.log import log_to, redact, stop_logging
from compressor.run_dir.signals import StopSignals

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("compressor.run_dir")
progress_log = logging.getLogger("compressor.progress")

_UNIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_OURS = ("run.json", "lock", "journal.jsonl", "units", "artifact", "log.jsonl", "log.txt", "report")


class RunDir:
    """An open, locked run folder. Use `RunDir.open`, and close it (or use `with`)."""

    def __init__(self, path: Path, lock: FolderLock, identity: Mapping[str, str]) -> None:
        self.path = path
        self.artifact = path / "artifact"
        self._lock = lock
        self._log_handler = log_to(path / "log.txt")
        self.journal = Journal(path / "journal.jsonl", identity=identity)
        self._stop = StopSignals()

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        identity: dict[str, str],
        fresh: bool = False,
        break_lock: bool = False,
    ) -> RunDir:
        """Lock the folder and pick up what is finished in it.

        Args:
            path: the run folder; made if it does not exist.
            identity: name -> digest of everything that decides the result; a folder that was
                begun with another identity is refused (KI13).
            fresh: throw away what an earlier run left.
            break_lock: take the lock even if another host holds it.
        """
        path = path.absolute()
        _make_folder(path)
        lock = FolderLock(path / "lock", break_lock=break_lock)
        try:
            if fresh:
                _clear(path)
            _check_identity(path, identity)
            for file in sweep(path):
                log.warning("removed %s, left by a killed run", file.relative_to(path))
            return cls(path, lock, identity)
        except BaseException:
            lock.release()
            raise

    def stage(self, index: int, kind: str) -> StageRun:
        """The units of the stage at `index` (from 0) of the recipe."""
        return StageRun(self, f"{index:02d}-{kind}")

    def log(self, event: dict[str, Any]) -> None:
        """Append an event with its UTC time to log.jsonl."""
        line = redact(json.dumps({"utc": datetime.now(UTC).isoformat(), **event}, default=str))
        path = self.path / "log.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise resource_error(error, path, needed=len(line)) from error

    @property
    def stop_signal(self) -> int | None:
        """The signal that asked for a stop, if one did."""
        return self._stop.received

    def check_stop(self) -> None:
        """Raise `Interrupted` when a stop was asked for."""
        if self._stop.received is not None:
            raise Interrupted(
                f"stopped; every finished unit is in {self.path}",
                signal=self._stop.received,
                fix="resume: run the same command again",
            )

    def close(self) -> None:
        """Give back the lock, the signals and the log file."""
        self._stop.restore()
        stop_logging(self._log_handler)
        self._lock.release()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class StageRun:
    """The units of one stage. Ask for them in order: `is_done` checks the file it speaks of."""

    def __init__(self, run: RunDir, name: str) -> None:
        self.name = name
        self.path = run.path / "units" / name
        self._run = run
        self._checked: set[str] = set()
        self._since = time.monotonic()

    def part(self, name: str) -> StageRun:
        """A journal of its own for a part of the stage."""
        return StageRun(self._run, f"{self.name}-{name}")

    def is_done(self, unit: str) -> bool:
        """Is the unit finished and its file intact? If not, later units are done again too."""
        record = self._run.journal.find(self.name, unit)
        if record is None:
            return False
        if unit not in self._checked:
            problem = self._problem(record)
            if problem:
                log.warning("%s/%s: %s; it is done again", self.name, unit, problem)
                self._run.journal.drop_from(self.name, unit)
                return False
            self._checked.add(unit)
        return True

    def _problem(self, record: Record) -> str:
        if not record.file:
            return ""
        path = self._run.path / record.file
        if path != self.path / f"{record.unit}.safetensors" or not path.is_file():
            return "its file is missing"
        return "" if sha256_file(path) == record.sha256 else "its file has changed"

    def file(self, unit: str) -> Path:
        """The unit's safetensors file (which exists once the unit is done)."""
        if not _UNIT.fullmatch(unit):
            raise ValueError(f"not a unit name: {unit!r}")
        return self.path / f"{unit}.safetensors"

    def meta(self, unit: str) -> dict[str, Any]:
        """What was committed beside the tensors; raises KeyError for a unit that is not done."""
        record = self._run.journal.find(self.name, unit)
        if record is None:
            raise KeyError(unit)
        return dict(record.meta)

    def commit(self, unit: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
        """Store a finished unit; after this returns it survives a kill or a power loss.

        `meta` must be JSON and hold no times: it is part of the chain digest.
        """
        path = self.file(unit)
        data = _serialized(tensors)
        digest = hashlib.sha256(data).hexdigest()
        write_atomic(path, data)
        self._record(unit, str(path.relative_to(self._run.path)), digest, meta)
        return path

    def commit_meta(self, unit: str, meta: dict[str, Any]) -> None:
        """Store a finished unit that has no tensors."""
        self.file(unit)
        self._record(unit, "", "", meta)

    def _record(self, unit: str, file: str, digest: str, meta: dict[str, Any]) -> None:
        now = time.monotonic()
        plain = json.loads(json.dumps(meta))
        record = Record(self.name, unit, file, digest, plain)
        self._run.journal.append(record, time_s=now - self._since)
        self._since = now
        self._checked.add(unit)

    def progress(self, event: dict[str, Any]) -> None:
        """Tell how far the stage is (unit, index, total, loss, ...); stops here when asked to.

        Raises `Interrupted` after the first Ctrl-C, SIGTERM or SIGHUP.
        """
        full = {"stage": self.name, **event}
        progress_log.info("%s", full, extra={"event": full})
        self._run.check_stop()

    def stop_requested(self) -> bool:
        """Has a signal asked to stop?"""
        return self._run.stop_signal is not None


def _serialized(tensors: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    own, seen = {}, set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    data: bytes = save(own)
    return data


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        names = {item.name for item in path.iterdir()}
    except OSError as error:
        raise resource_error(error, path) from error
    if names and not names & {"run.json", "lock"}:
        raise OutputError(
            "this folder is not a run folder, and it is not empty",
            code="KI11", where=Where(file=str(path)), fix="choose another --run-dir",
        )  # fmt: skip


def _clear(path: Path) -> None:
    for name in _OURS:
        item = path / name
        if item.is_dir():
            shutil.rmtree(item)
        elif name != "lock":
            item.unlink(missing_ok=True)


def _check_identity(path: Path, identity: dict[str, str]) -> None:
    file = path / "run.json"
    text = json.dumps({"identity": identity}, indent=1, sort_keys=True) + "\n"
    try:
        old = dict(json.loads(file.read_bytes())["identity"])
    except FileNotFoundError:
        write_atomic(file, text.encode())
        return
    except (ValueError, KeyError, TypeError) as error:
        raise ResourceError(
            "the run folder's description is damaged",
            code="KI14", where=Where(file=str(file)), fix="start anew with --fresh",
        ) from error  # fmt: skip
    changed = [k for k in sorted({*old, *identity}) if old.get(k) != identity.get(k)]
    if changed:
        raise RecipeError(
            f"the run folder belongs to another run; changed: {', '.join(changed)}",
            code="KI13", where=Where(file=str(path)),
            why="Going on would mix two runs. Nothing was changed.",
            fix="undo the change, choose another --run-dir, or start anew with --fresh",
        )  # fmt: skip
