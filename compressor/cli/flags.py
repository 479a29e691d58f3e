"""Flags that several commands share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe key.")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the result.")]
RunFolder = Annotated[Path | None, typer.Option("--run-dir", help="Where unfinished work lies.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Forget unfinished work.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
BreakLock = Annotated[bool, typer.Option("--break-lock", help="Take another host's lock.")]
RecipeOut = Annotated[
    Path | None, typer.Option("--recipe-out", help="Write the recipe that the flags mean and stop.")
]
Data = Annotated[str | None, typer.Option("--data", help="Text file, dataset name or `reference`.")]
NumSamples = Annotated[int | None, typer.Option("--num-samples", help="Rows of tokens.")]
SeqLen = Annotated[int | None, typer.Option("--seq-len", help="Tokens a row.")]
Seed = Annotated[int | None, typer.Option("--seed")]
