"""The one strict reading of a checkpoint folder, before any library sees it.

A checkpoint is `config.json` plus either `model.safetensors` or shards listed in
`model.safetensors.index.json`. Everything here reads headers only; weights come one tensor at a
time, in memory of their own, through `Checkpoint.read`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import Any

import torch

from compressor.errors import CheckpointError, UnsupportedError, Where, printable
from compressor.modeling.config_rules import check_config, check_no_code
from compressor.modeling.headers import (
    MAX_NAMES,
    FileHeader,
    TensorInfo,
    bad,
    open_regular,
    read_header,
    read_into,
    read_small,
)
from compressor.modeling.strict_json import parse_object

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_CONFIG = 4 * 1024 * 1024
MAX_INDEX = 64 * 1024 * 1024
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder whose config and headers were found sound.

    Attributes:
        path: the folder.
        config: `config.json` as plain data.
        tensors: name -> place, dtype and shape.
        digest: SHA-256 over the config, every header and every file size (no weights are read).
        index_files: the safetensors files, in order of name.
        notes: what a person should know (unexpected tensors, ties saved twice, ...).
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    digest: str
    index_files: tuple[str, ...]
    notes: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)

    def read(self, name: str, *, check_finite: bool = False) -> torch.Tensor:
        """Read one tensor into its own aligned memory.

        Args:
            name: a key of `tensors`.
            check_finite: refuse NaN and infinities (CK24).

        Raises:
            CheckpointError: unknown name (CK21), file changed (CK05), non-finite values (CK24).
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(
                "the checkpoint has no such tensor",
                code="CK21",
                where=Where(file=self.path.name, tensor=name),
                fix="compare the names with: compress inspect MODEL",
            )
        tensor = self._load(info)
        if check_finite:
            check_tensor_finite(tensor, info)
        return tensor

    def read_many(
        self, names: Iterable[str], *, check_finite: bool = False
    ) -> dict[str, torch.Tensor]:
        """Read several tensors; the result keeps the order of `names`."""
        return {name: self.read(name, check_finite=check_finite) for name in names}

    def _load(self, info: TensorInfo) -> torch.Tensor:
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        with open_regular(self.path, info.file) as (file, size):
            if size != self.sizes[info.file]:
                raise bad(
                    f"the file had {self.sizes[info.file]} bytes, now {size}",
                    "CK05",
                    where=Where(file=info.file, tensor=info.name),
                    why="It changed while this program was running.",
                )
            file.seek(info.offset)
            read_into(file, buffer.numpy().data, info.file, info.name)
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        if info.dtype is torch.bool and bool((buffer > 1).any()):
            raise bad(
                "a BOOL tensor holds bytes other than 0 and 1",
                "CK24",
                where=Where(file=info.file, tensor=info.name),
            )
        return buffer.view(info.dtype).reshape(info.shape)

    def content_digest(self) -> str:
        """SHA-256 over the config and every byte of every weight file (streams, slow)."""
        total = hashlib.sha256(self.digest.encode())
        for name in self.index_files:
            total.update(name.encode() + b"\0")
            with open_regular(self.path, name) as (file, _):
                total.update(hashlib.file_digest(file, "sha256").digest())  # type: ignore[arg-type]
        return total.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())


