"""Contamination: identical rows and long shared passages are found, common phrases are not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressor.data.contamination import WINDOW, contamination, plain, windows
from compressor.errors import DataError
from tests.stage_fixtures import PACK, W4, Bench

WORDS = ("sun", "moon", "river", "stone", "cloud", "forest", "bird", "road", "winter", "boat")


def text(seed: int, count: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def test_an_identical_row_is_found_whatever_its_spaces_and_case():
    found = contamination([text(1), text(2)], [text(3), text(2).upper().replace(" ", "  ")])
    assert (found.num_rows, found.identical_rows, found.contaminated_rows) == (2, 1, 1)
    assert (found.examples, found.share) == ((1,), 0.5)


def test_a_row_cut_out_of_a_longer_text_is_found():
    found = contamination([text(1, 400)], [" ".join(text(1, 400).split()[100:200])])
    assert (found.identical_rows, found.contaminated_rows) == (0, 1)
    assert found.shared_windows > 0.9


def test_a_common_phrase_is_no_contamination():
    phrase = "once upon a time there was a little girl who loved to play outside in the sun "
    found = contamination([phrase + text(1)], [phrase + text(2)])
    assert found.contaminated_rows == 0
    assert found.shared_windows > 0


@pytest.mark.parametrize("short", ["", "ok", "\N{SNOWMAN}"])
def test_short_rows_are_compared_whole(short: str):
    found = contamination([short], [short, text(1)])
    assert found.identical_rows == bool(plain(short))


def test_about_one_window_in_eight_is_kept_and_always_the_same():
    letters = plain(text(5, 2000))
    assert windows(letters) == windows(letters)
    assert 0.1 < len(windows(letters)) / (len(letters) - WINDOW) < 0.15


def data(rows: list[str], path: Path) -> dict[str, Any]:
    path.write_text("\n".join(json.dumps({"text": r}) for r in rows))
    return {"source": str(path), "num_samples": len(rows), "seq_len": 24}


def evaluated(model: Path, folder: Path, judged: list[str], **keys: Any) -> dict[str, Any]:
    bench = Bench(model, folder / "run")
    calibrate = {"kind": "calibrate", "data": data([text(i) for i in range(6)], folder / "c.jsonl")}
    bench.facts["0-calibrate"] = bench.run(calibrate).facts
    bench.run(W4)
    bench.run(PACK)
    return bench.run({"kind": "evaluate", "data": data(judged, folder / "e.jsonl") | keys}).facts


def test_the_report_warns_of_rows_that_were_calibrated_on(
    tiny_models: Callable[[str], Path], tmp_path: Path
):
    facts = evaluated(tiny_models("llama"), tmp_path, [text(5), text(90), text(91), text(0)])
    assert facts["contamination"]["identical_rows"] == 2
    assert facts["contamination"]["texts"] == ["00-calibrate"]
    assert any("2 of 4 evaluation rows" in note and "CA15" in note for note in facts["notes"])


def test_a_limit_in_the_recipe_refuses_contaminated_text_before_anything_is_measured(
    tiny_models: Callable[[str], Path], tmp_path: Path
):
    with pytest.raises(DataError, match="1 of 2 evaluation rows") as caught:
        evaluated(tiny_models("llama"), tmp_path, [text(90), text(2)], max_contamination=0.1)
    assert caught.value.code == "CA15"
    assert "held-out" in caught.value.fix
