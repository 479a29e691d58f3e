"""Recipe text to `Recipe`, and the messages for everything that can be wrong with it."""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Sequence
from pathlib import Path as FilePath
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML

from compressor.errors import CompressError, RecipeError, UnsupportedError, UsageError, Where
from compressor.recipe.models import SCHEMA_VERSION, STAGE_CONFIGS, Recipe
from compressor.recipe.order import check_order
from compressor.recipe.overrides import apply_overrides
from compressor.recipe.yaml import Document, Path, parse_yaml

_INCLUDES = ("extends", "include", "includes", "base", "<<")


def load_recipe(path: FilePath, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe file; `overrides` are `dotted.key=value` texts."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        message = f"the recipe cannot be read: {error.strerror}"
        fix = "see the shipped recipes: compress recipe ls"
        raise RecipeError(message, code="RC01", where=Where(file=str(path)), fix=fix) from error
    except UnicodeDecodeError as error:
        message = f"the recipe is not UTF-8 at byte {error.start}"
        raise RecipeError(message, code="RC02", where=Where(file=str(path))) from error
    return parse_recipe(text, file=str(path), overrides=overrides)


def parse_recipe(text: str, *, file: str = "<recipe>", overrides: Sequence[str] = ()) -> Recipe:
    """Check recipe text: syntax, keys, values, then the order of the stages."""
    document = parse_yaml(text, file=file)
    _check_root(document)
    changed = apply_overrides(document, overrides)
    _check_version(document)
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        raise _explain(error, document, changed) from error
    lines = {".".join(map(str, path)): mark[0] for path, mark in document.marks.items() if path}
    recipe.attach(file, lines)
    check_order(recipe)
    return recipe


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    return Recipe.model_json_schema()


def dump_recipe(recipe: Recipe) -> str:
    """YAML with every key spelled out; `parse_recipe` reads the same recipe back."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    stream = io.StringIO()
    yaml.dump(recipe.model_dump(exclude_none=True), stream)
    return stream.getvalue()


def _check_root(document: Document) -> None:
    if not isinstance(document.data, dict):
        found = {type(None): "nothing", list: "a list"}.get(type(document.data), "a single value")
        raise RecipeError(
            f"the root of a recipe must be a mapping of keys, found {found}",
            code="RC13", where=Where(file=document.file),
            fix="start from a shipped recipe: compress recipe cp w4 my.yaml",
        )  # fmt: skip
    for key in _INCLUDES:
        if key in document.data:
            raise RecipeError(
                f"`{key}` is not supported: a recipe is complete in itself",
                code="RC19", where=document.where((key,)),
                fix="copy the keys into this file, or change single keys with --set",
            )  # fmt: skip


def _check_version(document: Document) -> None:
    version = document.data.get("schema_version", SCHEMA_VERSION)
    if type(version) is int and version > SCHEMA_VERSION:
        raise UnsupportedError(
            f"the recipe has schema version {version}, this program reads {SCHEMA_VERSION}",
            code="RC20", where=document.where(("schema_version",)),
            fix="upgrade: pip install --upgrade compressor",
        )  # fmt: skip


def _explain(error: ValidationError, document: Document, changed: dict[Path, str]) -> CompressError:
    """One error for the first problem; the other problems are listed below it."""
    problems = [_Problem(details, document) for details in error.errors(include_url=False)]
    first = problems[0]
    others = [f"{p.where.line or '-'}: {p.message}" for p in problems[1:6]]
    why = "also, on line " + "; on line ".join(others) if others else ""
    for path, text in changed.items():
        if first.path[: len(path)] == path:
            message = f"--set {text}: {first.message}"
            where = Where(key=first.where.key)
            return UsageError(message, code="RC18", where=where, why=why, fix=first.fix)
    return RecipeError(first.message, code=first.code, where=first.where, why=why, fix=first.fix)


class _Problem:
    """A pydantic error in the words of a recipe: path, message, fault id and fix."""

    def __init__(self, details: ErrorDetails, document: Document) -> None:
        self.details = details
        self.data = document.data
        self.path = _path_of(details, document.data)
        self.where = document.where(self.path)
        self.code, self.message, self.fix = "RC05", "", ""
        kind = details["type"]
        if kind == "extra_forbidden":
            self._unknown_key()
        elif kind == "missing":
            self._missing()
        elif kind in ("literal_error", "union_tag_invalid"):
            self._bad_choice()
        elif kind == "union_tag_not_found":
            self._stage_without_kind()
        else:
            self._bad_value(kind)

    def _unknown_key(self) -> None:
        name, model = str(self.path[-1]), _model_at(self.data, self.path[:-1])
        choices = list(model.model_fields) if model else []
        self.code, self.message = "RC04", f"unknown key `{name}`"
        self.fix = _nearest(name, choices) + f"keys here: {', '.join(choices)}"

    def _missing(self) -> None:
        model = _model_at(self.data, self.path[:-1])
        choices = ", ".join(model.model_fields) if model else ""
        parent = ".".join(str(p) for p in self.path[:-1]) or "the recipe"
        self.code, self.message = "RC04", f"`{self.path[-1]}` is missing in {parent}"
        self.fix = f"add the key `{self.path[-1]}`; keys here: {choices}"

    def _bad_choice(self) -> None:
        context = self.details.get("ctx", {})
        is_stage = self.details["type"] == "union_tag_invalid"
        if is_stage:
            self.path = (*self.path, "kind")
        value = str(context["tag"]) if is_stage else str(self.details["input"])
        listed = str(context["expected_tags" if is_stage else "expected"])
        choices = re.findall(r"'([^']*)'", listed) or re.findall(r"-?\d+", listed)
        self.code = "RC06" if is_stage else "RC05"
        self.message = f"`{value}` is not a {'stage' if is_stage else f'value of {self.path[-1]}'}"
        self.fix = _nearest(value, choices) + f"choices: {', '.join(choices)}"

    def _stage_without_kind(self) -> None:
        self.code, self.message = "RC06", "a stage needs a `kind`"
        self.fix = f"choices: {', '.join(STAGE_CONFIGS)}"

    def _bad_value(self, kind: str) -> None:
        is_range = kind.startswith(("greater", "less", "too_", "finite"))
        self.code = "RC08" if is_range else "RC17" if kind == "value_error" else "RC05"
        text = self.details["msg"].removeprefix("Value error, ")
        text = text.replace("Input should be", "it must be")
        limits = _limits(_model_at(self.data, self.path[:-1]), self.path) if is_range else ""
        key = ".".join(str(p) for p in self.path) or "recipe"
        self.message = f"{key}: {text} (found {_shown(self.details['input'])})"
        self.fix = f"allowed: {limits}" if limits else "change the value"


def _shown(value: Any) -> str:
    text = "a mapping" if isinstance(value, dict) else repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _nearest(name: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"did you mean `{near[0]}`? " if near else ""


def _limits(model: type[BaseModel] | None, path: Path) -> str:
    """Both ends of a number's range, as in "at least 2, at most 8"."""
    if model is None or str(path[-1]) not in model.model_fields:
        return ""
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    items = [*_metadata(model.model_fields[str(path[-1])])]
    found = [(words[k], getattr(i, k)) for i in items for k in words if hasattr(i, k)]
    return ", ".join(f"{word} {limit:g}" for word, limit in dict.fromkeys(found))


def _metadata(annotation: Any) -> list[Any]:
    """Everything that `Annotated` hangs on a type, through unions and `FieldInfo`."""
    own = list(getattr(annotation, "metadata", [])) + list(getattr(annotation, "__metadata__", []))
    inner = get_args(getattr(annotation, "annotation", annotation))
    return own + [item for part in (*own, *inner) for item in _metadata(part)]


def _path_of(details: ErrorDetails, data: Any) -> Path:
    """Drop from pydantic's location what names a branch of a union and no key of the recipe."""
    path: list[str | int] = []
    for part in details["loc"]:
        is_last_of_missing = details["type"] == "missing" and part == details["loc"][-1]
        in_mapping = isinstance(data, dict) and (part in data or is_last_of_missing)
        in_list = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if in_mapping or in_list:
            path.append(part)
            data = None if is_last_of_missing else data[part]
    return tuple(path)


def _model_at(data: Any, path: Path) -> type[BaseModel] | None:
    """The model class that describes the mapping at `path`."""
    model: type[BaseModel] | None = Recipe
    for key in path:
        data = data[key]
        if isinstance(key, int):
            kind = str(data.get("kind")) if isinstance(data, dict) else ""
            model = STAGE_CONFIGS.get(kind) if model is Recipe else model
        elif key != "stages":
            model = _model_in(model.model_fields[key].annotation) if model else None
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, UnionType, Annotated, list):
        found = (_model_in(argument) for argument in get_args(annotation))
        return next((model for model in found if model), None)
    return None
