"""`compress demo`: the main job on the embedded model, from checkpoint to an answered request."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PROMPT = "def read_lines(path):\n"


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")] = Path(
        "out/demo"
    ),
) -> None:
    """Compress the embedded model, serve the result and send it one request. No network."""
    from compressor import console
    from compressor.cli.recipes import find_recipe
    from compressor.cli.run import Manner, execute, output_override
    from compressor.recipe import load_recipe

    recipe = load_recipe(find_recipe("demo"), output_override(output))
    execute(recipe, Manner(overwrite=True, fresh=True))
    console.show(f"\n{PROMPT}{_ask(output)}\n\nreport: {output / 'report.html'}")


def _ask(folder: Path) -> str:
    from compressor.serve.bench import served
    from compressor.serve.client import Client
    from compressor.serve.options import ServeOptions

    with served(folder, ServeOptions(port=0)) as port:
        body = {"prompt": PROMPT, "max_tokens": 48, "temperature": 0}
        answer = Client("127.0.0.1", port).post("/v1/completions", body)
    return str(answer["choices"][0]["text"])
