"""Where the files that are not code lie: shipped recipes, evaluation suites and tasks.

In a source checkout they are the top-level folders; in an installed wheel they are data files
under `<prefix>/share/compressor`.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Literal

_SOURCE = {"recipes": "recipes", "suites": "eval/suites", "tasks": "eval/tasks"}


def resource_dir(name: Literal["recipes", "suites", "tasks"]) -> Path:
    """The folder of shipped recipes, suites or tasks."""
    source = Path(__file__).resolve().parent.parent / _SOURCE[name]
    if source.is_dir():
        return source
    return Path(sysconfig.get_path("data")) / "share" / "compressor" / name
