"""`compress eval BASE ARTIFACT`: how far is the artifact from the model it came from?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compressor.cli import flags
from compressor.cli.single import pairs, recipe_from_flags, to_yaml

if TYPE_CHECKING:
    from compressor.recipe import EvaluateConfig


def evaluate(
    base: Annotated[str, typer.Argument(help="The original: folder, hub id or `reference`.")],
    artifact: Annotated[Path, typer.Argument(help="Folder of the compressed model.")],
    tasks: Annotated[list[str] | None, typer.Option(help="Task names; repeat or comma.")] = None,
    task_limit: Annotated[int | None, typer.Option(help="Items a task.")] = None,
    gate: Annotated[
        list[str] | None, typer.Option(help="max_kl=0.05 and the like; a miss exits with 7.")
    ] = None,
    data: flags.Data = None,
    num_samples: flags.NumSamples = None,
    seq_len: flags.SeqLen = None,
    output: flags.Output = None,
    device: flags.Device = "auto",
    as_json: flags.AsJson = False,
) -> None:
    """Compare an artifact with its original on the same tokens, and write a report."""
    from compressor import console

    rows = {"source": data, "num_samples": num_samples, "seq_len": seq_len}
    names = [name for item in tasks or [] for name in item.split(",") if name]
    stage: dict[str, Any] = {"data": rows, "tasks": names, "task_limit": task_limit}
    config = evaluate_config(stage | {"gate": pairs(gate, "--gate")})
    with console.session(as_json=as_json):
        from compressor.modeling.device import choose_device
        from compressor.stages.evaluate import evaluate_pair

        folder = output or Path(f"{artifact.name}-eval")
        result = evaluate_pair(base, artifact, config, folder, device=choose_device(device))
    if as_json:
        console.show_json(result)
    else:
        console.show_facts({name: item for name, item in result.items() if _is_plain(item)})


def evaluate_config(stage: dict[str, Any]) -> EvaluateConfig:
    """The evaluate stage that the flags mean; a wrong flag is a usage error."""
    from compressor.recipe import EvaluateConfig

    given = _without_none({"kind": "evaluate", **stage})
    recipe = {
        "name": "eval",
        "model": {"path": "reference"},
        "output": "none",
        "stages": [{"kind": "pack"}, given],
    }
    config = recipe_from_flags(to_yaml(recipe), []).stages[1]
    assert isinstance(config, EvaluateConfig)
    return config


def _without_none(items: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_none(item) if isinstance(item, dict) else item
        for name, item in items.items()
        if item is not None
    }


def _is_plain(value: Any) -> bool:
    return not isinstance(value, dict | list)
