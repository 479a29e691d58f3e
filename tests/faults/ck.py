"""Checkpoint faults CK01-CK38: builders that break a sound Llama folder, one way each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compressor.errors import CheckpointError, UnsupportedError
from tests.faults.row import Row

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"
NORM = "model.norm.weight"
Build = Callable[[Path], object]


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_raw(path: Path, header: bytes | dict[str, Any], data: bytes = b"") -> None:
    """A safetensors file with any header."""
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(body).to_bytes(8, "little") + body + data)


def weights(content: bytes) -> Build:
    """Replace the weight file by `content`."""
    return lambda folder: (folder / SINGLE).write_bytes(content)


def header(content: bytes | dict[str, Any], data: bytes = b"") -> Build:
    """Replace the weight file by one with this header."""
    return lambda folder: write_raw(folder / SINGLE, content, data)


def entry(begin: Any = 0, end: Any = 8, *, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    """One tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def edit_header(change: Callable[[dict[str, Any]], object]) -> Build:
    """Change the sound header and keep its data."""

    def build(folder: Path) -> None:
        body, data = split(folder / SINGLE)
        change(body)
        write_raw(folder / SINGLE, body, data)

    return build


def rename(old: str, new: str) -> Build:
    """Give a tensor another name."""
    return edit_header(lambda body: body.__setitem__(new, body.pop(old)))


def config(**changes: Any) -> Build:
    """Set keys of config.json."""

    def build(folder: Path) -> None:
        body = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**body, **changes}))

    return build


def shard(change: Callable[[dict[str, Any]], Any]) -> Build:
    """Turn the folder into one shard with an index, then change the index."""

    def build(folder: Path) -> None:
        (folder / SINGLE).rename(folder / SHARD)
        names = [n for n in split(folder / SHARD)[0] if n != "__metadata__"]
        body: dict[str, Any] = {"metadata": {}, "weight_map": dict.fromkeys(names, SHARD)}
        changed = change(body)
        text = changed if isinstance(changed, bytes) else json.dumps(body).encode()
        (folder / INDEX).write_bytes(text)

    return build


def point_at(value: Any) -> Build:
    """An index that sends one tensor to `value`."""
    return shard(lambda body: body["weight_map"].__setitem__(NORM, value))


def cut(count: int) -> Build:
    """Remove bytes from the end of the weight file."""
    return lambda folder: os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - count)


def append(content: bytes) -> Build:
    """Add bytes to the weight file."""
    return lambda folder: (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes() + content)


def sparse(name: str, head: bytes, size: int) -> Build:
    """A file of `size` bytes that takes no room on disk."""

    def build(folder: Path) -> None:
        (folder / name).write_bytes(head)
        os.truncate(folder / name, size)

    return build


def instead(make: Callable[[Path], object]) -> Build:
    """Put something that is not a regular file in the place of the weights."""

    def build(folder: Path) -> None:
        (folder / SINGLE).unlink()
        make(folder / SINGLE)

    return build


def link_outside(place: Path) -> None:
    """A link to a sound file beside the checkpoint folder."""
    outside = place.parent.parent / "outside.safetensors"
    write_raw(outside, {"t": entry()}, b"\0" * 8)
    place.symlink_to(outside)


def twice(folder: Path) -> None:
    """Two shards that hold the same tensor."""
    shard(lambda body: body["weight_map"].__setitem__("extra", "b.safetensors"))(folder)
    extra = {"extra": entry(), NORM: entry(8, 16)}
    write_raw(folder / "b.safetensors", extra, b"\0" * 16)


def pickled(folder: Path) -> None:
    """A folder from before safetensors."""
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")


def half_pair(shape: list[int]) -> dict[str, Any]:
    """A header whose only entry has this shape."""
    return {"a": entry(shape=shape)}


def _row(fault: str, name: str, build: Build, *tells: str, code: str = "") -> Row:
    kind = UnsupportedError if fault in ("CK26", "CK34", "CK38") else CheckpointError
    return Row(f"{fault} {name}", build, kind, fault, tells)


DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
MANY = b"{" + b",".join(
    b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(200_001)
) + b"}"  # fmt: skip
SIX_HEADS = config(num_attention_heads=6, num_key_value_heads=2, head_dim=None)
PAGE = b"<!DOCTYPE html><html><body>404</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"
TWICE = b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}'
NAMES = {"empty": "", "path": "../../evil", "NUL": "a\0b", "64 KB": "a" * 65536, "RTL": "a\u202eb",
         "newline": "a\nb", "half surrogate": "a\ud800"}  # fmt: skip
ESCAPES = ("../x.safetensors", "/abs.safetensors", "C:\\x.safetensors", "a/../b.safetensors",
           "..", "x\0.safetensors", "model.bin", "")  # fmt: skip
BAD_VALUES = {
    "num_hidden_layers": -1, "hidden_size": "64", "num_attention_heads": True, "vocab_size": 1.5,
    "rms_norm_eps": float("nan"), "tie_word_embeddings": "no", "intermediate_size": 0,
    "rope_theta": -1.0, "num_key_value_heads": [], "max_position_embeddings": 10**12,
}  # fmt: skip

FILES = (
    _row("CK01", "empty shard", weights(b""), SINGLE, "empty"),
    _row("CK03", "git-lfs pointer", weights(POINTER), SINGLE, "git-lfs pointer", "git lfs pull"),
    _row("CK04", "web page", weights(PAGE), SINGLE, "looks like a web page"),
    _row("CK04", "JSON error", weights(b'{"error":"Not Found"}'), "error message"),
    _row("CK05", "data cut", cut(100), SINGLE, "shorter", "tensor", "needed"),
    _row("CK05", "five bytes", weights(b"\1\0\0\0\0"), "5 bytes"),
    _row("CK06", "trailing bytes", append(b"abc"), "3 bytes follow"),
    _row("CK07", "header of 2^63 bytes", weights((1 << 63).to_bytes(8, "little")), "header"),
    _row("CK07", "header beyond the file", weights(b"\xff\0\0\0\0\0\0\0{}"), "255"),
    _row("CK07", "header of 100 MB", sparse(SINGLE, (10**8).to_bytes(8, "little"), 10**9), "limit"),
    _row("CK08", "not JSON", header(b'{"a": oops}'), SINGLE, "not JSON", "byte 14"),
    _row("CK08", "not UTF-8", header(b'{"\xff":1}'), "not UTF-8", "byte 10"),
    _row("CK08", "100k deep", header(DEEP), "nested too deep"),
    _row("CK08", "a list", header(b"[]"), "object"),
    _row("CK08", "huge integer", header(b'{"a":' + b"9" * 9999 + b"}"), "not usable JSON"),
    _row("CK08", "missing dtype", header({"a": {"shape": []}}), "tensor a", "dtype, shape"),
    _row("CK08", "negative shape", header(half_pair([-1])), "natural"),
    _row("CK08", "shape of 2^60", header(half_pair([2**60, 0])), "natural"),
    _row("CK09", "overlap", header({"a": entry(), "b": entry(4, 12)}, b"\0" * 12),
         "a and b overlap"),
    _row("CK09", "hole", header({"a": entry(), "b": entry(12, 20)}, b"\0" * 20),
         "a and b leave a hole"),
    _row("CK09", "reversed", header({"a": entry(8, 0)}, b"\0" * 8), "[8, 0]"),
    _row("CK09", "negative", header({"a": entry(-8, 0)}, b"\0" * 8), "[-8, 0]"),
    _row("CK09", "shape and bytes differ", header({"a": entry(shape=[3])}, b"\0" * 8), "12", "8"),
    _row("CK11", "unknown dtype", header({"a": entry(dtype="Q4_K")}, b"\0" * 8),
         "tensor a", "Q4_K", "BF16"),
    _row("CK12", "duplicate key", header(TWICE), "'a'", "twice"),
    _row("CK12", "tensor in two shards", twice, NORM, SHARD),
    _row("CK14", "200,001 names", header(MANY), "200,000"),
    _row("CK17", "link to outside", instead(link_outside), SINGLE, "leaves the checkpoint folder"),
    _row("CK17", "FIFO", instead(os.mkfifo), "not a regular file"),
    _row("CK17", "device", instead(lambda p: p.symlink_to("/dev/zero")), "leaves"),
    _row("CK17", "folder", instead(Path.mkdir), "not a regular file"),
    _row("CK21", "dangling link", instead(lambda p: p.symlink_to("gone")), SINGLE, "opened"),
    _row("CK21", "link to itself", instead(lambda p: p.symlink_to(SINGLE)), SINGLE, "opened"),
    _row("CK32", "only .bin", pickled, "pytorch_model.bin", "save_pretrained"),
    _row("CK32", "pickle named safetensors", weights(b"PK\x03\x04" + b"\0" * 99), "pickle"),
    _row("CK32", "no config", lambda f: (f / "config.json").unlink(), "config.json"),
    _row("CK38", "fp4", header({"a": entry(dtype="F4")}, b"\0" * 8), "tensor a", "F4"),
    *(_row("CK13", f"name: {n}", header({v: entry()}, b"\0" * 8), "tensor")
      for n, v in NAMES.items()),
)  # fmt: skip
INDEXES = (
    *(_row("CK15", f"weight_map {v!r}", point_at(v), NORM, "plain file name") for v in ESCAPES),
    _row("CK19", "bad JSON", shard(lambda b: b'{"weight_map":\n oops}'), INDEX, ":2", "byte"),
    _row("CK19", "no weight_map", shard(lambda b: b"{}"), INDEX, "weight_map"),
    _row("CK19", "a list", shard(lambda b: b"[]"), INDEX, "object"),
    _row("CK19", "weight_map of numbers", point_at(7), NORM, "int"),
    _row("CK19", "1 GB", lambda f: (shard(lambda b: b)(f), sparse(INDEX, b"{", 10**9)(f)), "1,000"),
    _row("CK21", "shard not there", point_at("gone.safetensors"), "gone.safetensors", NORM),
    _row("CK21", "promised tensor not there",
         shard(lambda b: b["weight_map"].__setitem__("ghost", SHARD)), "ghost"),
)  # fmt: skip
CONFIGS = (
    _row("CK21", "tensor absent", rename(NORM, "model.other"), NORM, "allow_missing"),
    _row("CK23", "wrong shape", edit_header(lambda b: b[NORM].update(shape=[8, 8])),
         NORM, "[8, 8]", "[64]"),
    _row("CK23", "config of another size", config(intermediate_size=256), "[128, 64]", "256"),
    _row("CK29", "vocabulary below the embedding", config(vocab_size=300), "vocab_size"),
    _row("CK29", "heads do not divide", SIX_HEADS, "num_attention_heads", "64"),
    _row("CK29", "kv heads do not divide", config(num_key_value_heads=3), "num_key_value_heads"),
    _row("CK26", "unknown model_type", config(model_type="lamma"), "lamma", "llama"),
    _row("CK26", "no model_type", config(model_type=None), "None", "model_type"),
    *(_row("CK28", f"{k} = {v!r}", config(**{k: v}), k) for k, v in BAD_VALUES.items()),
    _row("CK28", "not JSON", lambda f: (f / "config.json").write_text("{,"), "config.json:1"),
    _row("CK12", "key twice", lambda f: (f / "config.json").write_text('{"a":1,"a":2}'), "'a'"),
    _row("CK30", "python file", lambda f: (f / "modeling_x.py").write_text("raise SystemExit"),
         "wants to run code", "modeling_x.py"),
    _row("CK30", "auto_map", config(auto_map={"AutoModel": "x--y.Z"}), "auto_map in config.json"),
    _row("CK30", "tokenizer auto_map",
         lambda f: (f / "tokenizer_config.json").write_text('{"auto_map":{}}'), "tokenizer_config"),
    _row("CK31", "hub kernel", config(_attn_implementation="kernels-community/x"), "x"),
    _row("CK31", "internal", config(_attn_implementation_internal="sdpa"), "_internal"),
    _row("CK34", "unknown quantization", config(quantization_config={"quant_method": "awq"}),
         "awq", "compressed-tensors"),
    _row("CK34", "quantization without method", config(quantization_config={}), "None"),
)  # fmt: skip
ROWS = (*FILES, *INDEXES, *CONFIGS)
