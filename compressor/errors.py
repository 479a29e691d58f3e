"""Every failure a user can cause or meet, with its exit code.

    CompressError                 1   our bug, when nothing narrower fits
    ├── UsageError                2   flags and arguments
    ├── RecipeError               3   the recipe (also: recipe and model do not fit together)
    ├── CheckpointError           4   checkpoint, tokenizer or config invalid or unsafe
    ├── DataError                 5   calibration or evaluation data
    ├── ResourceError             6   disk, memory, permissions
    ├── NumericError              7   non-finite numbers
    ├── GateError                 7   the quality gate did not pass (output kept aside)
    ├── OutputError               8   output exists or is locked
    ├── HubError                  9   network, hub, offline miss
    ├── UnsupportedError         10   architecture, scheme, device, version
    ├── VerificationError        11   what was written is not what was meant
    └── Interrupted              75   stopped safely; run again to resume (130 and 143 on signals)

An error carries the id of the fault it stands for, so that documentation, tests and people can
speak about the same thing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Where:
    """The place a message points at; empty fields are left out."""

    file: str = ""
    line: int | None = None
    column: int | None = None
    key: str = ""
    tensor: str = ""

    def __str__(self) -> str:
        place = ":".join(str(p) for p in (self.file, self.line, self.column) if p not in ("", None))
        notes = [f"key {self.key}"] if self.key else []
        notes += [f"tensor {printable(self.tensor)}"] if self.tensor else []
        return f"{place}  ({', '.join(notes)})" if place and notes else place or ", ".join(notes)


def printable(text: str, limit: int = 120) -> str:
    """Escape control and direction-changing characters: a hostile name cannot forge output."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


class CompressError(Exception):
    """An expected failure: one clear message, a fault id and an exit code, never a traceback.

    Args:
        message: one sentence, without the program's name.
        code: fault id such as "CK05".
        where: file, line, column, key or tensor the message is about.
        why: what this means for the user's data.
        fix: what to do next.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        where: Where | None = None,
        why: str = "",
        fix: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.where = where or Where()
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        lines = [f"error[{self.code}]: {self.message}" if self.code else f"error: {self.message}"]
        lines += [f"  --> {self.where}"] if str(self.where) else []
        lines += [f"  why: {self.why}"] if self.why else []
        lines += [f"  fix: {self.fix}"] if self.fix else []
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The one object that `--json` prints."""
        where = self.where
        body = {
            "code": self.code,
            "exit": self.exit_code,
            "message": self.message,
            "file": where.file or None,
            "line": where.line,
            "column": where.column,
            "key": where.key or None,
            "tensor": where.tensor or None,
            "why": self.why or None,
            "hint": self.fix or None,
        }
        return {"error": body}


class UsageError(CompressError):
    """Flags or arguments that make no sense (exit 2)."""

    exit_code = 2


class RecipeError(CompressError):
    """The recipe is wrong, or does not fit this model (exit 3)."""

    exit_code = 3


class CheckpointError(CompressError):
    """The checkpoint, tokenizer or config is invalid or unsafe (exit 4)."""

    exit_code = 4


class DataError(CompressError):
    """Calibration, training or evaluation data is unusable (exit 5)."""

    exit_code = 5


class ResourceError(CompressError):
    """Disk, memory or permissions are missing (exit 6)."""

    exit_code = 6


class NumericError(CompressError):
    """A computation left the finite numbers (exit 7)."""

    exit_code = 7


class GateError(CompressError):
    """The quality gate did not pass; the output is kept aside (exit 7)."""

    exit_code = 7


class OutputError(CompressError):
    """The output exists already or is locked by another run (exit 8)."""

    exit_code = 8


class HubError(CompressError):
    """The hub could not be reached, or a file is not in the offline cache (exit 9)."""

    exit_code = 9


class UnsupportedError(CompressError):
    """Architecture, scheme, device or version outside of what is supported (exit 10)."""

    exit_code = 10


class VerificationError(CompressError):
    """What lies on disk is not what was meant to be written (exit 11)."""

    exit_code = 11


class Interrupted(CompressError):
    """The run stopped safely and can be resumed (exit 75, or 130/143 when a signal asked)."""

    exit_code = 75

    def __init__(self, message: str, *, signal: int | None = None, fix: str = "") -> None:
        super().__init__(message, fix=fix)
        self.signal = signal
