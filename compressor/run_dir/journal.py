r"""The journal: one line for every finished unit, in the order in which they were finished.

Each line carries a digest that ties it to the line before it in the same stage:

    chain_0 = SHA-256(identity, stage)          chain_k = SHA-256(chain_{k-1}, record_k)

where a record holds stage, unit, file name, file digest and meta, but no times; so two runs of
the same recipe on the same CPU end with the same chain. Lines are only ever appended. A unit that
is done again takes its old place and drops the units after it. A torn last line (a kill while
writing) is cut off; a line whose chain does not fit is not used, nor what follows in its stage.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.run_dir.files import resource_error

log = logging.getLogger("compressor.run_dir")


@dataclass(frozen=True, slots=True)
class Record:
    """A finished unit; `file` is relative to the run folder, empty for a unit without tensors."""

    stage: str
    unit: str
    file: str
    sha256: str
    meta: dict[str, Any]

    def chained(self, previous: str) -> str:
        """The chain digest after this record."""
        fields = [previous, self.stage, self.unit, self.file, self.sha256, self.meta]
        return hashlib.sha256(canonical(fields)).hexdigest()


def canonical(value: Any) -> bytes:
    """JSON bytes that depend on the value only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


class Journal:
    """The finished units of a run: in memory by stage and unit, on disk as appended lines."""

    def __init__(self, path: Path, *, identity: Mapping[str, str]) -> None:
        self._path = path
        self._seed = hashlib.sha256(canonical(dict(identity))).hexdigest()
        self._stages: dict[str, list[tuple[Record, str]]] = {}
        if path.exists():
            self._read()

    def find(self, stage: str, unit: str) -> Record | None:
        """The record of a finished unit."""
        return next((r for r, _ in self._stages.get(stage, []) if r.unit == unit), None)

    def units(self, stage: str) -> list[str]:
        """Finished units of a stage, in order."""
        return [record.unit for record, _ in self._stages.get(stage, [])]

    def chain(self, stage: str) -> str:
        """The digest that stands for everything done in a stage so far."""
        entries = self._stages.get(stage, [])
        first = hashlib.sha256(canonical([self._seed, stage])).hexdigest()
        return entries[-1][1] if entries else first

    def drop_from(self, stage: str, unit: str) -> None:
        """Forget a unit and the units after it in its stage; they will be done again."""
        units = self.units(stage)
        if unit in units:
            del self._stages[stage][units.index(unit) :]

    def append(self, record: Record, *, time_s: float) -> None:
        """Write a line and flush it to the disk; on failure the journal is as it was before."""
        self.drop_from(record.stage, record.unit)
        chain = record.chained(self.chain(record.stage))
        body = {name: getattr(record, name) for name in Record.__slots__}
        body |= {"chain": chain, "time_s": round(time_s, 3)}
        self._write(json.dumps(body, ensure_ascii=True).encode() + b"\n")
        self._stages.setdefault(record.stage, []).append((record, chain))

    def _write(self, line: bytes) -> None:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            with open(os.open(self._path, flags, 0o666), "ab", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                try:
                    if file.write(line) != len(line):
                        raise OSError(28, os.strerror(28))
                    os.fsync(file.fileno())
                except OSError:
                    os.ftruncate(file.fileno(), size)
                    raise
        except OSError as error:
            raise resource_error(error, self._path, needed=len(line)) from error

    def _read(self) -> None:
        try:
            data = self._path.read_bytes()
        except OSError as error:
            raise resource_error(error, self._path) from error
        complete = data[: data.rfind(b"\n") + 1]
        if len(complete) < len(data):
            log.warning("the last line of the journal was cut by a kill; it is dropped")
            os.truncate(self._path, len(complete))
        for number, line in enumerate(complete.splitlines(), start=1):
            self._accept(line, number)

    def _accept(self, line: bytes, number: int) -> None:
        try:
            body = json.loads(line)
            record = Record(*(body[name] for name in Record.__slots__))
            self.drop_from(record.stage, record.unit)
            if record.chained(self.chain(record.stage)) != body["chain"]:
                raise ValueError("the chain does not fit")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            log.warning("journal line %d is not usable (%s); its unit is done again", number, error)
            return
        self._stages.setdefault(record.stage, []).append((record, body["chain"]))
