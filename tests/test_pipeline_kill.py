"""Runs killed at any moment and resumed end with the same bytes (KI03, KI05, KI06, KI09)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kill import compare, digests
from compressor.cli.app import exit_code
from compressor.errors import Interrupted
from compressor.pipeline import RunOptions, run
from compressor.recipe import Recipe, dump_recipe
from compressor.run_dir import StageRun
from tests.fixtures_models import build
from tests.fixtures_pipeline import execute, recipe, stages

BUDGET: dict[str, Any] = {
    "budget": {"average_bits": 5.0, "trials": 1, "profile": "none"},
    "candidates": ["W3A16", "W4A16", "W8A16"],
    "scores": "output_fisher",
}
ROOT = Path(__file__).parent.parent


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program catches it."""


def kill_after(monkeypatch: pytest.MonkeyPatch, commits: int) -> None:
    """Die just after the given number of units were committed."""
    real, left = StageRun._record, [commits]

    def record(self: StageRun, *args: Any) -> None:
        real(self, *args)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(StageRun, "_record", record)


def full(model: Path, folder: Path) -> Recipe:
    """A recipe with pruning, a budget and distillation."""
    made = stages(folder, **BUDGET)
    prune = {"kind": "prune", "pattern": "2:4", "method": "wanda"}
    distill = {"kind": "distill", "data": made[0]["data"], "steps": 2, "batch_size": 2,
               "checkpoint_steps": 1}  # fmt: skip
    return recipe(model, folder, stages=[made[0], prune, made[1], distill, *made[2:]])


def test_a_run_killed_after_each_unit_ends_with_the_same_bytes(
    tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = full(tiny_models("llama"), tmp_path)
    execute(made, run_dir=tmp_path / "plain")
    (tmp_path / "out").rename(tmp_path / "wanted")
    count = len((tmp_path / "plain/journal.jsonl").read_text().splitlines())
    for _ in range(count):  # one and the same run dies after every single unit
        with monkeypatch.context() as patch:
            kill_after(patch, 1)
            with pytest.raises(Killed):
                execute(made, run_dir=tmp_path / "killed")
        assert not (tmp_path / "out").exists()
    execute(made, run_dir=tmp_path / "killed")
    assert compare(digests(tmp_path / "wanted"), digests(tmp_path / "out")) == []
    chains = [(tmp_path / n / "journal.jsonl").read_text() for n in ("plain", "killed")]
    assert chains[0].count("\n") == chains[1].count("\n")


@pytest.mark.parametrize("place", ["write_tensors", "write_manifest", "publish", "write_report"])
def test_a_run_killed_while_writing_the_artifact_leaves_no_output_and_resumes(
    place: str, tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any, **__: Any) -> None:
        raise Killed

    homes = {"publish": "compressor.pipeline", "write_report": "compressor.report"}
    made = recipe(tiny_models("llama"), tmp_path, stages=stages(tmp_path, method="rtn"))
    with monkeypatch.context() as patch:
        patch.setattr(f"{homes.get(place, 'compressor.stages.pack')}.{place}", die)
        with pytest.raises(Killed):
            execute(made)
    assert not (tmp_path / "out").exists()
    resumed = execute(made).output
    other = recipe(tiny_models("llama"), tmp_path, output=str(tmp_path / "x" / "out"),
                   stages=stages(tmp_path, method="rtn"))  # fmt: skip
    assert compare(digests(execute(other).output), digests(resumed)) == []


def command(recipe_file: Path) -> list[str]:
    return [sys.executable, "-m", "compressor", "run", str(recipe_file)]


def start(recipe_file: Path) -> subprocess.Popen[str]:
    paths = os.pathsep.join(str(ROOT / p) for p in ("", "kernels", "eval"))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(recipe_file), env=environment, cwd=recipe_file.parent,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(path: Path, text: str, child: subprocess.Popen[str]) -> None:
    """Until a file holds a text (the child's journal, for example)."""
    limit = time.monotonic() + 120
    while child.poll() is None and time.monotonic() < limit:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"{text} never came: {child.communicate()[1]}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ki09_a_signal_stops_after_the_unit_and_the_resumed_run_skips_it(
    number: int, tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = StageRun._record, []

    def record(self: StageRun, *given: Any) -> None:
        real(self, *given)
        if self.name == "01-quantize" and not asked:
            asked.append(given[0])
            os.kill(os.getpid(), number)

    made = recipe(tiny_models("llama"), tmp_path, stages=stages(tmp_path, method="rtn")[:3])
    monkeypatch.setattr(StageRun, "_record", record)
    with pytest.raises(Interrupted) as caught:
        execute(made)
    assert exit_code(caught.value) == 128 + number
    assert "run the same command again" in caught.value.fix
    units = (tmp_path / "out.run" / "journal.jsonl").read_text()
    assert asked == ["block-0000"]
    assert execute(made).output.is_dir()
    assert (tmp_path / "out.run" / "journal.jsonl").read_text().startswith(units)


def test_sigterm_and_sigkill_and_two_resumes_give_the_bytes_of_an_undisturbed_run(
    tmp_path: Path,
) -> None:
    model = build("llama", tmp_path / "model", num_hidden_layers=6)
    file = tmp_path / "tiny.yaml"
    made = recipe(model, tmp_path, stages=stages(tmp_path)[:3])
    file.write_text(dump_recipe(made))
    journal = tmp_path / "out.run" / "journal.jsonl"
    for unit, number, code in (
        ('"unit": "block-0002"', signal.SIGTERM, 143),
        ('"01-quantize", "unit": "block-0002"', signal.SIGKILL, -9),
    ):
        child = start(file)
        wait_for(journal, unit, child)
        child.send_signal(number)
        text = child.communicate(timeout=60)[1]
        assert child.returncode == code, text
        assert number == signal.SIGKILL or "run the same command again" in text
        assert not (tmp_path / "out").exists()
    child = start(file)
    text = child.communicate(timeout=120)[1]
    assert child.returncode == 0, text
    shown = "compress " + " ".join(command(file)[3:])
    plain = made.model_copy(update={"output": str(tmp_path / "x" / "out")})
    run(plain, RunOptions(command=shown))
    assert compare(digests(tmp_path / "x" / "out"), digests(tmp_path / "out")) == []
