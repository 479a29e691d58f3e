"""Streaming safetensors writer and manifest: any reader understands them, and bytes repeat."""

from __future__ import annotations

import hashlib
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from compressor.artifact.manifest import Manifest, listed_files, read_manifest, write_manifest
from compressor.artifact.write import DTYPE_NAMES, Entry, Written, write_tensors
from compressor.errors import ResourceError, VerificationError


def entry(name: str, tensor: Tensor) -> Entry:
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def sample() -> dict[str, Tensor]:
    """A tensor of every dtype, an empty one, a scalar, and one that is not contiguous."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 2, (3, 5), generator=generator)
    tensors = {f"t.{name}": raw.to(dtype) for dtype, name in DTYPE_NAMES.items()}
    more = {"empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5)}
    return tensors | more | {"turned": torch.randn(4, 6, generator=generator).t()}


def write(folder: Path, tensors: dict[str, Tensor], limit: int = 1 << 30) -> Written:
    folder.mkdir(parents=True, exist_ok=True)
    return write_tensors([entry(n, t) for n, t in tensors.items()], folder, max_shard_bytes=limit)


def read_all(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            found.update({n: opened.get_tensor(n) for n in opened.keys()})  # noqa: SIM118
    return found


@pytest.mark.parametrize("limit", [1 << 30, 64, 1])
def test_safetensors_reads_back_every_tensor(tmp_path: Path, limit: int) -> None:
    meant = sample()
    write(tmp_path, meant, limit)
    got = read_all(tmp_path)
    assert set(got) == set(meant)
    for name, tensor in meant.items():
        assert got[name].dtype == tensor.dtype
        assert got[name].shape == tensor.shape
        assert (
            got[name]
            .contiguous()
            .flatten()
            .view(torch.uint8)
            .equal(tensor.contiguous().flatten().view(torch.uint8))
        )


def test_shards_keep_the_limit_and_the_index_says_where_everything_is(tmp_path: Path) -> None:
    meant = {f"w{i}": torch.full((25,), float(i)) for i in range(7)}
    written = write(tmp_path, meant, 200)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == written.shards
    assert index["metadata"]["total_size"] == written.total_bytes == 700
    assert sorted(set(written.shards.values())) == [
        f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)
    ]
    for name, file in written.shards.items():
        with safe_open(tmp_path / file, framework="pt") as opened:
            assert opened.get_tensor(name).equal(meant[name])


def test_one_file_has_no_index_and_starts_its_data_on_eight_bytes(tmp_path: Path) -> None:
    write(tmp_path, {"w": torch.ones(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    data = (tmp_path / "model.safetensors").read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0


def test_digests_are_of_the_tensors_bytes(tmp_path: Path) -> None:
    meant = {"a": torch.arange(6, dtype=torch.int32).view(2, 3), "b": torch.ones(2)}
    written = write(tmp_path, meant)
    for name, tensor in meant.items():
        assert written.digests[name] == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, sample(), 100)
    one = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    assert one == {p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()}


def test_only_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def load() -> Tensor:
        assert not any(ref() is not None for ref in alive)
        tensor = torch.zeros(8)
        alive.append(weakref.ref(tensor))
        return tensor

    entries = [Entry(f"w{i}", torch.float32, (8,), load) for i in range(4)]
    write_tensors(entries, tmp_path, max_shard_bytes=64)
    assert len(alive) == 4


@pytest.mark.parametrize("tensor", [torch.zeros(3), torch.zeros(2, dtype=torch.float16)])
def test_a_tensor_that_is_not_what_was_announced_is_an_error(
    tmp_path: Path, tensor: Tensor
) -> None:
    wrong = Entry("w", torch.float32, (2,), lambda: tensor)
    with pytest.raises(VerificationError, match="announced") as caught:
        write_tensors([wrong], tmp_path, max_shard_bytes=100)
    assert caught.value.code == "NU07"


def test_a_folder_that_cannot_be_written_is_a_resource_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError):
        write_tensors([entry("w", torch.ones(2))], tmp_path / "none", max_shard_bytes=100)


MANIFEST = Manifest(
    base={"digest": "d", "model_type": "llama"},
    recipe_sha256="r",
    data={},
    seed=0,
    versions={},
    tensors={"w": "x"},
    formats={},
)


def test_a_manifest_lists_every_file_but_weights_and_reports(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    for name in ("config.json", "kernels/a.py", "model.safetensors", "report.html", "README.md"):
        (tmp_path / name).write_text("x")
    write_manifest(MANIFEST, tmp_path)
    assert set(read_manifest(tmp_path).files) == {"config.json", "kernels/a.py"}
    assert read_manifest(tmp_path).files == listed_files(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"seed": 1}', '{"unknown": 1}', "null", "\xff"])
def test_a_damaged_manifest_is_a_verification_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(VerificationError) as caught:
        read_manifest(tmp_path)
    assert caught.value.code == "CK40"


def test_a_missing_manifest_is_a_verification_error(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="no manifest"):
        read_manifest(tmp_path)
