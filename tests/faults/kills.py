"""Damage that kills, crashes and people do to a run folder between two runs (KI12-KI14)."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNIT = "units/01-quantize/block-0000.safetensors"


@dataclass(frozen=True)
class Damage:
    """What happens to the run folder, and a piece of the warning that the resumed run logs."""

    name: str
    do: Callable[[Path], Any]
    warns: str = ""


def flip(name: str) -> Callable[[Path], None]:
    """Flip one bit in the last byte of a file."""

    def do(run: Path) -> None:
        data = bytearray((run / name).read_bytes())
        data[-1] ^= 1
        (run / name).write_bytes(data)

    return do


def cut(name: str, size: int) -> Callable[[Path], None]:
    """Keep only the first bytes of a file (negative: drop so many)."""
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:size])


def forged(run: Path) -> None:
    """Change what a journal line says, but not its chain."""
    lines = (run / "journal.jsonl").read_text().splitlines()
    body = json.loads(lines[3])
    body["meta"] = {"formats": {}, "masked": [], "facts": {}}
    lines[3] = json.dumps(body)
    (run / "journal.jsonl").write_text("\n".join(lines) + "\n")


def leftovers(run: Path) -> None:
    """What killed writers leave behind."""
    (run / "units/01-quantize/block-0001.safetensors.tmp").write_bytes(b"half")
    (run / "artifact").mkdir(exist_ok=True)
    (run / "artifact" / "model-00001-of-00009.safetensors").write_bytes(b"half")


DAMAGES = (
    Damage("KI14 bit flip in a unit", flip(UNIT), "its file has changed"),
    Damage("KI14 unit cut short", cut(UNIT, 100), "its file has changed"),
    Damage("KI14 unit missing", lambda run: (run / UNIT).unlink(), "its file is missing"),
    Damage("KI14 last journal line torn", cut("journal.jsonl", -20), "cut by a kill"),
    Damage("KI14 journal emptied", cut("journal.jsonl", 0)),
    Damage("KI14 journal line forged", forged, "not usable"),
    Damage("KI05 leftovers of killed writers", leftovers, "left by a killed run"),
    Damage("KI12 lock of a process that is gone",
           lambda run: (run / "lock").write_text(json.dumps(
               {"pid": 2**22 - 3, "host": socket.gethostname(), "created": 1.0,
                "started_utc": "2026-01-01T00:00:00+00:00"})), "took over the lock"),
)  # fmt: skip
