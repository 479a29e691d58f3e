"""Shipped files are found in a source checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor import resources


@pytest.mark.parametrize("name", ["recipes", "suites", "tasks"])
def test_a_checkout_uses_its_own_folders(name: str) -> None:
    folder = resources.resource_dir(name)  # type: ignore[arg-type]
    assert folder.is_dir()
    assert (folder.parent / "pyproject.toml").is_file() or folder.parent.name == "eval"


def test_a_wheel_uses_the_shared_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_SOURCE", {"recipes": "no/such/folder"})
    assert resources.resource_dir("recipes").parts[-3:] == ("share", "compressor", "recipes")


def test_every_task_that_a_shipped_recipe_names_exists() -> None:
    from compressor.recipe import EvaluateConfig, load_recipe

    tasks = {file.stem for file in resources.resource_dir("tasks").glob("*.yaml")}
    named = {
        task
        for file in resources.resource_dir("recipes").glob("*.yaml")
        for stage in load_recipe(Path(file)).stages
        if isinstance(stage, EvaluateConfig)
        for task in stage.tasks
    }
    assert named <= tasks
