"""The report, card and manifest of a tiny run: small, offline, and silent about the machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from compressor.pipeline import RunOptions, run
from compressor.run_dir import RunDir
from tests.fixtures_pipeline import data, recipe, stages, text_file

TOKEN = "hf_abcdefghijklmnopqrstuvwx"
TEXTS = (".json", ".md", ".html", ".yaml", ".jinja")


@pytest.fixture(scope="module")
def output(tiny_models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a token and a home path on its command line, and evaluation text seen before."""
    folder = tmp_path_factory.mktemp("home") / "alice-secret"
    folder.mkdir()
    chosen = stages(folder)
    seen = text_file(folder / "seen.jsonl", start=4, count=12)  # 8 of 12 are calibration text
    chosen[-1]["data"] = data(seen, 4)
    made = recipe(tiny_models("llama"), folder, stages=chosen, samples=1)
    command = f"HF_TOKEN={TOKEN} compress run {folder}/tiny.yaml -o /home/bob/out"
    return run(made, RunOptions(command=command)).output


def published(output: Path) -> dict[str, str]:
    """Every text file that we write into the artifact."""
    files = [p for p in output.rglob("*") if p.suffix in TEXTS and "kernels" not in p.parts]
    return {p.name: p.read_text() for p in files if not p.name.startswith("tokenizer")}


def test_the_report_is_one_small_page_that_asks_for_nothing(output: Path) -> None:
    page = (output / "report.html").read_text()
    assert len(page) < 1_000_000
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", page)
    assert "default-src 'none'" in page
    assert "@import" not in page


def test_hu06_no_token_is_published(output: Path) -> None:
    assert [n for n, text in published(output).items() if TOKEN in text] == []


def test_hu07_no_path_and_no_user_name_is_published(output: Path) -> None:
    places = ("alice-secret", "/home/", "bob", str(output.parent), "/tmp/")
    found = {(n, p) for n, text in published(output).items() for p in places if p in text}
    assert found == set()


def test_what_is_published_is_what_was_looked_at(output: Path) -> None:
    names = {"config.json", "manifest.json", "README.md", "report.html", "report.json"}
    assert set(published(output)) >= names


def test_ca15_the_report_and_the_card_say_how_many_rows_were_seen_before(output: Path) -> None:
    notes = json.loads((output / "report.json").read_text())["notes"]
    assert any(
        re.search(r"4 of 4 evaluation rows .* 4 of them letter for letter", n) for n in notes
    )
    assert "evaluation rows" in (output / "README.md").read_text()


def test_the_report_says_what_was_calibrated_on(output: Path) -> None:
    told = json.loads((output / "report.json").read_text())["data"]
    for piece in ("8 rows of 32 tokens", "unknown tokens", "documents", "digest", "4 of 4 rows"):
        assert piece in told, told


def test_the_log_and_the_journal_hold_no_token(output: Path) -> None:
    run_dir = output.with_name("out.run")
    with RunDir.open(run_dir.with_name("again.run"), identity={}) as folder:
        folder.log({"event": "x", "text": TOKEN})
        assert TOKEN not in (folder.path / "log.jsonl").read_text()
    texts = [p.read_text() for p in run_dir.iterdir() if p.is_file()]
    assert not any(TOKEN in text for text in texts)


def test_the_card_tells_formats_sizes_quality_and_the_command(output: Path) -> None:
    card = (output / "README.md").read_text()
    for piece in ("W4A16 g32", "perplexity", "MiB", "compress run", "8 rows of 32 tokens"):
        assert piece in card, piece
