"""`compress verify DIR` and `compress inspect DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli import flags

Folder = Annotated[Path, typer.Argument(help="Folder of a model or an artifact.")]


def verify(path: Folder, as_json: flags.AsJson = False) -> None:
    """Reopen an artifact and check every byte against its manifest."""
    from compressor import console
    from compressor.artifact.verify import verify_artifact

    with console.session(as_json=as_json):
        report = verify_artifact(path)
    if as_json:
        console.show_json({"verified": True, **report.as_json()})
    else:
        console.show_facts({"verified": str(path), **report.as_json()})


def inspect(path: Folder, as_json: flags.AsJson = False) -> None:
    """List the tensors of a model folder: formats, shapes, bits and bytes."""
    from compressor import console
    from compressor.artifact.inspect import inspect_artifact

    rows = list(inspect_artifact(path))
    if as_json:
        console.show_json({"rows": rows})
    else:
        console.show_table(rows, title=path.name)
