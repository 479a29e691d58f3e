"""Every fault of a recipe, from tests/faults/recipe.yaml, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from compressor.cli.app import run_command

RECIPE = """\
name: x
model:
  path: reference
output: out
seed: 1
stages:
  - kind: calibrate
    data: {num_samples: 8}
  - kind: quantize
    scheme: W4A16
  - kind: pack
"""

ROWS: list[dict[str, Any]] = YAML(typ="safe").load(Path(__file__).parent / "faults/recipe.yaml")


def bad_recipe(row: dict[str, Any], folder: Path) -> Path:
    file = folder / row.get("name", "recipe.yaml")
    old, new = row.get("replace", ("", ""))
    assert old in RECIPE, "the row no longer fits the recipe"
    text = row.get("text", RECIPE.replace(old, new, 1))
    if "name" not in row:
        file.write_bytes(bytes.fromhex(row["bytes"]) if "bytes" in row else text.encode())
    return file


@pytest.mark.parametrize("row", ROWS, ids=[row["id"] for row in ROWS])
def test_a_bad_recipe_is_refused_with_its_place_and_a_fix(
    row: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = bad_recipe(row, tmp_path)
    before = sorted(tmp_path.iterdir())
    overrides = [word for text in row.get("set", []) for word in ("--set", text)]
    code = run_command(["recipe", "validate", str(file), *overrides, "--json"])
    out, err = capsys.readouterr()
    assert code == row["exit"]
    assert [text for text in row["says"] if text not in err] == []
    assert "Traceback" not in err
    assert json.loads(out)["error"]["exit"] == code
    assert sorted(tmp_path.iterdir()) == before


def test_the_unchanged_recipe_is_valid(tmp_path: Path) -> None:
    assert run_command(["recipe", "validate", str(bad_recipe({}, tmp_path))]) == 0
