"""Does the text that judges a model stand in the text that made it?

Two texts share a passage if they have the same 50 characters in a row, counting only letters and
digits and ignoring case (the rule of the GPT-4 report, OpenAI 2023, appendix C: it knows no
tokenizer and no word boundaries). A row counts as contaminated if at least half of its windows
stand in the calibration or training text; a single one may be a common phrase.

One window in eight is kept, chosen by its own checksum, so both sides keep the same ones.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

WINDOW = 50  # characters
KEPT = 8  # one window in so many
CONTAMINATED = 0.5  # share of a row's windows
_IGNORED = re.compile(r"[\W_]+")


@dataclass(frozen=True, slots=True)
class Contamination:
    """What evaluation rows share with the text that calibrated or trained the model.

    Attributes:
        num_rows: evaluation rows.
        identical_rows: those that are letter for letter a calibration row.
        contaminated_rows: those with at least half of their windows in the calibration text.
        shared_windows: share of all windows.
        examples: numbers of the first contaminated rows.
    """

    num_rows: int
    identical_rows: int
    contaminated_rows: int
    shared_windows: float
    examples: tuple[int, ...]

    @property
    def share(self) -> float:
        """Contaminated rows in all rows."""
        return self.contaminated_rows / max(self.num_rows, 1)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"share": self.share, "examples": list(self.examples)}


def contamination(seen: Iterable[str], judged: Sequence[str]) -> Contamination:
    """Compare texts of evaluation rows (`judged`) with those of calibration or training rows."""
    known: set[str] = set()
    whole: set[str] = set()
    for text in seen:
        letters = plain(text)
        whole.add(letters)
        known.update(windows(letters))
    found, total, identical, bad = 0, 0, 0, []
    for row, text in enumerate(judged):
        letters = plain(text)
        mine = windows(letters)
        shared = sum(w in known for w in mine)
        found, total = found + shared, total + len(mine)
        same = bool(letters) and letters in whole
        identical += same
        if same or (mine and shared >= CONTAMINATED * len(mine)):
            bad.append(row)
    share = found / max(total, 1)
    return Contamination(len(judged), identical, len(bad), share, tuple(bad[:10]))


def plain(text: str) -> str:
    """Letters and digits alone, in lower case."""
    return _IGNORED.sub("", text).casefold()


def windows(letters: str) -> list[str]:
    """The kept windows of a text; all of it if it is shorter than one."""
    if len(letters) <= WINDOW:
        return [letters] if letters else []
    ends = range(WINDOW, len(letters) + 1)
    every = (letters[end - WINDOW : end] for end in ends)
    return [w for w in every if zlib.crc32(w.encode("utf-8", "replace")) % KEPT == 0]
