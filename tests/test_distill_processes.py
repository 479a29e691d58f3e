"""Several processes started by `accelerate launch`: the same steps, and what a lost one leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fixtures_stages import short_distillation

pytestmark = pytest.mark.slow
Models = Callable[[str], Path]
ROOT = Path(__file__).parents[1]
LAUNCH = ["accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"]


def write_recipe(model: Path, folder: Path, **more: Any) -> Path:
    """A run of one distill stage; the student has one block."""
    keys = short_distillation(folder) | {"student": {"num_hidden_layers": 1}} | more
    keys["data"] = keys["data"].model_dump(exclude_unset=True)
    stages = [{"kind": "distill", **keys}, {"kind": "pack", "kernels_archs": []}]
    body = {"name": "x", "model": {"path": str(model)}, "output": "out", "samples": 0}
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(body | {"stages": stages}))
    return recipe


def start(recipe: Path, folder: Path, *, processes: int) -> subprocess.Popen[str]:
    """`compress run` in a folder of its own; stderr goes to `log`."""
    folder.mkdir(exist_ok=True)
    path = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "eval"))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launch = [*LAUNCH, "--main_process_port", "0"] if processes == 2 else []
    command = [sys.executable, "-m", *launch, *(["-m"] if launch else []), "compressor"]
    with (folder / "log").open("a") as log:
        return subprocess.Popen(
            [*command, "run", str(recipe)], cwd=folder, env=env, stdout=log, stderr=log, text=True
        )


def facts(folder: Path) -> dict[str, Any]:
    """What the distill stage of a finished run told."""
    lines = (folder / "out.run" / "journal.jsonl").read_text().splitlines()
    units = {record["unit"]: record["meta"] for record in map(json.loads, lines)}
    steps = [u["progress"]["losses"] for n, u in units.items() if n.startswith("step")]
    return {"losses": [loss for losses in steps for loss in losses], **units["finished"]}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"on_policy": {"fraction": 0.5, "prefix_tokens": 4}},
        {"train": "lora", "lora": {"rank": 4, "alpha": 4.0}},
    ],
    ids=str,
)
def test_two_processes_take_the_same_steps_as_one(
    tiny_models: Models, tmp_path: Path, more: dict[str, Any]
) -> None:
    recipe = write_recipe(tiny_models("llama"), tmp_path, **more)
    runs = [start(recipe, tmp_path / str(count), processes=count) for count in (1, 2)]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    one, two = facts(tmp_path / "1"), facts(tmp_path / "2")
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["kl_after"] == pytest.approx(one["kl_after"], rel=1e-4)


def test_sharded_blocks_take_the_same_steps_and_go_on_after_a_stop(
    tiny_models: Models, tmp_path: Path
) -> None:
    whole = write_recipe(tiny_models("llama"), tmp_path, hidden_weight=0.5)
    plain = start(whole, tmp_path / "1", processes=1)
    assert plain.wait(timeout=300) == 0
    recipe = write_recipe(tiny_models("llama"), tmp_path, hidden_weight=0.5, sharding="fsdp")
    run = start(recipe, tmp_path / "2", processes=2)
    wait_for(lambda: list((tmp_path / "2").rglob("step-0000002.safetensors")))
    run.send_signal(signal.SIGTERM)
    run.wait(timeout=120)
    assert start(recipe, tmp_path / "2", processes=2).wait(timeout=300) == 0
    one, two = facts(tmp_path / "1"), facts(tmp_path / "2")
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["kl_after"] == pytest.approx(one["kl_after"], rel=1e-4)


def wait_for(condition: Callable[[], Any]) -> Any:
    """The first true value of a condition."""
    for _ in range(2400):
        found = condition()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("waited in vain")


def rank_of(process: psutil.Process) -> str:
    try:
        return str(process.environ().get("RANK", ""))
    except psutil.Error:
        return ""


def test_a_lost_process_ends_the_run_with_one_clear_error_and_it_goes_on(
    tiny_models: Models, tmp_path: Path
) -> None:
    steps = {"steps": 400, "checkpoint_steps": 20, "warmup_steps": 2}
    recipe, folder = write_recipe(tiny_models("llama"), tmp_path, **steps), tmp_path / "run"
    run = start(recipe, folder, processes=2)
    wait_for(lambda: list(folder.rglob("step-*.safetensors")))
    children = psutil.Process(run.pid).children(recursive=True)
    next(c for c in children if rank_of(c) == "1").send_signal(signal.SIGKILL)
    assert run.wait(timeout=120) != 0
    told = (folder / "log").read_text()
    assert "error[KI17]" in told or "stopped; every finished unit" in told
    assert "this is a bug" not in told
    assert start(recipe, folder, processes=1).wait(timeout=300) == 0
    plain = start(recipe, tmp_path / "plain", processes=1)
    assert plain.wait(timeout=300) == 0
    assert facts(folder)["kl_after"] == pytest.approx(
        facts(tmp_path / "plain")["kl_after"], rel=0.02
    )
