"""Data faults CA01-CA16: builders that write a bad source into a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compressor.errors import CheckpointError, CompressError, DataError, HubError
from tests.faults.row import Row

LONG = "for index, value in enumerate(values): total += index * value. "


def good(count: int = 8) -> list[str]:
    """JSON lines with distinct texts, each long enough for a row of 16 tokens."""
    return [json.dumps({"text": f"{i} {LONG * 3}"}) for i in range(count)]


def lines(*rows: str | bytes, name: str = "data.jsonl") -> Callable[[Path], Path]:
    """Write rows as a file of lines; give its path."""

    def build(folder: Path) -> Path:
        body = b"\n".join(r.encode() if isinstance(r, str) else r for r in rows)
        (folder / name).write_bytes(body + b"\n" * bool(body))
        return folder / name

    return build


def chat(*contents: Any) -> str:
    """One row with a conversation."""
    return json.dumps({"messages": [{"role": "user", "content": c} for c in contents]})


def _row(fault: str, name: str, build: Callable[[Path], Any], *tells: str,
         error: type[CompressError] = DataError) -> Row:  # fmt: skip
    return Row(f"{fault} {name}", build, error, fault, tells)


ROWS = (
    _row("CA01", "no such file", lambda f: f / "gone.jsonl", "gone.jsonl", "no such file"),
    _row("CA01", "file of another kind", lines("x", name="data.csv"), ".csv", ".parquet"),
    _row("CA01", "relative path to nothing", lambda f: "./y.txt", "y.txt", "reference-eval"),
    _row("CA01", "self without a model", lambda f: "self", "no model", "calibrate"),
    _row("CA02", "empty file", lines(), "no row is left", "0 documents"),
    _row("CA02", "all too short", lines('{"text":"a"}', '{"text":""}'), "2 documents", "1 empty",
         "1 shorter than 16 tokens", "packed"),
    _row("CA03", "far too few rows", lines(*good(1)), "1 of 8", "25%"),
    _row("CA05", "no object", lines('["a"]'), "data.jsonl:1", "a list"),
    _row("CA05", "bad JSON in line 7", lines(*good(6), '{"text": oops}'), "data.jsonl:7:10"),
    _row("CA05", "a number", lines("7"), "data.jsonl:1", "int"),
    _row("CA05", "100k deep", lines("[" * 100_000), "RecursionError"),
    _row("CA05", "parquet of nonsense", lines("PAR1", name="x.parquet"), "x.parquet"),
    _row("CA05", "bad .json", lines('[{"text": "a"},\n oops]', name="x.json"), "x.json:2:2"),
    _row("CA06", "other column", lines('{"body": "x", "id": 1}'), "'text'", "body, id",
         "text_column"),
    _row("CA06", "number in the column", lines('{"text": 5}'), "holds a int"),
    _row("CA07", "not UTF-8", lines(good()[0], b'{"text": "\xff"}'), "data.jsonl:2", "0xff"),
    _row("CA07", "NUL", lines('{"text": "a\\u0000b"}'), "data.jsonl:1", "NUL"),
    _row("CA07", "lone surrogate", lines('{"text": "a\\ud800b"}'), "surrogate"),
    _row("CA07", "not UTF-8 in a text", lines("a", b"b\xff", name="x.txt"), "x.txt:2"),
    _row("CA13", "a message without content", lines('{"messages": [{"role": "user"}]}'),
         "data.jsonl:1", "content"),
    _row("CA16", "dataset not cached", lambda f: "org/no-such-set", "Cache tried", "hf download",
         error=HubError),
)  # fmt: skip
TEMPLATES = (
    _row("CA13", "template refuses a row", lambda f: "{{ raise_exception('no user') }}",
         "data.jsonl:1", "no user"),
    _row("CK37", "template syntax", lambda f: "hello\n{% for %}", ":2", error=CheckpointError),
    _row("CA13", "reaching for Python's inside",
         lambda f: "{{ ''.__class__.__mro__[1].__subclasses__() }}", "template"),
)  # fmt: skip
