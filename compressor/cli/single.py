"""`compress quantize | prune | distill`: the flags become a recipe, and the recipe is run.

Only what the user gave goes into the recipe, so each default lives in the recipe's models alone.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compressor.cli import flags
from compressor.cli.run import Manner, execute
from compressor.errors import RecipeError, UsageError, Where

if TYPE_CHECKING:
    from compressor.recipe import Recipe

Stage = dict[str, Any]

DRAFT_DEPTH = 0.25  # part of the teacher's blocks in a draft model
_RESULTS = {"quantize": "quantized", "prune": "pruned", "distill": "distilled", "draft": "draft"}


def quantize(
    model: Annotated[str, typer.Argument(help="Folder, hub id or `reference`.")],
    scheme: Annotated[
        str | None, typer.Option(help="W4A16, W3A16_ASYM, W8A8, FP8_DYNAMIC, NVFP4, MXFP4, ...")
    ] = None,
    effort: Annotated[str | None, typer.Option(help="fast, default, high or max.")] = None,
    group_size: Annotated[int | None, typer.Option(help="32, 64, 128 or -1.")] = None,
    average_bits: Annotated[float | None, typer.Option(help="Budget in bits a weight.")] = None,
    size: Annotated[str | None, typer.Option(help="Budget for all files, as in 6GiB.")] = None,
    fits: Annotated[str | None, typer.Option(help="Weights and KV cache, as in 24GB@32k.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Smallest artifact within this KL.")] = None,
    candidate: Annotated[list[str] | None, typer.Option(help="Formats to mix.")] = None,
    head: Annotated[str | None, typer.Option(help="Output head: none, W8A16 or W4A16.")] = None,
    kv_cache: Annotated[str | None, typer.Option(help="none, or fp8 for its scales.")] = None,
    method: Annotated[str | None, typer.Option(help="gptq or rtn.")] = None,
    protect: Annotated[list[str] | None, typer.Option(help="Layers to keep at 16 bit.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Layers to leave alone.")] = None,
    data: flags.Data = None,
    num_samples: flags.NumSamples = None,
    seq_len: flags.SeqLen = None,
    seed: flags.Seed = None,
    output: flags.Output = None,
    recipe_out: flags.RecipeOut = None,
    overrides: flags.Overrides = None,
    run_dir: flags.RunFolder = None,
    dry_run: flags.DryRun = False,
    fresh: flags.Fresh = False,
    overwrite: flags.Overwrite = False,
    device: flags.Device = "auto",
    as_json: flags.AsJson = False,
) -> None:
    """Store the linear layers of a model in few bits."""
    stage: Stage = {"kind": "quantize", "scheme": scheme, "group_size": group_size}
    limits = {"average_bits": average_bits, "size": size, "fits": fits, "max_kl": max_kl}
    stage |= {"method": method, "effort": effort, "budget": _given(limits)}
    stage |= {"head": head, "kv_cache": kv_cache}
    stage |= {"protect": protect, "ignore": ignore, "candidates": candidate}
    rows = {"source": data, "num_samples": num_samples, "seq_len": seq_len}
    recipe = _recipe("quantize", model, output, seed, [_calibrate(rows), stage])
    manner = Manner(run_dir, dry_run, fresh, overwrite, as_json=as_json, device=device)
    _write_or_run(recipe, recipe_out, overrides, manner)


def prune(
    model: Annotated[str, typer.Argument(help="Folder, hub id or `reference`.")],
    method: Annotated[
        str | None, typer.Option(help="alps, sparsegpt, wanda, ria or magnitude.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Fraction of weights to drop.")] = None,
    pattern: Annotated[str | None, typer.Option(help="2:4 or 4:8.")] = None,
    width: Annotated[
        list[str] | None, typer.Option(help="mlp=0.75, kv_groups=2, hidden=0.75, experts=8.")
    ] = None,
    depth: Annotated[str | None, typer.Option(help="0.75, 6 or [0,1,5]: blocks that stay.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Layers to leave alone.")] = None,
    data: flags.Data = None,
    num_samples: flags.NumSamples = None,
    seq_len: flags.SeqLen = None,
    seed: flags.Seed = None,
    output: flags.Output = None,
    recipe_out: flags.RecipeOut = None,
    overrides: flags.Overrides = None,
    run_dir: flags.RunFolder = None,
    dry_run: flags.DryRun = False,
    fresh: flags.Fresh = False,
    overwrite: flags.Overwrite = False,
    device: flags.Device = "auto",
    as_json: flags.AsJson = False,
) -> None:
    """Take weights, channels or blocks away."""
    stage: Stage = {"kind": "prune", "method": method, "sparsity": sparsity, "pattern": pattern}
    stage |= {"width": pairs(width, "--width"), "depth": value(depth), "ignore": ignore}
    rows = {"source": data, "num_samples": num_samples, "seq_len": seq_len}
    recipe = _recipe("prune", model, output, seed, [_calibrate(rows), stage])
    manner = Manner(run_dir, dry_run, fresh, overwrite, as_json=as_json, device=device)
    _write_or_run(recipe, recipe_out, overrides, manner)


def distill(
    teacher: Annotated[str, typer.Argument(help="Folder, hub id or `reference`.")],
    student: Annotated[str | None, typer.Option(help="Folder of a student to go on with.")] = None,
    draft: Annotated[
        bool, typer.Option("--draft", help="A student of a quarter of the blocks, to guess ahead.")
    ] = False,
    student_layers: Annotated[int | None, typer.Option(help="Blocks of a new student.")] = None,
    student_size: Annotated[
        list[str] | None, typer.Option(help="hidden_size=128 and the like, for a new student.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr")] = None,
    temperature: Annotated[float | None, typer.Option()] = None,
    data: flags.Data = None,
    num_samples: flags.NumSamples = None,
    seq_len: flags.SeqLen = None,
    seed: flags.Seed = None,
    output: flags.Output = None,
    recipe_out: flags.RecipeOut = None,
    overrides: flags.Overrides = None,
    run_dir: flags.RunFolder = None,
    dry_run: flags.DryRun = False,
    fresh: flags.Fresh = False,
    overwrite: flags.Overwrite = False,
    device: flags.Device = "auto",
    as_json: flags.AsJson = False,
) -> None:
    """Train a smaller student towards a teacher."""
    sizes: dict[str, Any] = {"path": student, "num_hidden_layers": student_layers}
    sizes |= pairs(student_size, "--student-size") or {}
    if draft and not _given(sizes):
        sizes["depth"] = DRAFT_DEPTH
    rows = {"source": data, "num_samples": num_samples, "seq_len": seq_len}
    stage: Stage = {"kind": "distill", "data": _given(rows), "steps": steps}
    stage |= {"batch_size": batch_size, "learning_rate": learning_rate}
    stage |= {"temperature": temperature, "student": _given(sizes)}
    recipe = _recipe("draft" if draft else "distill", teacher, output, seed, [stage])
    manner = Manner(run_dir, dry_run, fresh, overwrite, as_json=as_json, device=device)
    _write_or_run(recipe, recipe_out, overrides, manner)


def pairs(items: list[str] | None, flag: str) -> dict[str, Any] | None:
    """`["mlp=0.75"]` to `{"mlp": 0.75}`."""
    result: dict[str, Any] = {}
    for item in items or []:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise UsageError(f"{flag} {item}: it has no `=`", code="US01", fix="write NAME=VALUE")
        result[name] = value(text)
    return result or None


def value(text: str | None) -> Any:
    """A flag's text as YAML, so that numbers and lists mean what they look like."""
    if text is None:
        return None
    from compressor.recipe.yaml import parse_yaml

    try:
        return parse_yaml(text, file="").data
    except RecipeError as error:
        raise UsageError(f"{text}: {error.message}", code="US01", fix=error.fix) from error


