"""Everything people see: results on stdout, progress and errors on stderr.

With `--json`, stdout carries exactly one JSON object and progress comes as JSON lines on stderr.
Progress arrives through the logger `compressor.progress` (records with an `event` dict), so that
no stage knows who listens: a bar on a terminal, plain lines in a pipe, JSON for programs.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from compressor.errors import CompressError, printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PLAIN_INTERVAL_S = 2.0

_QUIET_VARIABLES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_QUIET_LOGGERS = ("transformers", "huggingface_hub", "datasets", "httpx", "filelock", "lm_eval")


def show(text: str = "") -> None:
    """One line of a result for people."""
    sys.stdout.write(text + "\n")


def show_text(text: str) -> None:
    """Text from a model: lines and tabs stay, control characters cannot reach the terminal."""
    show("".join(c if c in "\n\t" or c.isprintable() else printable(c) for c in text))


def show_json(value: Any) -> None:
    """The one JSON object of a command with `--json`; non-finite numbers become null."""
    text = json.dumps(_finite(value), indent=1, default=str, ensure_ascii=False, allow_nan=False)
    sys.stdout.write(text + "\n")


def show_table(rows: Sequence[Mapping[str, Any]], *, title: str = "") -> None:
    """Rows with the same keys as a table; the keys are the heads of the columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left")
    for name in rows[0] if rows else []:
        is_number = all(isinstance(row.get(name), int | float) for row in rows)
        table.add_column(str(name), justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(_cell(value), 400)) for value in row.values()))
    wide = None if sys.stdout.isatty() else 160
    Console(file=sys.stdout, width=wide, markup=False, highlight=False).print(table)


def show_facts(facts: Mapping[str, Any]) -> None:
    """`name  value` lines, aligned."""
    width = max((len(str(name)) for name in facts), default=0)
    for name, value in facts.items():
        show(f"{name!s:{width}}  {printable(_cell(value), 2000)}")


def say(text: str) -> None:
    """One line about what is going on, on stderr."""
    sys.stderr.write(text + "\n")


def show_error(error: CompressError, *, as_json: bool, run_dir: str = "") -> None:
    """The message on stderr; with `as_json` also the error object on stdout."""
    say(str(error))
    if as_json:
        body = error.as_json()
        body["error"]["run_dir"] = run_dir or None
        show_json(body)


@contextmanager
def session(*, as_json: bool = False) -> Iterator[None]:
    """Logging, progress and quiet libraries for the length of one command."""
    for name, value in _QUIET_VARIABLES.items():
        os.environ.setdefault(name, value)
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    ours, handler = logging.getLogger("compressor"), _handler(as_json)
    level, propagate = ours.level, ours.propagate
    ours.setLevel(logging.INFO)
    ours.propagate = False
    ours.addHandler(handler)
    try:
        with warnings.catch_warnings():
            noise = "(transformers|torch)\\..*"
            warnings.filterwarnings("ignore", category=FutureWarning, module=noise)
            yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)
        ours.propagate = propagate
        handler.close()


def _handler(as_json: bool) -> logging.Handler:
    if as_json:
        return JsonLines()
    return Bars() if sys.stderr.isatty() else PlainLines()


def event_of(record: logging.LogRecord) -> dict[str, Any] | None:
    """The progress event that a log record carries, if it carries one."""
    event = getattr(record, "event", None)
    return event if isinstance(event, dict) else None


def _message(record: logging.LogRecord) -> str:
    """`warning: ...` or, for what is only good to know, `note: ...`."""
    level = "note" if record.levelno <= logging.INFO else record.levelname.lower()
    return f"{level}: {record.getMessage()}"


def phase_of(event: Mapping[str, Any]) -> str:
    """Stage and kind of unit: `01-quantize block` for its unit `block-0003`."""
    unit = str(event.get("unit", "")).rstrip("0123456789").rstrip("-")
    return f"{event.get('stage', '')} {printable(unit)}".strip()


class JsonLines(logging.Handler):
    """Progress and messages as JSON lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        event = event_of(record) or {"level": record.levelname, "message": record.getMessage()}
        sys.stderr.write(json.dumps(_finite({**event, "rss_bytes": rss_bytes()}), default=str))
        sys.stderr.write("\n")


class PlainLines(logging.Handler):
    """Progress as lines, at most one every two seconds and always the last of a stage."""

    def __init__(self) -> None:
        super().__init__()
        self._phase, self._since, self._last, self._last_event = "", 0.0, 0.0, 0.0

    def emit(self, record: logging.LogRecord) -> None:
        event = event_of(record)
        if event is None:
            say(_message(record))
            return
        now = time.monotonic()
        if phase_of(event) != self._phase:
            first_took = now - self._last_event if self._last_event else 0.0
            self._phase, self._since, self._last = phase_of(event), now - first_took, 0.0
        self._last_event = now
        is_last = event.get("index") == event.get("total")
        if is_last or now - self._last >= PLAIN_INTERVAL_S:
            self._last = now
            say(describe(event, elapsed_s=now - self._since))


class Bars(logging.Handler):
    """One live bar a stage, with what is left, the loss and the memory in use."""

    def __init__(self) -> None:
        super().__init__()
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def emit(self, record: logging.LogRecord) -> None:
        event = event_of(record)
        if event is not None:
            self._update(event)
        elif self._progress is None:
            say(_message(record))
        else:
            self._progress.console.print(_message(record), markup=False, highlight=False)

    def _update(self, event: Mapping[str, Any]) -> None:
        progress = self._progress = self._progress or _new_bars()
        stage = phase_of(event)
        if stage not in self._tasks:
            self._tasks[stage] = progress.add_task(stage, total=None, note="")
        note = f"{event.get('unit', '')}{_extras(event)}"
        total, index = event.get("total"), event.get("index", 0)
        progress.update(self._tasks[stage], total=total, completed=index, note=note)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        super().close()


def _new_bars() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        Remaining(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
    )
    progress.start()
    return progress


def describe(event: Mapping[str, Any], *, elapsed_s: float) -> str:
    """`01-quantize  block-0003  4/9  loss 0.012  0.6 GiB  12 s left`."""
    index, total = event.get("index"), event.get("total")
    parts = [str(event.get("stage", "")), printable(str(event.get("unit", "")))]
    if isinstance(index, int) and isinstance(total, int):
        parts.append(f"{index}/{total}")
    parts.append(_extras(event).strip())
    if isinstance(index, int) and isinstance(total, int) and 0 < index < total and elapsed_s > 1:
        parts.append(f"{elapsed_s / index * (total - index):.0f} s left")
    return "  ".join(part for part in parts if part)


def _extras(event: Mapping[str, Any]) -> str:
    loss = event.get("loss")
    loss_text = f"  loss {loss:.4g}" if isinstance(loss, int | float) else ""
    return f"{loss_text}  {rss_bytes() / 2**30:.1f} GiB"


def rss_bytes() -> int:
    """Memory that this process holds now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    is_odd = isinstance(value, float) and not (-float("inf") < value < float("inf"))
    return None if is_odd else value
