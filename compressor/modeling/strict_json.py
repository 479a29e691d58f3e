"""JSON that may come from anyone: no duplicate keys, no abyss of brackets, no surprises.

RFC 8259 leaves duplicate keys open, and two readers that choose differently see two different
files: so a duplicate is an error here. Every refusal names the file and the byte.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from compressor.errors import CheckpointError, Where, printable


class DuplicateKeyError(ValueError):
    """Raised inside the parser; carries the key."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKeyError(key)
            seen.add(key)
    return body


def parse_object(raw: bytes, *, file: str, code: str, base: int = 0) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        raw: the bytes, UTF-8.
        file: name for messages.
        code: fault id for everything but duplicate keys (those are CK12).
        base: offset of `raw` in its file, added to the byte offsets in messages.

    Raises:
        CheckpointError: not UTF-8, not JSON, too deep, a duplicate key, or not an object.
    """

    def refuse(what: str, at: int, line: int | None = None) -> NoReturn:
        raise CheckpointError(
            f"{what} at byte {base + at}",
            code=code,
            where=Where(file=file, line=line),
            why="The file is damaged or was not made by a checkpoint writer. Nothing was read on.",
            fix="download that file again",
        )

    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse("not UTF-8", error.start)
    try:
        body = json.loads(text, object_pairs_hook=_pairs)
    except DuplicateKeyError as error:
        raise _duplicate(error.key, raw, file, base) from None
    except RecursionError:
        refuse("brackets nested too deep for a checkpoint file", _depth_offset(raw))
    except json.JSONDecodeError as error:
        at = len(text[: error.pos].encode())
        refuse(f"not JSON ({error.msg})", at, error.lineno if base == 0 else None)
    except ValueError as error:
        refuse(f"not usable JSON ({error})", 0)
    if not isinstance(body, dict):
        refuse(f"a JSON object is needed, this is a {type(body).__name__}", 0)
    return body


def _duplicate(key: str, raw: bytes, file: str, base: int) -> CheckpointError:
    quoted = json.dumps(key).encode()
    second = raw.find(quoted, raw.find(quoted) + 1)
    return CheckpointError(
        f"key {printable(key)!r} appears twice (again at byte {base + max(second, 0)})",
        code="CK12",
        where=Where(file=file, key=printable(key)),
        why="Two readers could choose two different values for it.",
        fix="download that file again, or write it anew with one value per key",
    )


def _depth_offset(raw: bytes, limit: int = 500) -> int:
    depth = 0
    for offset, byte in enumerate(raw[:1_000_000]):
        depth += (byte in b"[{") - (byte in b"]}")
        if depth > limit:
            return offset
    return 0
