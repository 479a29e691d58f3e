"""Write a sharded safetensors checkpoint with one tensor in memory at a time.

safetensors' own writer wants all tensors of a file at once. The format is simple enough to stream:
a little-endian length, a JSON header with names, dtypes, shapes and offsets, then the bytes. Sizes
are known beforehand, so the header goes first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compressor.errors import VerificationError, Where
from compressor.run_dir import resource_error

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written: name on disk, dtype, shape, and how to get it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.dtype.itemsize * int(torch.Size(self.shape).numel())


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: SHA-256 of each tensor's bytes, and the shard it lies in."""

    digests: dict[str, str]
    shards: dict[str, str]
    total_bytes: int


def write_tensors(entries: list[Entry], folder: Path, *, max_shard_bytes: int) -> Written:
    """Write entries in order into `model*.safetensors`, with an index if there are several shards.

    Raises:
        ResourceError: disk full or not writable (RE02, RE04).
        VerificationError: a tensor came out with another dtype or shape than announced.
    """
    shards = _split(entries, max_shard_bytes)
    digests: dict[str, str] = {}
    place: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        digests |= _write_shard(shard, folder / name)
        place |= {entry.name: name for entry in shard}
    total = sum(entry.nbytes for entry in entries)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return Written(digests, place, total)


def _split(entries: list[Entry], limit: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _write_shard(entries: list[Entry], path: Path) -> dict[str, str]:
    digests = {}
    try:
        with path.open("wb") as file:
            file.write(_header(entries))
            for entry in entries:
                data = _bytes(entry)
                digests[entry.name] = hashlib.sha256(data).hexdigest()
                file.write(data)
    except OSError as error:
        needed = sum(entry.nbytes for entry in entries)
        raise resource_error(error, path, needed=needed) from error
    return digests


def _header(entries: list[Entry]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(entry: Entry) -> bytes:
    tensor = entry.load().contiguous()
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
        raise VerificationError(
            f"{entry.name} is {tensor.dtype} {tuple(tensor.shape)}, "
            f"announced was {entry.dtype} {entry.shape}",
            code="NU07",
            where=Where(tensor=entry.name),
        )
    return tensor.flatten().view(torch.uint8).numpy().tobytes()