def check_tensor_finite(tensor: torch.Tensor, info: TensorInfo) -> None:
    """Refuse NaN and infinities, with their number and the first index (CK24)."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    flat = tensor.reshape(-1)
    flat = flat.float() if tensor.element_size() == 1 else flat
    broken = ~torch.isfinite(flat)
    count = int(broken.sum())
    if count:
        first = torch.unravel_index(broken.nonzero()[0, 0], tensor.shape)
        index = [int(i) for i in first]
        raise bad(
            f"{count} of {flat.numel()} values are NaN or infinite, the first at {index}",
            "CK24",
            where=Where(file=info.file, tensor=info.name),
            why="A layer with such values cannot be compressed: everything after it breaks.",
            fix="take a sound checkpoint; the file is damaged or the training diverged",
        )


def open_checkpoint(
    path: Path,
    *,
    strict: bool = False,
    trust_remote_code: bool = False,
    allow_missing: Sequence[str] = (),
) -> Checkpoint:
    """Check a checkpoint folder and describe it; reads config, index and headers only.

    Args:
        path: the folder.
        strict: refuse unexpected tensors instead of noting them (CK22).
        trust_remote_code: let the folder contain Python code (it is not run here).
        allow_missing: patterns (`*` as in file names) of tensors that may be absent (CK21).

    Raises:
        CheckpointError: any of the CK faults.
        UnsupportedError: unknown architecture (CK26), quantization (CK34) or dtype (CK38).
    """
    path = Path(path)
    if sys.byteorder != "little":
        raise UnsupportedError(
            "this machine is big-endian",
            code="CK38",
            why="safetensors data is little-endian and is read as it lies.",
        )
    if not path.is_dir():
        raise CheckpointError(
            "there is no such checkpoint folder",
            code="CK32",
            where=Where(file=path.name),
            fix="give the folder of a model",
        )
    raw_config, config = _read_config(path)
    notes = check_no_code(path, config, trusted=trust_remote_code)
    notes += check_config(config, trusted=trust_remote_code)
    files, weight_map, index_notes = _weight_files(path)
    headers = [read_header(path, name) for name in files]
    checkpoint = Checkpoint(
        path=path,
        config=config,
        tensors=MappingProxyType(_merge(headers, weight_map)),
        digest=_digest(raw_config, headers),
        index_files=tuple(files),
        sizes=MappingProxyType({h.file: h.size for h in headers}),
    )
    more, mended = _compare(checkpoint, strict, trust_remote_code, allow_missing)
    notes += index_notes + more
    return replace(checkpoint, config={**config, **mended}, notes=tuple(notes))


def _compare(
    checkpoint: Checkpoint, strict: bool, trusted: bool, allow_missing: Sequence[str]
) -> tuple[list[str], dict[str, Any]]:
    """Notes, and what to mend in the config: a wrong tie flag (transformers unties then, too)."""
    if trusted and "auto_map" in checkpoint.config:
        return ["the model's own code decides which tensors it needs; names were not compared"], {}
    from compressor.modeling.expected import check_complete, expected, false_ties

    want = expected(checkpoint.config)
    notes = check_complete(checkpoint, strict=strict, allow_missing=allow_missing, want=want)
    wrong = false_ties(checkpoint, want)
    if not wrong:
        return notes, {}
    notes = [n for n in notes if not any(n.startswith(f"{a} is tied") for a, _ in wrong)]
    notes += [f"{a} and {b} differ: tie_word_embeddings is taken as false" for a, b in wrong]
    return notes, {"tie_word_embeddings": False}


def _read_config(path: Path) -> tuple[bytes, dict[str, Any]]:
    if not (path / CONFIG).is_symlink() and not (path / CONFIG).exists():
        adapter = (path / "adapter_config.json").exists()
        fix = "merge the adapter into its base model first" if adapter else "give a model's folder"
        raise bad("config.json is missing", "CK32", where=Where(file=CONFIG), fix=fix)
    raw = read_small(path, CONFIG, limit=MAX_CONFIG, code="CK28")
    return raw, parse_object(raw, file=CONFIG, code="CK28")


def _weight_files(path: Path) -> tuple[list[str], dict[str, str], list[str]]:
    """The safetensors files, the index's name -> file map, and notes."""
    single, index = (path / SINGLE), (path / INDEX)
    if single.is_symlink() or single.exists():
        both = [f"{INDEX} is ignored because {SINGLE} is there"] if index.exists() else []
        return [SINGLE], {}, both
    if index.is_symlink() or index.exists():
        weight_map = _read_index(path)
        files = sorted(set(weight_map.values()))
        for name in files:
            if not (path / name).is_symlink() and not (path / name).exists():
                missing = next(t for t, f in weight_map.items() if f == name)
                raise bad(
                    "the index names this shard, and it is not there",
                    "CK21",
                    where=Where(file=name, tensor=missing),
                    why="The download is not complete.",
                )
        others = {f.name for f in path.glob("*.safetensors")} - set(files)
        extra = [f"not in the index, ignored: {', '.join(sorted(others))}"] if others else []
        return files, weight_map, extra
    raise _no_weights(path)


