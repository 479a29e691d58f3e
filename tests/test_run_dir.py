"""Run folders survive kills, refuse strangers and publish whole folders only."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compressor.errors import Interrupted, OutputError, RecipeError, ResourceError
from compressor.run_dir import RunDir, check_output, publish, recover_output, write_atomic
from compressor.run_dir.lock import Holder
from compressor.run_dir.log import redact

IDENTITY = {"recipe": "a", "model": "b", "version": "1"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def run(folder: Path) -> Iterator[RunDir]:
    with RunDir.open(folder, identity=IDENTITY) as opened:
        yield opened


def fill(folder: Path, units: int = 3) -> None:
    with RunDir.open(folder, identity=IDENTITY) as run:
        stage = run.stage(1, "quantize")
        for index in range(units):
            stage.commit(f"block-{index:04d}", {"w": torch.full((4,), float(index))}, {"i": index})


def done(folder: Path, units: int = 3) -> list[bool]:
    with RunDir.open(folder, identity=IDENTITY) as run:
        stage = run.stage(1, "quantize")
        return [stage.is_done(f"block-{index:04d}") for index in range(units)]


def test_a_committed_unit_is_found_again_with_its_meta(folder: Path) -> None:
    fill(folder)
    with RunDir.open(folder, identity=IDENTITY) as run:
        stage = run.stage(1, "quantize")
        assert stage.is_done("block-0002")
        assert stage.meta("block-0002") == {"i": 2}
        assert stage.file("block-0002").is_file()
        assert not stage.is_done("block-0003")


def test_two_equal_runs_leave_equal_units_and_chains(tmp_path: Path) -> None:
    chains = []
    for name in ("a", "b"):
        fill(tmp_path / name)
        lines = (tmp_path / name / "journal.jsonl").read_text().splitlines()
        chains.append([json.loads(line)["chain"] for line in lines])
    assert chains[0] == chains[1]
    files = [tmp_path / n / "units/01-quantize/block-0001.safetensors" for n in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_flipped_bit_redoes_the_unit_and_the_later_ones(folder: Path) -> None:
    fill(folder)
    file = folder / "units/01-quantize/block-0001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert done(folder) == [True, False, False]


def test_a_missing_unit_file_is_never_used(folder: Path) -> None:
    fill(folder)
    (folder / "units/01-quantize/block-0000.safetensors").unlink()
    assert done(folder) == [False, False, False]


def test_redone_units_take_their_old_place(folder: Path) -> None:
    fill(folder)
    (folder / "units/01-quantize/block-0001.safetensors").unlink()
    with RunDir.open(folder, identity=IDENTITY) as run:
        stage = run.stage(1, "quantize")
        assert not stage.is_done("block-0001")
        stage.commit("block-0001", {"w": torch.full((4,), 1.0)}, {"i": 1})
    assert done(folder) == [True, True, False]


def test_a_torn_last_line_is_dropped_and_appending_goes_on(folder: Path) -> None:
    fill(folder)
    journal = folder / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    assert done(folder) == [True, True, False]
    assert journal.read_bytes().endswith(b"\n")


def test_a_changed_journal_line_is_not_used(folder: Path) -> None:
    fill(folder)
    journal = folder / "journal.jsonl"
    journal.write_text(journal.read_text().replace('"i": 1', '"i": 7'))
    assert done(folder) == [True, False, False]


@pytest.mark.parametrize("line", ["null", "[1]", "{}", "\x00\xff", "[" * 100_000])
def test_rubbish_in_the_journal_is_skipped(folder: Path, line: str) -> None:
    fill(folder, 1)
    with (folder / "journal.jsonl").open("a") as file:
        file.write(line + "\n")
    assert done(folder, 1) == [True]


def test_a_changed_recipe_is_refused_by_name_and_fresh_starts_anew(folder: Path) -> None:
    fill(folder)
    with pytest.raises(RecipeError, match="changed: model, recipe") as caught:
        RunDir.open(folder, identity={**IDENTITY, "recipe": "x", "model": "y"})
    assert caught.value.code == "KI13"
    with RunDir.open(folder, identity={**IDENTITY, "recipe": "x"}, fresh=True) as run:
        assert not run.stage(1, "quantize").is_done("block-0000")


def test_a_second_run_in_the_same_folder_is_refused(run: RunDir) -> None:
    with pytest.raises(OutputError, match=f"process {os.getpid()} on") as caught:
        RunDir.open(run.path, identity=IDENTITY)
    assert caught.value.code == "KI11"


def test_the_lock_of_a_killed_run_is_taken_over_with_a_note(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(folder)
    holder = {"pid": 2**22 + 1, "host": os.uname().nodename, "created": 1.0, "started_utc": "x"}
    (folder / "lock").write_text(json.dumps(holder))
    with caplog.at_level(logging.WARNING, "compressor"):
        assert done(folder) == [True, True, True]
    assert "took over the lock" in caplog.text


def test_the_lock_of_another_host_needs_break_lock(folder: Path) -> None:
    fill(folder)
    holder = {"pid": 1, "host": "elsewhere", "created": 1.0, "started_utc": "2026-01-01"}
    (folder / "lock").write_text(json.dumps(holder))
    with pytest.raises(OutputError, match="elsewhere") as caught:
        RunDir.open(folder, identity=IDENTITY)
    assert caught.value.code == "KI12"
    RunDir.open(folder, identity=IDENTITY, break_lock=True).close()


def test_a_reused_pid_is_not_the_holder() -> None:
    holder = Holder(os.getpid(), os.uname().nodename, created=1.0, started_utc="x")
    assert not holder.is_alive


def test_leftovers_of_killed_writers_are_swept(folder: Path) -> None:
    fill(folder)
    leftovers = [
        folder / "units/01-quantize/block-0003.safetensors.tmp",
        folder / "units/.tmp4hsj",
    ]
    for file in leftovers:
        file.write_bytes(b"half")
    done(folder)
    assert not any(file.exists() for file in leftovers)


def test_a_folder_that_is_no_run_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match="not a run folder"):
        RunDir.open(tmp_path, identity=IDENTITY, fresh=True)
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_at_the_next_unit(run: RunDir, number: signal.Signals) -> None:
    stage = run.stage(0, "quantize")
    stage.progress({"unit": "block-0000"})
    os.kill(os.getpid(), number)
    assert stage.stop_requested()
    with pytest.raises(Interrupted) as caught:
        stage.progress({"unit": "block-0001"})
    assert caught.value.signal == number
    assert "resume" in caught.value.fix


def test_the_second_ctrl_c_stops_at_once(run: RunDir) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_signal_handlers_are_put_back(folder: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    fill(folder)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_full_disk_is_told_with_mount_and_need(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("compressor.run_dir.files._write_synced", full)
    with pytest.raises(ResourceError, match="bytes free, this file needs") as caught:
        run.stage(0, "quantize").commit("block-0000", {"w": torch.zeros(2)}, {})
    assert caught.value.code == "RE02"
    assert not run.stage(0, "quantize").is_done("block-0000")


def test_a_journal_that_cannot_grow_stays_valid(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = run.stage(0, "calibrate")
    stage.commit_meta("tokens", {"rows": 3})
    before = (run.path / "journal.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        error = OSError(errno.ENOSPC, "full")
        patch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(error))
        with pytest.raises(ResourceError):
            stage.commit_meta("more", {})
    assert (run.path / "journal.jsonl").read_bytes() == before
    assert not stage.is_done("more")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_names_path_and_uid(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(ResourceError, match=f"uid {os.getuid()}") as caught:
        write_atomic(tmp_path / "x", b"")
    assert caught.value.code == "RE04"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomic(pipe, b"recipe")
    assert os.read(reader, 10) == b"recipe"
    os.close(reader)
    assert pipe.is_fifo()


def test_file_modes_follow_the_umask(folder: Path) -> None:
    old = os.umask(0o027)
    try:
        fill(folder)
    finally:
        os.umask(old)
    modes = {p.stat().st_mode & 0o777 for p in folder.rglob("*") if p.is_file()}
    assert modes == {0o640}


def model_folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "config.json").write_text(content)
    return path


def test_publish_moves_the_folder_and_refuses_to_replace(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    publish(model_folder(tmp_path / "new", "1"), out, overwrite=False)
    assert (out / "config.json").read_text() == "1"
    with pytest.raises(OutputError):
        publish(model_folder(tmp_path / "new", "2"), out, overwrite=False)
    assert (out / "config.json").read_text() == "1"
    publish(tmp_path / "new", out, overwrite=True)
    assert (out / "config.json").read_text() == "2"
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"]


def test_overwrite_never_replaces_a_folder_that_is_no_model(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("x")
    with pytest.raises(OutputError, match="model folders only"):
        check_output(home, overwrite=True)


def test_a_kill_between_the_two_renames_is_repaired(tmp_path: Path) -> None:
    out = tmp_path / "out"
    model_folder(tmp_path / ".out.old", "old")
    recover_output(out)
    assert (out / "config.json").read_text() == "old"
    model_folder(tmp_path / ".out.old", "older")
    recover_output(out)
    assert (out / "config.json").read_text() == "old"
    assert not (tmp_path / ".out.old").exists()


def test_a_killed_process_loses_at_most_the_unit_at_hand(folder: Path) -> None:
    code = f"""
import os, signal, torch
from pathlib import Path
from compressor.run_dir import RunDir
run = RunDir.open(Path({str(folder)!r}), identity={IDENTITY!r})
stage = run.stage(1, "quantize")
stage.commit("block-0000", {{"w": torch.zeros(4)}}, {{}})
stage.file("block-0001").with_suffix(".safetensors.tmp").write_bytes(b"half")
os.kill(os.getpid(), signal.SIGKILL)
"""
    paths = os.pathsep.join(p for p in sys.path if p)
    process = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, check=False
    )
    assert process.returncode == -signal.SIGKILL
    assert done(folder, 2) == [True, False]


def test_access_tokens_are_blacked_out() -> None:
    assert redact("token hf_abcdefghijklmnopqrstuvwxyz in use") == "token *** in use"
