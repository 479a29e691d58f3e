"""`compress recipe ls | show | cp | validate | schema`."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any

import typer

from compressor.cli import flags
from compressor.errors import OutputError, RecipeError, Where
from compressor.resources import resource_dir

app = typer.Typer(help="Shipped recipes, and checks of your own.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped recipe.")]


def shipped() -> dict[str, Path]:
    """Name -> file of every recipe that comes with the program."""
    return {file.stem: file for file in sorted(resource_dir("recipes").glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A file as it is written, or a shipped recipe by its bare name; RC01 if it is neither."""
    path = Path(name)
    if path.is_file():
        return path
    known = shipped()
    bare = path.name.removesuffix(".yaml")
    is_shipped = bare in known and path.parent in (Path(), Path("recipes"))
    if is_shipped:
        return known[bare]
    near = difflib.get_close_matches(bare, known, n=1)
    hint = f"did you mean `{near[0]}`? " if near else ""
    raise RecipeError(
        "there is no such recipe file, and no shipped recipe of that name",
        code="RC01", where=Where(file=name), fix=f"{hint}shipped: {', '.join(known)}",
    )  # fmt: skip


def write_recipe(path: Path, text: str, *, overwrite: bool) -> None:
    """Write recipe text to a file that does not exist yet (or may be replaced)."""
    from compressor.run_dir.files import write_atomic

    target = path / "recipe.yaml" if path.is_dir() else path
    if target.exists() and not overwrite:
        raise OutputError(
            "the file exists already",
            where=Where(file=str(target)), fix="choose another name, or add --overwrite",
        )  # fmt: skip
    write_atomic(target, text.encode())


@app.command("ls")
def list_recipes(as_json: flags.AsJson = False) -> None:
    """List the shipped recipes."""
    from compressor import console

    rows: list[dict[str, Any]] = [
        {"name": name, "about": _first_comment(file)} for name, file in shipped().items()
    ]
    if as_json:
        console.show_json({"recipes": rows})
    else:
        console.show_facts({row["name"]: row["about"] for row in rows})


def _first_comment(file: Path) -> str:
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ")


@app.command("show")
def show_recipe(name: Name) -> None:
    """Print a recipe."""
    from compressor import console

    console.show(find_recipe(name).read_text(encoding="utf-8").rstrip("\n"))


@app.command("cp")
def copy_recipe(
    name: Name,
    target: Annotated[Path, typer.Argument(help="File to write.")],
    overwrite: flags.Overwrite = False,
) -> None:
    """Copy a recipe to a file of your own, comments and all."""
    from compressor import console

    write_recipe(target, find_recipe(name).read_text(encoding="utf-8"), overwrite=overwrite)
    console.say(f"wrote {target}; run it with: compress run {target}")


@app.command("validate")
def validate(
    name: Name,
    overrides: flags.Overrides = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Check against this model too (`-` = its own).")
    ] = None,
    as_json: flags.AsJson = False,
) -> None:
    """Check a recipe without running it; with --model also its patterns and sizes."""
    from compressor import console
    from compressor.recipe import load_recipe

    recipe = load_recipe(find_recipe(name), _with_model(overrides or [], model))
    stages = [stage.kind for stage in recipe.stages]
    facts: dict[str, Any] = {"recipe": recipe.name, "model": recipe.model.path, "stages": stages}
    if model is not None:
        from compressor.plan import make_plan

        with console.session(as_json=as_json):
            facts["plan"] = make_plan(recipe).as_json()
    if as_json:
        console.show_json({"valid": True, **facts})
    else:
        console.show(f"valid: {recipe.name}: {' -> '.join(stages)}")


def _with_model(overrides: list[str], model: str | None) -> list[str]:
    import json

    named = [] if model in (None, "-") else [f"model.path={json.dumps(model)}"]
    return overrides + named


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from compressor import console
    from compressor.recipe import recipe_schema

    console.show_json(recipe_schema())
