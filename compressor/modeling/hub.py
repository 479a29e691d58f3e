"""From what a person writes (folder, hub id, "reference") to a local folder.

Only safetensors, JSON and tokenizer files are fetched: pickled weights and Python files stay on
the hub, so that nothing which could run code reaches the disk.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from compressor import reference_model
from compressor.errors import CheckpointError, HubError, Where, printable

WANTED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
)
TRANSPORT = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3")
UNWANTED = ("original/*", "onnx/*", "openvino/*", "*consolidated*")
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?"
HUB_ID = re.compile(rf"{_PART}(?:/{_PART})?")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A local folder; where it came from ("reference", "folder" or the hub id); which commit."""

    path: Path
    source: str
    revision: str | None = None


def resolve_model(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ResolvedModel:
    """Find or fetch a model.

    Args:
        path_or_id: "reference", "reference-draft", a folder, or a hub id such as "org/name".
        revision: branch, tag or commit on the hub; not for folders.
        trust_remote_code: fetch the repository's Python files too.

    Raises:
        CheckpointError: neither a folder nor a possible hub id (CK32).
        HubError: HU01 (offline and not cached), HU03 (network, hub or access).
    """
    name = os.fspath(path_or_id)
    if name == "reference":
        return ResolvedModel(reference_model.base_path(), name)
    if name == "reference-draft":
        return ResolvedModel(reference_model.draft_path(), name)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return ResolvedModel(folder, "folder")
    if not HUB_ID.fullmatch(name) or ".." in name or folder.exists():
        kind = "a file, not a folder" if folder.is_file() else "no such folder, and not a hub id"
        raise CheckpointError(
            f"{kind}: {printable(folder.name or name)!r}",
            code="CK32",
            why="A model is a folder in Hugging Face's layout.",
            fix="give a folder, a hub id such as org/name, or: reference",
        )
    return _fetch(name, revision, (*WANTED, "*.py") if trust_remote_code else WANTED)


def _fetch(name: str, revision: str | None, wanted: tuple[str, ...]) -> ResolvedModel:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    offline = bool(huggingface_hub.constants.HF_HUB_OFFLINE)
    try:
        path = Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(wanted),
                ignore_patterns=list(UNWANTED),
                local_files_only=offline,
            )
        )
    except LocalEntryNotFoundError as error:
        raise (_not_cached(name, revision) if offline else _network(name, error)) from error
    except (OSError, ValueError) as error:
        raise _network(name, error) from error
    except Exception as error:
        if not _is_transport(error):
            raise
        raise _network(name, error) from error
    if offline and not _has_weights(path):
        raise _not_cached(name, revision)
    return ResolvedModel(path, name, path.name if path.parent.name == "snapshots" else revision)


def _is_transport(error: Exception) -> bool:
    """Whether an error comes from the hub's client or the HTTP library below it."""
    return type(error).__module__.partition(".")[0] in TRANSPORT


def _has_weights(path: Path) -> bool:
    return (path / "config.json").exists() and any(path.glob("*.safetensors"))


def _command(name: str, revision: str | None) -> str:
    return f"hf download {name}" + (f" --revision {revision}" if revision else "")


def _not_cached(name: str, revision: str | None) -> HubError:
    import huggingface_hub

    cache = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    return HubError(
        f"{name} is not in the local cache, and HF_HUB_OFFLINE is set",
        code="HU01",
        where=Where(file="config.json"),
        why=f"Cache tried: {cache}",
        fix=f"on a machine with network: {_command(name, revision)}",
    )


def _network(name: str, error: Exception) -> HubError:
    kind = error.__class__.__name__
    if kind in ("RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError"):
        what, fix = "the hub does not give this model", "check the name, or log in: hf auth login"
    else:
        what, fix = "the download failed", "run the same command again: it goes on where it stopped"
    return HubError(
        f"{name}: {what} ({kind})", code="HU03", why=printable(str(error), 200), fix=fix
    )
