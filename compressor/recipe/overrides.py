"""`--set stages.1.bits=3`: change single keys of a recipe from the command line.

A path is dotted; a stage is named by its index (from 0) or by its kind if it occurs once, as in
`stages.quantize.bits`. Values are YAML 1.2. Everything wrong here is a usage error (RC18).
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from compressor.errors import RecipeError, UsageError, Where
from compressor.recipe.yaml import Document, Path, parse_yaml


def apply_overrides(document: Document, overrides: Sequence[str]) -> dict[Path, str]:
    """Write each `path=value` into `document.data`; returns the text of each changed path."""
    changed: dict[Path, str] = {}
    for text in overrides:
        dotted, equals, value = text.partition("=")
        if not equals or not dotted.strip():
            raise _usage(text, "it has no `=`", "write --set path.to.key=value")
        path = _resolve(document.data, dotted.strip(), text)
        _assign(document.data, path, _value(text, value))
        changed[path] = text
        document.marks = {p: m for p, m in document.marks.items() if p[: len(path)] != path}
    return changed


def _value(text: str, value: str) -> Any:
    try:
        return parse_yaml(value, file=f"--set {text}").data
    except RecipeError as error:
        raise _usage(text, error.message, "quote the value for the shell, once") from error


def _resolve(data: Any, dotted: str, text: str) -> Path:
    path: list[str | int] = []
    for part in dotted.split("."):
        key: str | int = part
        if isinstance(data, list):
            key = _index(data, part, text)
            data = data[key]
        elif isinstance(data, dict) or data is None:
            data = data.get(part) if isinstance(data, dict) else None
        else:
            raise _usage(text, f"`{'.'.join(map(str, path))}` holds a value, no keys", "")
        path.append(key)
    return tuple(path)


def _index(items: list[Any], part: str, text: str) -> int:
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    kinds = [item.get("kind") if isinstance(item, dict) else None for item in items]
    if kinds.count(part) == 1:
        return kinds.index(part)
    if part in kinds:
        raise _usage(text, f"`{part}` occurs {kinds.count(part)} times", "name it by its index")
    choices = [str(i) for i in range(len(items))] + [str(k) for k in kinds if k]
    near = difflib.get_close_matches(part, choices, n=1)
    hint = f"did you mean `{near[0]}`? " if near else ""
    raise _usage(text, f"`{part}` is not in the list", f"{hint}choices: {', '.join(choices)}")


def _assign(data: Any, path: Path, value: Any) -> None:
    for key in path[:-1]:
        if isinstance(data, dict) and data.get(str(key)) is None:
            data[str(key)] = {}
        data = data[key]
    data[path[-1]] = value


def _usage(text: str, problem: str, fix: str) -> UsageError:
    message = f"--set {text}: {problem}"
    return UsageError(message, code="RC18", where=Where(key=text.partition("=")[0]), fix=fix)
