"""Names, folders and hub ids become folders; the network's failures become named errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from compressor import reference_model
from compressor.errors import CheckpointError, HubError
from compressor.modeling.hub import resolve_model


def fake_hub(
    monkeypatch: pytest.MonkeyPatch, answer: Path | Exception, *, offline: bool
) -> dict[str, Any]:
    """Replace the download; give back the arguments it was called with."""
    seen: dict[str, Any] = {}

    def snapshot_download(name: str, **arguments: Any) -> str:
        seen.update(arguments, name=name)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    return seen


def snapshot(tmp_path: Path, *, weights: bool = True) -> Path:
    folder = tmp_path / "models--org--name" / "snapshots" / "c0ffee"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if weights:
        (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_reference_names_are_the_embedded_folders():
    assert resolve_model("reference").path == reference_model.base_path()
    assert resolve_model("reference-draft").path == reference_model.draft_path()


def test_a_folder_is_itself(tmp_path: Path):
    found = resolve_model(tmp_path)
    assert (found.path, found.source, found.revision) == (tmp_path, "folder", None)


def test_a_hub_id_is_fetched_without_anything_that_runs_code(monkeypatch, tmp_path: Path):
    folder = snapshot(tmp_path)
    seen = fake_hub(monkeypatch, folder, offline=False)
    found = resolve_model("org/name", revision="main")
    assert (found.path, found.source, found.revision) == (folder, "org/name", "c0ffee")
    assert seen["revision"] == "main"
    assert not {"*.py", "*.bin", "*.pt"} & set(seen["allow_patterns"])


def test_python_files_are_fetched_only_on_request(monkeypatch, tmp_path: Path):
    seen = fake_hub(monkeypatch, snapshot(tmp_path), offline=False)
    resolve_model("org/name", trust_remote_code=True)
    assert "*.py" in seen["allow_patterns"]


@pytest.mark.parametrize("name", ["../x", "/no/such", "a/b/c", "a..b/c", "org/na me", "", "-x/y"])
def test_what_is_neither_folder_nor_id_never_reaches_the_hub(monkeypatch, name: str):
    seen = fake_hub(monkeypatch, RuntimeError("reached"), offline=False)
    with pytest.raises(CheckpointError) as caught:
        resolve_model(name)
    assert caught.value.code == "CK32"
    assert seen == {}


def test_offline_and_not_cached_names_the_cache_and_the_command(monkeypatch):
    seen = fake_hub(monkeypatch, LocalEntryNotFoundError("no"), offline=True)
    with pytest.raises(HubError, match=r"hf download org/name --revision v1") as caught:
        resolve_model("org/name", revision="v1")
    assert caught.value.code == "HU01"
    assert "models--org--name" in str(caught.value)
    assert seen["local_files_only"] is True


def test_a_half_cached_model_counts_as_not_cached(monkeypatch, tmp_path: Path):
    fake_hub(monkeypatch, snapshot(tmp_path, weights=False), offline=True)
    with pytest.raises(HubError) as caught:
        resolve_model("org/name")
    assert caught.value.code == "HU01"


def transport_error() -> Exception:
    import httpx

    return httpx.ConnectTimeout("timed out")


@pytest.mark.parametrize("error", [ConnectionError("dns"), TimeoutError(), transport_error(),
                                   LocalEntryNotFoundError("unreachable")], ids=repr)  # fmt: skip
def test_network_failures_exit_with_nine_and_say_that_it_resumes(monkeypatch, error: Exception):
    fake_hub(monkeypatch, error, offline=False)
    with pytest.raises(HubError, match="goes on where it stopped") as caught:
        resolve_model("org/name")
    assert (caught.value.code, caught.value.exit_code) == ("HU03", 9)


def test_a_bug_is_not_called_a_network_failure(monkeypatch):
    fake_hub(monkeypatch, KeyError("bug"), offline=False)
    with pytest.raises(KeyError):
        resolve_model("org/name")
