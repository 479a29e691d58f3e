"""One safetensors file: safe opening, a strict header, exact offsets.

    8 bytes  little-endian unsigned N, the length of the header
    N bytes  JSON {name: {"dtype": "BF16", "shape": [O, I], "data_offsets": [begin, end]}, ...}
    rest     the data; [begin, end) counts from here, and all ranges together cover it exactly

The format's own library checks most of this but names no file in its messages and accepts a
duplicate key; here every refusal says which file, which tensor and which byte.
Specification: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from compressor.errors import CheckpointError, UnsupportedError, Where, printable
from compressor.modeling.strict_json import parse_object

MAX_HEADER = 64 * 1024 * 1024
MAX_NAMES = 200_000
MAX_NAME_LENGTH = 512
MAX_DIMENSION = 2**48
AGAIN = "download that file again, or copy it again from its source"

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
SUB_BYTE_DTYPES = ("F4", "F6_E2M3", "F6_E3M2")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes from absolute byte `offset` of `file`."""

    name: str
    dtype: torch.dtype
    dtype_name: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class FileHeader:
    """What one safetensors file says about itself; `raw` are the header's bytes, for digests."""

    file: str
    size: int
    raw: bytes
    tensors: tuple[TensorInfo, ...]


def bad(
    message: str, code: str, *, where: Where, why: str = "", fix: str = AGAIN
) -> CheckpointError:
    """A CheckpointError whose remedy, if nothing better is known, is to fetch the file again."""
    return CheckpointError(message, code=code, where=where, why=why, fix=fix)


def _may_lead_to(folder: Path, target: Path) -> bool:
    """Whether a file of `folder` may lie at `target`: inside it, or in the blobs of a hub cache."""
    home = folder.resolve()
    if target.is_relative_to(home):
        return True
    if target.parent.name != "blobs":
        return False
    import huggingface_hub

    cache = Path(huggingface_hub.constants.HF_HUB_CACHE).resolve()
    beside = home.parent.name == "snapshots" and target.parent.parent == home.parent.parent
    return beside or target.is_relative_to(cache)


