"""The run's log file: UTC times, secrets blacked out."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

from compressor.run_dir.files import resource_error

_SECRET = re.compile(
    r"\b(hf_|sk-|ghp_)[A-Za-z0-9_-]{16,}|(?i:(?<=bearer ))[A-Za-z0-9._~+/-]{16,}=*"
)


def redact(text: str) -> str:
    """Replace access tokens by `***`."""
    return _SECRET.sub("***", text)


class LogFormatter(logging.Formatter):
    """`2026-01-31T12:00:00Z WARNING compressor.run_dir: text`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%SZ")
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def log_to(path: Path) -> logging.Handler:
    """Send everything that `compressor` logs to a file as well; remove with `stop_logging`."""
    try:
        handler = logging.FileHandler(path, encoding="utf-8", delay=False)
    except OSError as error:
        raise resource_error(error, path) from error
    handler.setFormatter(LogFormatter())
    logging.getLogger("compressor").addHandler(handler)
    return handler


def stop_logging(handler: logging.Handler) -> None:
    """Undo `log_to`."""
    logging.getLogger("compressor").removeHandler(handler)
    handler.close()
