"""What a second run finds: damage, another recipe, another holder, a finished output."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kill import compare, digests
from compressor.errors import CheckpointError, OutputError, RecipeError
from compressor.recipe import Recipe
from compressor.run_dir import RunDir
from tests.faults.kills import DAMAGES, Damage
from tests.faults.row import folder_digest
from tests.fixtures_pipeline import execute, recipe, stages, text_file


@pytest.fixture(scope="module")
def finished(
    tiny_models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Path]:
    """A finished run: its recipe, and its folder with `out` and `out.run`."""
    folder = tmp_path_factory.mktemp("finished")
    model = shutil.copytree(tiny_models("llama"), folder / "model")
    made = recipe(Path(model), folder, stages=stages(folder, method="rtn")[:3])
    execute(made)
    return made, folder


def moved(made: Recipe, folder: Path, **changes: Any) -> Recipe:
    """The same recipe with its output elsewhere."""
    return made.model_copy(update={"output": str(folder / "out"), **changes})


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.name)
def test_damaged_state_is_found_and_done_again_with_the_same_bytes(
    damage: Damage,
    finished: tuple[Recipe, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made, folder = finished
    shutil.copytree(folder / "out.run", tmp_path / "out.run")
    damage.do(tmp_path / "out.run")
    with caplog.at_level(logging.WARNING):
        execute(moved(made, tmp_path))
    assert damage.warns in caplog.text
    assert compare(digests(folder / "out"), digests(tmp_path / "out")) == []


def changed_data(made: Recipe) -> Recipe:
    text_file(Path(made.stages[0].data.source), start=50)  # type: ignore[union-attr]
    return made


def changed_model(made: Recipe) -> Recipe:
    file = Path(made.model.path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 1e-4}))
    return made


CHANGES: dict[str, Callable[[Recipe], Recipe]] = {
    "recipe": lambda made: made.model_copy(update={"seed": 7}),
    "stages.0.data": changed_data,
    "model": changed_model,
}


@pytest.mark.parametrize("key", CHANGES)
def test_ki13_a_resume_with_something_changed_names_it_and_fresh_starts_anew(
    key: str, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_models("llama"), tmp_path / "model")
    chosen = stages(tmp_path, method="rtn")[:3]
    made = recipe(Path(model), tmp_path, stages=chosen)
    execute(made)
    before = folder_digest(tmp_path / "out")
    other = moved(CHANGES[key](made), tmp_path / "other")
    run_dir = tmp_path / "out.run"
    with pytest.raises(RecipeError) as caught:
        execute(other, run_dir=run_dir)
    assert caught.value.code == "KI13"
    assert key in caught.value.message
    assert "--fresh" in caught.value.fix
    assert folder_digest(tmp_path / "out") == before
    assert execute(other, run_dir=run_dir, fresh=True).output.is_dir()


def test_ki11_a_second_run_of_the_same_folder_is_refused(
    finished: tuple[Recipe, Path], tmp_path: Path
) -> None:
    with RunDir.open(tmp_path / "out.run", identity={}), pytest.raises(OutputError) as caught:
        execute(moved(finished[0], tmp_path))
    assert caught.value.code == "KI11"
    assert caught.value.exit_code == 8


def test_the_same_command_after_success_is_refused_and_touches_nothing(
    finished: tuple[Recipe, Path],
) -> None:
    made, folder = finished
    before = folder_digest(folder)
    with pytest.raises(OutputError) as caught:
        execute(made)
    assert caught.value.exit_code == 8
    assert "--overwrite" in caught.value.fix
    assert folder_digest(folder) == before


def test_overwrite_after_success_gives_the_same_bytes_again(
    finished: tuple[Recipe, Path], tmp_path: Path
) -> None:
    made, folder = finished
    for name in ("out", "out.run"):
        shutil.copytree(folder / name, tmp_path / name)
    execute(moved(made, tmp_path), overwrite=True)
    assert compare(digests(folder / "out"), digests(tmp_path / "out")) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.run"]


def test_ki15_a_source_that_was_moved_is_named(
    finished: tuple[Recipe, Path], tmp_path: Path
) -> None:
    made, folder = finished
    shutil.copytree(folder / "out.run", tmp_path / "out.run")
    model = made.model.model_copy(update={"path": str(tmp_path / "gone")})
    with pytest.raises(CheckpointError) as caught:
        execute(moved(made, tmp_path, model=model))
    assert "gone" in str(caught.value)
    assert caught.value.exit_code == 4


def test_ki01_a_bad_checkpoint_stops_before_anything_is_written(
    tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_models("llama"), tmp_path / "model"))
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError):
        execute(recipe(model, tmp_path, stages=stages(tmp_path)))
    assert not (tmp_path / "out.run").exists()
