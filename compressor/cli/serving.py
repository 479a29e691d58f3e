"""`compress serve | generate | bench`: run an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli import flags

Folder = Annotated[Path, typer.Argument(help="Folder of a model or an artifact.")]


def serve(path: Folder) -> None:
    """(filled below)"""


def generate(path: Folder, as_json: flags.AsJson = False) -> None:
    """(filled below)"""


def bench(path: Folder, as_json: flags.AsJson = False) -> None:
    """(filled below)"""