@contextmanager
def open_regular(folder: Path, name: str) -> Iterator[tuple[BinaryIO, int]]:
    """Open `folder/name` for reading; give the file and its size in bytes.

    Links may only lead inside the folder or into the hub cache's blobs; anything that is not a
    regular file (FIFO, device, folder, socket) is refused without waiting on it.
    """
    path = folder / name
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise bad(
            f"cannot be opened ({error.__class__.__name__})", "CK21", where=Where(file=name)
        ) from None
    if not _may_lead_to(folder, target):
        raise bad(
            "the file is a link that leaves the checkpoint folder",
            "CK17",
            where=Where(file=name),
            why="A checkpoint could otherwise read any file of this machine.",
            fix="replace the link by a copy of the file",
        )
    if not stat.S_ISREG(target.lstat().st_mode):
        raise bad(
            "not a regular file",
            "CK17",
            where=Where(file=name),
            fix="remove it and put the file there",
        )
    try:
        descriptor = os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except PermissionError:
        raise bad(
            "no permission to read it", "CK17", where=Where(file=name), fix="chmod u+r the file"
        ) from None
    with os.fdopen(descriptor, "rb", buffering=0) as raw:
        status = os.fstat(raw.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise bad("not a regular file", "CK17", where=Where(file=name))
        yield raw, status.st_size


def read_small(folder: Path, name: str, *, limit: int, code: str) -> bytes:
    """All bytes of a small file (config, index), refused above `limit` bytes."""
    with open_regular(folder, name) as (file, size):
        if size > limit:
            raise bad(
                f"{size:,} bytes; such a file has at most {limit:,}", code, where=Where(file=name)
            )
        return read_exactly(file, size, name)


def read_exactly(file: BinaryIO, count: int, name: str) -> bytes:
    """`count` bytes from the current place, or CK05."""
    buffer = bytearray(count)
    read_into(file, memoryview(buffer), name)
    return bytes(buffer)


def read_into(file: BinaryIO, view: memoryview, name: str, tensor: str = "") -> None:
    """Fill `view` from the current place of `file`, or CK05."""
    done = 0
    while done < len(view):
        got = file.readinto(view[done : done + (1 << 30)])  # type: ignore[attr-defined]
        if not got:
            raise bad(
                f"the file ended {len(view) - done} bytes early",
                "CK05",
                where=Where(file=name, tensor=tensor),
                why="It was cut while this program was reading it.",
            )
        done += got


def read_header(folder: Path, name: str) -> FileHeader:
    """Read and check the header of one safetensors file; its data is not touched."""
    with open_regular(folder, name) as (file, size):
        if size == 0:
            raise bad(
                "the file is empty",
                "CK01",
                where=Where(file=name),
                why="The download did not start.",
            )
        _refuse_text(read_exactly(file, min(size, 512), name), name)
        if size < 8:
            raise bad(
                f"{size} bytes cannot hold a safetensors header", "CK05", where=Where(file=name)
            )
        file.seek(0)
        length = int.from_bytes(read_exactly(file, 8, name), "little")
        if length > MAX_HEADER or length > size - 8:
            raise bad(
                f"the header would be {length:,} bytes long; the file has {size:,} and the "
                f"limit is {MAX_HEADER:,}",
                "CK07",
                where=Where(file=name),
                why="The first eight bytes are not those of a safetensors file.",
            )
        raw = read_exactly(file, length, name)
    if raw.count(b'"data_offsets"') > MAX_NAMES:
        raise bad(f"more than {MAX_NAMES:,} tensors in one file", "CK14", where=Where(file=name))
    body = parse_object(raw, file=name, code="CK08", base=8)
    _check_metadata(body.pop("__metadata__", {}), name)
    start = 8 + length
    tensors = [_tensor(key, entry, name, start) for key, entry in body.items()]
    _check_cover(tensors, name, start, size)
    return FileHeader(name, size, raw, tuple(tensors))


def _refuse_text(first: bytes, name: str) -> None:
    text = first.lstrip().lower()
    if first.startswith(b"version https://git-lfs"):
        raise bad(
            "this is a git-lfs pointer, not the weights",
            "CK03",
            where=Where(file=name),
            why="The repository was cloned without its large files.",
            fix="run: git lfs pull",
        )
    if text.startswith(
        (
            b"<!doctype",
            b"<html",
            b"<?xml",
            b'{"error',
            b"entry not found",
            b"access to model",
            b"invalid username",
        )
    ):
        raise bad(
            "this looks like a web page or an error message, not weights",
            "CK04",
            where=Where(file=name),
            why="The server answered with a page and it was saved under this name.",
        )
    # 0x0280 is also the length of a real header (640 bytes); then the JSON follows at once.
    is_header = first[8:9] == b"{"
    if first.startswith((b"PK\x03\x04", b"\x80\x02")) and not is_header:
        raise bad(
            "this is a pickle file with a safetensors name",
            "CK32",
            where=Where(file=name),
            why="Pickle can run code when it is opened, so it is never opened here.",
            fix="convert it to safetensors where you trust it",
        )


def _check_metadata(metadata: Any, name: str) -> None:
    good = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not good:
        raise bad("__metadata__ must map names to texts", "CK08", where=Where(file=name))


def check_name(name: str, file: str) -> None:
    """Refuse tensor names that no model has: empty, long, unprintable, like a path (CK13)."""
    pathlike = "/" in name or "\\" in name or ".." in name
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable() or pathlike:
        raise bad(
            "a tensor has a name that no model gives",
            "CK13",
            where=Where(file=file, tensor=name or "(empty)"),
            why="Names are dotted and printable; this one could mislead a reader.",
        )


def _tensor(name: str, entry: Any, file: str, start: int) -> TensorInfo:
    check_name(name, file)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad(
            "its entry must be exactly dtype, shape, data_offsets",
            "CK08",
            where=Where(file=file, tensor=name),
        )
    dtype = _dtype(entry["dtype"], file, name)
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape):
        raise bad(
            f"shape {printable(str(shape))} is not a list of natural numbers",
            "CK08",
            where=Where(file=file, tensor=name),
        )
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad(
            f"data_offsets {printable(str(offsets))} are not [begin, end]",
            "CK09",
            where=Where(file=file, tensor=name),
        )
    nbytes, wanted = offsets[1] - offsets[0], math.prod(shape) * dtype.itemsize
    if nbytes != wanted:
        raise bad(
            f"{entry['dtype']} {shape} needs {wanted} bytes, data_offsets give {nbytes}",
            "CK09",
            where=Where(file=file, tensor=name),
        )
    return TensorInfo(name, dtype, entry["dtype"], tuple(shape), file, start + offsets[0], nbytes)


def _dtype(name: Any, file: str, tensor: str) -> torch.dtype:
    if name in SUB_BYTE_DTYPES:
        raise UnsupportedError(
            f"dtype {name} is not supported",
            code="CK38",
            where=Where(file=file, tensor=tensor),
            fix="take the checkpoint in bf16, f16, f32 or fp8",
        )
    if not isinstance(name, str) or name not in DTYPES:
        raise bad(
            f"unknown dtype {printable(str(name))!r}; known: {', '.join(DTYPES)}",
            "CK11",
            where=Where(file=file, tensor=tensor),
        )
    return DTYPES[name]


def _naturals(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(v) is int and 0 <= v < MAX_DIMENSION for v in values)
    )


def _check_cover(tensors: list[TensorInfo], file: str, start: int, size: int) -> None:
    """The ranges follow each other without hole or overlap and end where the file ends."""
    end, previous = start, "(the header)"
    for info in sorted(tensors, key=lambda t: (t.offset, t.offset + t.nbytes)):
        if info.offset != end:
            kind = "overlap" if info.offset < end else "leave a hole"
            raise bad(
                f"{printable(previous)} and {printable(info.name)} {kind}: bytes up to "
                f"{end - start}, then from {info.offset - start}",
                "CK09",
                where=Where(file=file, tensor=info.name),
            )
        end, previous = info.offset + info.nbytes, info.name
        if end > size:
            raise bad(
                f"the file is shorter than its header says: bytes {info.offset}..{end} are "
                f"needed, the file has {size}",
                "CK05",
                where=Where(file=file, tensor=info.name),
                why="The download or copy was cut. Nothing was written.",
            )
    if end < size:
        raise bad(
            f"{size - end} bytes follow after the last tensor",
            "CK06",
            where=Where(file=file, tensor=previous),
            why="The header and the data do not belong together.",
        )