def _no_weights(path: Path) -> CheckpointError:
    names = sorted(f.name for f in path.iterdir())
    pickled = [n for n in names if n.endswith(PICKLED)]
    if pickled:
        return bad(
            f"only pickled weights are here: {', '.join(pickled[:5])}",
            "CK32",
            where=Where(file=pickled[0]),
            why="Pickle can run code when it is opened, so it is never opened here.",
            fix='where you trust it: python -c "from transformers import '
            "AutoModelForCausalLM as M; M.from_pretrained('DIR')"
            ".save_pretrained('NEW')\"",
        )
    found = [n for n in names if n.endswith((".safetensors", ".gguf"))]
    return bad(
        f"neither {SINGLE} nor {INDEX} is in the folder",
        "CK32",
        where=Where(file=path.name),
        why=f"found instead: {', '.join(found[:5]) or 'no weights at all'}",
        fix="give a folder in Hugging Face's layout",
    )


def _read_index(path: Path) -> dict[str, str]:
    raw = read_small(path, INDEX, limit=MAX_INDEX, code="CK19")
    body = parse_object(raw, file=INDEX, code="CK19")
    weight_map = body.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            "weight_map is missing, empty or not an object",
            code="CK19",
            where=Where(file=INDEX, key="weight_map"),
            fix="download the index again",
        )
    if len(weight_map) > MAX_NAMES:
        raise bad(f"more than {MAX_NAMES:,} tensors", "CK14", where=Where(file=INDEX))
    for tensor, file in weight_map.items():
        _check_file_name(tensor, file)
    return weight_map


def _check_file_name(tensor: str, file: Any) -> None:
    if not isinstance(file, str):
        raise CheckpointError(
            f"the value is a {type(file).__name__}, not a file name",
            code="CK19",
            where=Where(file=INDEX, key=f"weight_map.{printable(tensor)}"),
            fix="download the index again",
        )
    plain = PurePosixPath(file).name == file == PureWindowsPath(file).name
    if not (plain and file.isprintable() and ":" not in file and file.endswith(".safetensors")):
        raise CheckpointError(
            f"{printable(file)!r} must be a plain file name ending in .safetensors",
            code="CK15",
            where=Where(file=INDEX, key=f"weight_map.{printable(tensor)}"),
            why="A path in an index could read any file of this machine.",
            fix="put the shards beside the index and name them alone",
        )


def _merge(headers: Sequence[FileHeader], weight_map: Mapping[str, str]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        for info in header.tensors:
            other = tensors.setdefault(info.name, info)
            if other is not info:
                raise bad(
                    f"the tensor lies in {other.file} too",
                    "CK12",
                    where=Where(file=info.file, tensor=info.name),
                    why="Two readers could choose two different values.",
                )
    if len(tensors) > MAX_NAMES:
        raise bad(f"more than {MAX_NAMES:,} tensors", "CK14", where=Where(file=INDEX))
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise bad(
                "the index promises this tensor here, and it is not in the file",
                "CK21",
                where=Where(file=file, tensor=name),
                why="Index and shards do not belong together.",
            )
    return dict(sorted(tensors.items()))


def _digest(raw_config: bytes, headers: Iterable[FileHeader]) -> str:
    total = hashlib.sha256(hashlib.sha256(raw_config).digest())
    for header in headers:
        total.update(hashlib.sha256(header.raw).digest())
        total.update(f"{header.file}\0{header.size}\n".encode())
    return total.hexdigest()
