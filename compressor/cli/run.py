"""`compress run RECIPE` and `compress resume RUN_DIR`."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compressor.cli import flags
from compressor.errors import UsageError, Where

if TYPE_CHECKING:
    from compressor.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Manner:
    """How to run a recipe, as the flags say."""

    run_dir: Path | None = None
    dry_run: bool = False
    fresh: bool = False
    overwrite: bool = False
    break_lock: bool = False
    as_json: bool = False
    device: str = "auto"


def run(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped recipe.")],
    overrides: flags.Overrides = None,
    output: flags.Output = None,
    run_dir: flags.RunFolder = None,
    dry_run: flags.DryRun = False,
    fresh: flags.Fresh = False,
    overwrite: flags.Overwrite = False,
    break_lock: flags.BreakLock = False,
    device: flags.Device = "auto",
    as_json: flags.AsJson = False,
) -> None:
    """Run a recipe from its model to the output folder; run it again to go on after a stop."""
    from compressor.cli.recipes import find_recipe
    from compressor.recipe import load_recipe

    changes = list(overrides or []) + output_override(output)
    loaded = load_recipe(find_recipe(recipe), changes)
    execute(loaded, Manner(run_dir, dry_run, fresh, overwrite, break_lock, as_json, device))


def resume(
    run_dir: Annotated[Path, typer.Argument(help="Folder of an unfinished run.")],
    overwrite: flags.Overwrite = False,
    break_lock: flags.BreakLock = False,
    device: flags.Device = "auto",
    as_json: flags.AsJson = False,
) -> None:
    """Go on with an unfinished run from the recipe that its folder keeps."""
    from compressor.recipe import load_recipe

    file = run_dir / "recipe.yaml"
    if not file.is_file():
        raise UsageError(
            "this folder holds no run that could go on",
            where=Where(file=str(file)), fix="run the recipe again: compress run RECIPE",
        )  # fmt: skip
    manner = Manner(
        run_dir, overwrite=overwrite, break_lock=break_lock, as_json=as_json, device=device
    )
    execute(load_recipe(file), manner)


def output_override(output: Path | None) -> list[str]:
    """`-o OUT` as an override."""
    return [] if output is None else [f"output={json.dumps(str(output))}"]


def execute(recipe: Recipe, manner: Manner) -> None:
    """Show the plan or run the recipe, then show what came out."""
    from compressor import console

    with console.session(as_json=manner.as_json):
        if manner.dry_run:
            _show_plan(recipe, manner)
            return
        from compressor.modeling.device import choose_device
        from compressor.pipeline import RunOptions
        from compressor.pipeline import run as run_pipeline
        from compressor.stages import distill, processes

        if processes.is_follower():
            processes.compute_on(choose_device(manner.device))
            processes.follow(distill.help_training)
            return
        options = RunOptions(
            run_dir=manner.run_dir,
            fresh=manner.fresh,
            overwrite=manner.overwrite,
            break_lock=manner.break_lock,
            command=shlex.join(["compress", *sys.argv[1:]]),
            device=manner.device,
        )
        result = run_pipeline(recipe, options)
        processes.dismiss()
    facts: dict[str, Any] = {"output": str(result.output), "verdict": result.verdict}
    facts |= {"report": str(result.report) if result.report else None}
    if manner.as_json:
        console.show_json({**facts, "summary": result.summary})
    else:
        console.show_facts({**facts, **_plain(result.summary)})


def _plain(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in summary.items() if not isinstance(value, dict | list)}


def _show_plan(recipe: Recipe, manner: Manner) -> None:
    from compressor import console
    from compressor.modeling.device import choose_device
    from compressor.plan import make_plan

    plan = make_plan(recipe, choose_device(manner.device))
    if manner.as_json:
        console.show_json(plan.as_json())
    else:
        console.show_table(plan.values, title=f"{recipe.name}: every value and its origin")
        console.show_table(plan.patterns, title="what each pattern matches")
        console.show_table(plan.costs, title="what it will cost")
        for note in plan.notes:
            console.show(f"note: {note}")
