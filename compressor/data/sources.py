"""From a source to documents: one text, or one conversation, at a time and in a fixed order.

Every row keeps its place (file and line, or row number), so that a bad one can be named. A row is
bad when it is not JSON (CA05), misses the text column (CA06) or is not clean text (CA07).
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compressor import reference_model
from compressor.data.hub_sets import hub_rows
from compressor.errors import DataError, Where, printable
from compressor.recipe import DataConfig

log = logging.getLogger("compressor.data")

SHIPPED = ("reference", "reference-eval")  # texts that come with the program
SHUFFLE_BUFFER = 10_000  # documents kept in memory while shuffling
PARAGRAPH_BYTES = 1 << 20  # a text file without blank lines is cut at a line end after this much

Raw = tuple[Where, Any]


@dataclass(frozen=True, slots=True)
class Document:
    """One text, or one conversation (`messages`: dicts with role and content); where it stands."""

    place: Where
    text: str
    messages: tuple[Mapping[str, Any], ...] = ()


@dataclass(slots=True)
class Tally:
    """How many documents were read, and how many were left out for which reason."""

    documents: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    bad: list[DataError] = field(default_factory=list)

    def leave_out(self, reason: str) -> None:
        """Count one document that a filter takes away."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def bad_row(self, error: DataError, allowed: int) -> None:
        """Count one bad row; raise its error when more than `allowed` are bad."""
        self.bad.append(error)
        if len(self.bad) > allowed:
            skipped = f" ({allowed} bad rows were skipped before)" if allowed else ""
            error.fix = f"{error.fix}; or allow some: skip_bad_rows{skipped}"
            raise error

    def __str__(self) -> str:
        parts = [f"{self.documents} documents read"]
        parts += [f"{count} {reason}" for reason, count in self.left_out.items()]
        parts += [f"{len(self.bad)} bad rows skipped"] if self.bad else []
        return ", ".join(parts)


def load_texts(config: DataConfig) -> Iterator[str]:
    """The texts of a source in order; of a conversation the contents, one a line.

    Raises:
        DataError: CA01 (no such source), CA05, CA06, CA07 (bad rows beyond `skip_bad_rows`).
        HubError: CA16 (a dataset that is neither cached nor reachable).
    """
    for document in load_documents(config, Tally()):
        yield document.text


def load_documents(config: DataConfig, tally: Tally) -> Iterator[Document]:
    """Documents in the file's order, or shuffled when `config.seed` is a number."""
    documents = _documents(config, tally)
    return documents if config.seed is None else _shuffled(documents, config.seed)


def _documents(config: DataConfig, tally: Tally) -> Iterator[Document]:
    for place, raw in raw_rows(config):
        tally.documents += 1
        try:
            document = _parse_row(place, raw, config)
        except DataError as error:
            tally.bad_row(error, config.skip_bad_rows)
            continue
        if document.text.strip():
            yield document
        else:
            tally.leave_out("empty")


def _shuffled(documents: Iterable[Document], seed: int) -> Iterator[Document]:
    """A shuffle through a buffer: exact for up to SHUFFLE_BUFFER documents, streaming above."""
    chance, buffer = random.Random(seed), list[Document]()
    for document in documents:
        if len(buffer) < SHUFFLE_BUFFER:
            buffer.append(document)
            continue
        place = chance.randrange(SHUFFLE_BUFFER)
        buffer[place], document = document, buffer[place]
        yield document
    chance.shuffle(buffer)
    yield from buffer


def raw_rows(config: DataConfig) -> Iterator[Raw]:
    """(place, row) pairs: bytes of a text or of a JSON line, or an already parsed row."""
    path = _file_of(config)
    if path is None:
        return hub_rows(config.source, config.split)
    if config.split is not None and config.source not in SHIPPED:
        log.warning("%s is one file, `split: %s` chooses nothing of it", path.name, config.split)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"files of type {path.suffix or '(none)'!r} are not read",
            code="CA01",
            where=Where(file=path.name),
            fix=f"give one of {', '.join(READERS)}",
        )
    return reader(path)


def _file_of(config: DataConfig) -> Path | None:
    """The local file behind a source, or None for a name that `datasets` must resolve."""
    source = config.source
    if source in SHIPPED:
        held_out = source == "reference-eval" or config.split in ("evaluation", "test")
        path = reference_model.text_path("evaluation" if held_out else "calibration")
    else:
        path = Path(source).expanduser()
    if path.is_file():
        return path
    looks_local = source.startswith((".", "/", "~")) or path.suffix.lower() in READERS
    if source.startswith("reference") or (looks_local and not path.is_dir()):
        kind = "not a regular file" if path.exists() else "no such file"
        raise DataError(
            f"{kind}: {printable(str(source))}",
            code="CA01",
            where=Where(file=path.name),
            why="Without text nothing can be measured.",
            fix=f"give a {', '.join(READERS)} file, a datasets name, or: reference, reference-eval",
        )
    return None