def _given(items: dict[str, Any]) -> dict[str, Any] | None:
    return {name: item for name, item in items.items() if item is not None} or None


def _calibrate(rows: dict[str, Any]) -> Stage:
    return {"kind": "calibrate", "data": _given(rows)}


def _recipe(
    action: Literal["quantize", "prune", "distill", "draft"],
    model: str,
    output: Path | None,
    seed: int | None,
    stages: list[Stage],
) -> dict[str, Any]:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name).strip("-.") or "model"
    tail: list[Stage] = [{"kind": "pack"}, {"kind": "verify"}]
    folder = str(output or f"{name}-{_RESULTS[action]}")
    plain = {"schema_version": 1, "name": f"{action}-{name}"[:64], "model": {"path": model}}
    plain |= {"output": folder, "seed": seed}
    return (_given(plain) or {}) | {"stages": [_given(stage) for stage in stages + tail]}


def _write_or_run(
    recipe: dict[str, Any], recipe_out: Path | None, overrides: list[str] | None, manner: Manner
) -> None:
    text = to_yaml(recipe)
    parsed = recipe_from_flags(text, overrides or [])
    if recipe_out is None:
        execute(parsed, manner)
        return
    from compressor import console
    from compressor.cli.recipes import write_recipe
    from compressor.recipe import dump_recipe

    write_recipe(recipe_out, dump_recipe(parsed) if overrides else text, overwrite=manner.overwrite)
    console.say(f"wrote {recipe_out}; run it with: compress run {recipe_out}")


def recipe_from_flags(text: str, overrides: list[str]) -> Recipe:
    """Parse recipe text that flags were turned into; what is wrong in it is a wrong flag."""
    from compressor.recipe import parse_recipe

    try:
        return parse_recipe(text, file="", overrides=overrides)
    except RecipeError as error:
        message = re.sub(r"stages\.\d\.| \(line [\d-]+\)", "", error.message)
        where = Where(key=re.sub(r"^stages\.\d\.?", "", error.where.key))
        raise UsageError(message, code=error.code, where=where, fix=error.fix) from error


def to_yaml(data: dict[str, Any]) -> str:
    """Plain data as block-style YAML in the given order of keys."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    stream = io.StringIO()
    yaml.dump(data, stream)
    return stream.getvalue()
