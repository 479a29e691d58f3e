"""Disk, permissions and modes: exit 6, nothing half-written, and the same command goes on."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compressor.errors import ResourceError
from compressor.recipe import Recipe, dump_recipe
from tests.faults.resources import REFUSALS, Refusal, below_a_file, refuse, tiny_disk
from tests.faults.row import folder_digest
from tests.fixtures_pipeline import execute, recipe, stages

ROOT = Path(__file__).parent.parent


@pytest.fixture
def made(tiny_models: Callable[[str], Path], tmp_path: Path) -> Recipe:
    """calibrate, round to nearest, pack: enough to write every kind of file."""
    chosen = stages(tmp_path, method="rtn")[:3]
    return recipe(tiny_models("llama"), tmp_path, stages=chosen)


@pytest.mark.parametrize("case", REFUSALS, ids=lambda c: c.name)
def test_refused_write(
    case: Refusal, made: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = folder_digest(Path(made.model.path))
    with monkeypatch.context() as patch:
        patch.setattr(case.target, refuse(case.number))
        with pytest.raises(ResourceError) as caught:
            execute(made)
    assert caught.value.code == case.code
    assert caught.value.fix
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.run").rglob("*.tmp*"))
    assert folder_digest(Path(made.model.path)) == before
    assert execute(made).output.is_dir()  # the same command goes on


def test_re01_a_disk_that_is_too_small_is_refused_before_any_work(
    made: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.plan.shutil.disk_usage", tiny_disk)
    with pytest.raises(ResourceError) as caught:
        execute(made)
    assert caught.value.code == "RE01"
    assert "1,000 are free" in str(caught.value)
    assert not (tmp_path / "out.run").exists()


def test_re06_a_run_that_needs_more_memory_than_there_is_is_refused_before_any_work(
    made: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.plan.memory_bytes", lambda *_: 10**15)
    with pytest.raises(ResourceError, match=r"1,000,000,000,000,000 bytes of memory") as caught:
        execute(made)
    assert caught.value.code == "RE06"
    assert not (tmp_path / "out.run").exists()


def test_re04_an_output_below_a_file_is_refused_with_its_path(
    tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    output = below_a_file(tmp_path)
    bad = recipe(tiny_models("llama"), tmp_path, output=str(output))
    with pytest.raises(ResourceError) as caught:
        execute(bad)
    assert caught.value.code == "RE04"
    assert str(output) in str(caught.value)


def test_re02_a_limit_on_file_size_ends_with_exit_6_and_no_output(
    made: Recipe, tmp_path: Path
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_recipe(made))
    paths = os.pathsep.join(str(ROOT / p) for p in ("", "kernels", "eval"))
    done = subprocess.run(
        [sys.executable, "-m", "compressor", "run", str(file)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 6, done.stderr
    assert "RE04" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o002, 0o664)])
def test_re11_all_files_of_the_output_follow_the_umask(mask: int, mode: int, made: Recipe) -> None:
    old = os.umask(mask)
    try:
        output = execute(made).output
    finally:
        os.umask(old)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in output.rglob("*") if p.is_file()}
    assert modes == {mode}
