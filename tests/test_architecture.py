"""The floors of docs/architecture.md: a module imports from its own floor downward."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "compressor_kernels": 0,
    "compressor.errors": 0,
    "compressor.recipe": 0,
    "compressor.allocator": 0,
    "compressor.idle_threads": 0,
    "compressor.resources": 0,
    "compressor.reference_model": 0,
    "compressor.algorithms": 1,
    "compressor.artifact": 2,
    "compressor.run_dir": 2,
    "compressor.modeling": 3,
    "compressor.data": 3,
    "compressor_eval": 4,
    "compressor.serve": 4,
    "compressor.stages": 5,
    "compressor.pipeline": 6,
    "compressor.plan": 6,
    "compressor.report": 6,
    "compressor.cli": 7,
    "compressor.console": 7,
    "compressor.__main__": 7,
}
FORBIDDEN_PAIRS = {
    ("compressor_eval", "compressor.serve"),
    ("compressor.stages", "compressor.serve"),
}
NO_TORCH = (
    "compressor.errors",
    "compressor.recipe",
    "compressor.allocator",
    "compressor.idle_threads",
    "compressor.resources",
    "compressor.reference_model",
)


def room_of(module: str) -> str | None:
    found = [room for room in FLOORS if module == room or module.startswith(room + ".")]
    return max(found, key=len, default=None)


def source_files() -> list[Path]:
    folders = [
        ROOT / "compressor",
        ROOT / "kernels/compressor_kernels",
        ROOT / "eval/compressor_eval",
    ]
    return [file for folder in folders for file in sorted(folder.rglob("*.py"))]


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] in ("kernels", "eval") else parts
    return ".".join(p for p in parts if p != "__init__")


def imports_of(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", source_files(), ids=module_name)
def test_imports_go_down_the_floors(file):
    me = room_of(module_name(file))
    if me is None:
        assert module_name(file) == "compressor", f"{file} stands on no floor"
        return
    for name in imports_of(ast.parse(file.read_text())):
        other = room_of(name)
        if other is None:
            continue
        assert FLOORS[other] <= FLOORS[me], f"{me} imports {name}, which is above it"
        assert (me, other) not in FORBIDDEN_PAIRS
        assert (other, me) not in FORBIDDEN_PAIRS


@pytest.mark.parametrize("file", source_files(), ids=module_name)
def test_the_ground_floor_does_not_import_torch(file):
    if room_of(module_name(file)) in NO_TORCH:
        names = imports_of(ast.parse(file.read_text()))
        assert not {n for n in names if n.split(".")[0] in ("torch", "transformers")}


@pytest.mark.parametrize("file", source_files(), ids=module_name)
def test_files_and_functions_stay_small(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 400
    limit = 100 if "kernels" in file.parts else 60
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            assert node.end_lineno - node.lineno < limit, f"{node.name} is too long"