def _text_rows(path: Path) -> Iterator[Raw]:
    """Paragraphs: runs of lines between blank lines."""
    lines, first, size = list[bytes](), 1, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            blank = not line.strip()
            if lines and (blank or size > PARAGRAPH_BYTES):
                yield Where(file=path.name, line=first), b"".join(lines)
                lines, size = [], 0
            if not blank:
                first = first if lines else number
                lines.append(line)
                size += len(line)
    if lines:
        yield Where(file=path.name, line=first), b"".join(lines)


def _line_rows(path: Path) -> Iterator[Raw]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield Where(file=path.name, line=number), line


def _json_rows(path: Path) -> Iterator[Raw]:
    """A list of rows, an object holding one list, or JSON lines under a .json name."""
    raw = path.read_bytes()
    try:
        body = _parse_json(_decode(raw, Where(file=path.name)), Where(file=path.name))
    except DataError:
        if raw.lstrip()[:1] != b"{" or b"\n" not in raw.strip():
            raise
        yield from _line_rows(path)
        return
    if isinstance(body, dict):
        lists = [v for v in body.values() if isinstance(v, list)]
        body = lists[0] if len(lists) == 1 else [body]
    for number, row in enumerate(body if isinstance(body, list) else [body], start=1):
        yield Where(file=path.name, key=f"row {number}"), row


def _parquet_rows(path: Path) -> Iterator[Raw]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield Where(file=path.name, key=f"row {number}"), row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"not a readable parquet file ({printable(str(error))})",
            code="CA05",
            where=Where(file=path.name),
            fix="write or download the file again",
        ) from None


READERS: dict[str, Callable[[Path], Iterator[Raw]]] = {
    ".txt": _text_rows,
    ".jsonl": _line_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
}


def _parse_row(place: Where, raw: Any, config: DataConfig) -> Document:
    if isinstance(raw, bytes):
        text = _decode(raw, place)
        if Path(place.file).suffix.lower() == ".txt":
            return Document(place, _clean(text.rstrip("\n"), place))
        raw = _parse_json(text, place)
    if isinstance(raw, str):
        return Document(place, _clean(raw, place))
    if not isinstance(raw, Mapping):
        raise DataError(
            f"a row must be an object, this is a {type(raw).__name__}",
            code="CA05",
            where=place,
            fix='write rows as {"text": "..."}',
        )
    return _from_columns(place, raw, config.text_column)


def _from_columns(place: Where, row: Mapping[str, Any], column: str) -> Document:
    value = row.get(column)
    if isinstance(value, str):
        return Document(place, _clean(value, place))
    name = column if isinstance(value, list) else "messages"
    messages = row.get(name)
    if not isinstance(messages, list):
        have = ", ".join(printable(str(k), 40) for k in list(row)[:12]) or "none"
        kind = f" holding text (it holds a {type(value).__name__})" if column in row else ""
        raise DataError(
            f"no column {column!r}{kind}; columns here: {have}",
            code="CA06",
            where=place,
            fix="name the right one: text_column",
        )
    if not all(isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in messages):
        raise DataError(
            f"{name} must be a list of objects with role and content",
            code="CA13",
            where=place,
            fix="mend or remove this row",
        )
    text = "\n".join(m["content"] for m in messages)
    return Document(place, _clean(text, place), tuple(messages))


def _decode(raw: bytes, place: Where) -> str:
    try:
        return raw.decode("utf-8-sig" if place.line in (None, 1) else "utf-8")
    except UnicodeDecodeError as error:
        line = (place.line or 1) + raw.count(b"\n", 0, error.start)
        raise _unclean(f"not UTF-8 (byte 0x{raw[error.start]:02x})", place, line) from None


def _clean(text: str, place: Where) -> str:
    if "\0" in text:
        raise _unclean("the text holds a NUL character", place, place.line)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _unclean("the text holds half of a surrogate pair", place, place.line) from None
    return text


def _unclean(message: str, place: Where, line: int | None) -> DataError:
    return DataError(
        message,
        code="CA07",
        where=Where(file=place.file, line=line, key=place.key),
        why="Such bytes become tokens that no text has.",
        fix="convert the file to clean UTF-8",
    )


def _parse_json(text: str, place: Where) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = (place.line or 1) + error.lineno - 1
        where = Where(file=place.file, line=line, column=error.colno)
        message = f"not JSON: {error.msg}"
    except (RecursionError, ValueError) as error:
        where, message = place, f"not usable JSON ({error.__class__.__name__})"
    raise DataError(message, code="CA05", where=where, fix="mend or remove this row")
