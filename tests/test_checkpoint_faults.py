"""Every checkpoint fault: error class, exit code, message; and nothing in the folder is touched."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from compressor.errors import CheckpointError
from compressor.modeling.checkpoint import open_checkpoint
from tests.faults.ck import ROWS, SINGLE, config, edit_header, rename
from tests.faults.row import Row, folder_digest

Models = Callable[[str], Path]


@pytest.fixture
def folder(tiny_models: Models, tmp_path: Path) -> Path:
    """A sound Llama folder of one's own."""
    return Path(shutil.copytree(tiny_models("llama"), tmp_path / "model"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_broken_checkpoint_is_refused_with_its_fault_and_left_alone(row: Row, folder: Path):
    row.build(folder)
    before = folder_digest(folder)
    with pytest.raises(row.error) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert caught.value.code == row.code
    assert all(piece in message for piece in row.tells), message
    assert caught.value.fix
    assert message.isascii() or message.replace("…", "").isascii()
    assert str(folder) not in message
    assert folder_digest(folder) == before


def test_a_huge_header_is_refused_at_once(folder: Path):
    (folder / SINGLE).write_bytes((1 << 63).to_bytes(8, "little") + b"{}")
    open_checkpoint_twice = [_seconds_to_refuse(folder) for _ in range(2)]
    assert min(open_checkpoint_twice) < 0.05


def _seconds_to_refuse(folder: Path) -> float:
    start = time.perf_counter()
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)
    return time.perf_counter() - start


def test_an_unexpected_tensor_is_noted_and_refused_when_strict(folder: Path):
    edit_header(lambda body: body.update({"model.extra.weight": _empty()}))(folder)
    assert any("model.extra.weight" in note for note in open_checkpoint(folder).notes)
    with pytest.raises(CheckpointError, match=r"model\.extra\.weight") as caught:
        open_checkpoint(folder, strict=True)
    assert caught.value.code == "CK22"


def _empty() -> dict[str, object]:
    return {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def test_a_tensor_may_be_missing_by_request(folder: Path):
    rename("model.norm.weight", "model.other")(folder)
    notes = open_checkpoint(folder, allow_missing=["model.norm.*"]).notes
    assert any("model.norm.weight" in note and "missing" in note for note in notes)


def test_trusted_code_is_noted_and_not_run(folder: Path):
    (folder / "modeling_x.py").write_text("raise SystemExit")
    notes = open_checkpoint(folder, trust_remote_code=True).notes
    assert any("modeling_x.py" in note for note in notes)


def test_an_absurd_layer_count_builds_no_model(folder: Path):
    config(num_hidden_layers=10**9)(folder)
    assert _seconds_to_refuse(folder) < 1


def test_null_leaves_a_config_key_to_its_default(folder: Path):
    config(head_dim=None, sliding_window=None, rope_theta=None)(folder)
    assert open_checkpoint(folder, strict=True).notes == ()
