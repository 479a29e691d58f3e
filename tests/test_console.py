"""Progress goes to stderr in the form its reader wants; results stay on stdout."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import pytest

from compressor import console

Output = pytest.CaptureFixture[str]
progress = logging.getLogger("compressor.progress")


def tell(**event: Any) -> None:
    progress.info("%s", event, extra={"event": event})


def test_in_a_pipe_progress_is_plain_lines(capsys: Output) -> None:
    with console.session():
        tell(stage="01-quantize", unit="block-0000", index=1, total=2, loss=0.0123)
        tell(stage="01-quantize", unit="block-0001", index=2, total=2)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0].startswith("01-quantize  block-0000  1/2  loss 0.0123  ")
    assert lines[1].endswith("GiB")


def test_plain_lines_do_not_flood(capsys: Output) -> None:
    with console.session():
        for index in range(1, 101):
            tell(stage="02-distill", unit="step", index=index, total=100)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_each_kind_of_unit_is_a_phase_of_its_own() -> None:
    first = {"stage": "01-quantize", "unit": "swap-in-0003"}
    assert console.phase_of(first) == "01-quantize swap-in"
    assert console.phase_of({**first, "unit": "block-0001"}) == "01-quantize block"
    assert console.phase_of({}) == ""


def test_with_json_progress_is_json_lines_on_stderr(capsys: Output) -> None:
    with console.session(as_json=True):
        tell(stage="01-quantize", unit="b", index=1, total=2, loss=float("nan"))
        logging.getLogger("compressor.x").warning("careful")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first["loss"] is None
    assert first["rss_bytes"] > 0
    assert second["message"] == "careful"


def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with console.session():
        tell(stage="01-quantize", unit="[red]block", index=1, total=2, loss=0.5)
        logging.getLogger("compressor").warning("[bold]careful")
    assert "01-quantize" in terminal.getvalue()
    assert "[bold]careful" in terminal.getvalue()


def test_warnings_and_notes_are_shown_and_details_are_not(capsys: Output) -> None:
    with console.session():
        logging.getLogger("compressor.run_dir").debug("quiet")
        logging.getLogger("compressor.run_dir").info("good to know")
        logging.getLogger("compressor.run_dir").warning("loud")
    assert capsys.readouterr().err == "note: good to know\nwarning: loud\n"


def test_a_session_leaves_logging_as_it_was() -> None:
    ours = logging.getLogger("compressor")
    before = (ours.level, ours.propagate, list(ours.handlers))
    with console.session():
        pass
    assert (ours.level, ours.propagate, list(ours.handlers)) == before


def test_a_table_shows_hostile_names_as_they_are(capsys: Output) -> None:
    console.show_table([{"name": "[red]x\x1b[31m", "bits": 4}, {"name": "y", "bits": 8}])
    out = capsys.readouterr().out
    assert "[red]x\\x1b[31m" in out
    assert "\x1b" not in out


def test_json_has_no_numbers_that_json_lacks(capsys: Output) -> None:
    console.show_json({"a": [float("inf"), 1.5], "b": {"c": float("nan")}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": {"c": None}}
