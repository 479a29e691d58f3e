"""YAML 1.2 text to plain values, with the line of every key.

ruamel.yaml reads the syntax; the values are built here, so that nothing but the core schema of
YAML 1.2 exists: `no` is a string, `012` is twelve, `3e-4` is a number, tags are refused, a key may
stand only once and an alias cannot blow up the document.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from compressor.errors import RecipeError, Where

Path = tuple[str | int, ...]

MAX_BYTES = 1_000_000
MAX_NODES = 20_000
MAX_DEPTH = 32

_CONSTANTS: dict[str, Any] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_CONSTANTS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False}
_CONSTANTS |= {"FALSE": False, ".inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan")}
_INTEGER = re.compile(r"[-+]?[0-9]{1,400}")
_PREFIXED = re.compile(r"0o[0-7]{1,400}|0x[0-9a-fA-F]{1,400}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


@dataclass(slots=True)
class Document:
    """Plain data, and line and column (from 1) of every key and list item."""

    file: str
    data: Any = None
    marks: dict[Path, tuple[int, int]] = field(default_factory=dict)
    num_nodes: int = 0

    def where(self, path: Path) -> Where:
        """The place of `path`, or of the nearest part around it that stands in the file."""
        key = ".".join(str(p) for p in path)
        while path and path not in self.marks:
            path = path[:-1]
        line, column = self.marks.get(path, (None, None))
        return Where(file=self.file, line=line, column=column, key=key)


def parse_scalar(text: str) -> Any:
    """The value of a plain (unquoted) scalar by the core schema of YAML 1.2."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _PREFIXED.fullmatch(text):
        return int(text, 0)
    return float(text) if _FLOAT.fullmatch(text) else text


def parse_yaml(text: str, *, file: str) -> Document:
    """Read one YAML document; syntax errors, tags and duplicate keys raise `RecipeError`."""
    document = Document(file)
    if len(text) > MAX_BYTES:
        raise RecipeError(f"the recipe is longer than {MAX_BYTES} characters", code="RC13")
    node = _compose(text, file)
    if node is not None:
        document.data = _build(node, (), document)
    return document


def _compose(text: str, file: str) -> Node | None:
    try:
        _refuse_tags(text, file)
        return YAML(typ="safe", pure=True).compose(text)
    except RecursionError as error:
        raise _too_deep(Where(file=file)) from error
    except MarkedYAMLError as error:
        raise _syntax_error(error, text, file) from error
    except (YAMLError, ValueError) as error:
        message = f"the text is not YAML: {str(error).splitlines()[0]}"
        raise RecipeError(message, code="RC02", where=Where(file=file)) from error


def _refuse_tags(text: str, file: str) -> None:
    num_documents = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        mark = event.start_mark
        where = Where(file=file, line=mark.line + 1, column=mark.column + 1)
        num_documents += type(event).__name__ == "DocumentStartEvent"
        if num_documents > 1:
            raise RecipeError(
                "the file holds more than one YAML document",
                code="RC13", where=where, fix="keep one recipe a file; remove the `---` line",
            )  # fmt: skip
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise RecipeError(
                f"the tag {tag} is not allowed",
                code="RC10", where=where,
                why="a recipe is plain data; tags could build objects. Nothing was built.",
                fix="remove the tag",
            )  # fmt: skip


def _syntax_error(error: MarkedYAMLError, text: str, file: str) -> RecipeError:
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return RecipeError(f"the text is not YAML: {error.problem}", code="RC02")
    lines = text.splitlines()
    source = lines[mark.line] if mark.line < len(lines) else ""
    caret = " " * mark.column + "^"
    start = error.context_mark.line + 1 if error.context_mark else mark.line + 1
    begun = f" ({error.context}, begun on line {start})" if start != mark.line + 1 else ""
    is_tab = "\t" in source[: mark.column + 1]
    return RecipeError(
        f"YAML syntax: {error.problem or error.context}{begun}",
        code="RC02",
        where=Where(file=file, line=mark.line + 1, column=mark.column + 1),
        why="\n    " + source.replace("\t", "→") + "\n    " + caret,
        fix="indent with spaces, not tabs" if is_tab else "correct the marked place",
    )


def _too_deep(where: Where) -> RecipeError:
    return RecipeError(
        "the recipe is nested too deeply or repeats itself through aliases",
        code="RC13", where=where, fix=f"stay below {MAX_DEPTH} levels and {MAX_NODES} values",
    )  # fmt: skip


def _build(node: Node, path: Path, document: Document) -> Any:
    document.num_nodes += 1
    mark = (node.start_mark.line + 1, node.start_mark.column + 1)
    document.marks.setdefault(path, mark)
    if document.num_nodes > MAX_NODES or len(path) > MAX_DEPTH:
        raise _too_deep(document.where(path))
    if isinstance(node, MappingNode):
        return _build_mapping(node, path, document)
    if isinstance(node, SequenceNode):
        return [_build(item, (*path, i), document) for i, item in enumerate(node.value)]
    assert isinstance(node, ScalarNode)
    return parse_scalar(node.value) if node.style is None else node.value


def _build_mapping(node: MappingNode, path: Path, document: Document) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line, column = key_node.start_mark.line + 1, key_node.start_mark.column + 1
        where = Where(file=document.file, line=line, column=column)
        if not isinstance(key_node, ScalarNode):
            raise RecipeError("a key must be a plain word", code="RC04", where=where)
        key = str(key_node.value)
        if key in result:
            first = document.marks[(*path, key)][0]
            raise RecipeError(
                f"the key `{key}` stands twice: on line {first} and on line {line}",
                code="RC03", where=where, fix="remove one of the two",
            )  # fmt: skip
        document.marks[(*path, key)] = (line, column)
        result[key] = _build(value_node, (*path, key), document)
    return result
