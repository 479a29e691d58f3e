"""Unusual but sound folders: shards, links, old names, ties saved twice, packed linears."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compressor.errors import CheckpointError, UnsupportedError
from compressor.modeling.checkpoint import open_checkpoint
from compressor.modeling.expected import expected_tensors
from compressor.modeling.headers import DTYPES, read_header
from tests.fixtures_models import build

Models = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]


def resave(source: Path, target: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(source, target)
    save_file(change(load_file(source / "model.safetensors")), target / "model.safetensors")
    return target


def test_shards_read_like_one_file(tiny_models: Models, tmp_path: Path):
    sharded = open_checkpoint(build("llama", tmp_path / "s", max_shard_size="100KB"), strict=True)
    whole = open_checkpoint(tiny_models("llama"))
    assert len(sharded.index_files) > 2
    assert sharded.digest != whole.digest
    assert all(torch.equal(sharded.read(n), whole.read(n)) for n in whole.tensors)


def test_a_read_tensor_is_aligned_and_owns_its_memory(tiny_models: Models):
    checkpoint = open_checkpoint(tiny_models("llama"))
    first = checkpoint.read("model.norm.weight")
    kept = first.clone()
    first.zero_()
    assert first.data_ptr() % 64 == 0
    assert torch.equal(checkpoint.read("model.norm.weight"), kept)


def test_digests_see_a_changed_byte_and_a_changed_config(tiny_models: Models, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_models("llama"), tmp_path / "m"))
    before = open_checkpoint(folder)
    old = before.content_digest()
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    flipped = open_checkpoint(folder)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert flipped.digest == before.digest
    assert flipped.content_digest() != old
    assert open_checkpoint(folder).digest != before.digest


def test_a_file_that_changes_after_opening_is_noticed(tiny_models: Models, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_models("llama"), tmp_path / "m"))
    checkpoint = open_checkpoint(folder)
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="changed"):
        checkpoint.read("model.norm.weight")


def test_nan_and_infinity_are_counted_and_placed(tiny_models: Models, tmp_path: Path):
    def spoil(tensors: Tensors) -> Tensors:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5:7] = torch.tensor(
            [float("nan"), -torch.inf]
        )
        return tensors

    checkpoint = open_checkpoint(resave(tiny_models("llama"), tmp_path / "m", spoil))
    with pytest.raises(CheckpointError, match=r"2 of 8192 .* \[3, 5\]") as caught:
        checkpoint.read("model.layers.1.mlp.up_proj.weight", check_finite=True)
    assert caught.value.code == "CK24"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_is_read_as_it_lies(tmp_path: Path, tiny_models: Models, dtype: torch.dtype):
    raw = torch.randint(0, 2, (3, 16), dtype=torch.uint8)
    wanted = raw.view(dtype) if dtype != torch.bool else raw.bool()
    folder = resave(tiny_models("llama"), tmp_path / "m", lambda t: {**t, "zz.extra": wanted})
    got = open_checkpoint(folder).read("zz.extra", check_finite=True)
    assert got.dtype == dtype
    assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))


def test_links_into_the_blobs_of_a_hub_cache_are_followed(tiny_models: Models, tmp_path: Path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b/snapshots/c0"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in tiny_models("llama").iterdir():
        shutil.copy(file, blobs / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    assert open_checkpoint(snapshot, strict=True).read("model.norm.weight").shape == (64,)


def test_links_into_the_users_own_hub_cache_are_followed(
    tiny_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = Path(shutil.copytree(tiny_models("llama"), tmp_path / "m"))
    blobs = tmp_path / "hub" / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    (folder / "model.safetensors").rename(blobs / "hash")
    (folder / "model.safetensors").symlink_to(blobs / "hash")
    with pytest.raises(CheckpointError, match="leaves"):
        open_checkpoint(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert open_checkpoint(folder, strict=True).notes == ()


def test_gpt2_names_without_their_prefix_and_old_buffers_are_known(
    tiny_models: Models, tmp_path: Path
):
    def old(tensors: Tensors) -> Tensors:
        short = {n.removeprefix("transformer."): t for n, t in tensors.items()}
        return {**short, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}

    checkpoint = open_checkpoint(resave(tiny_models("gpt2"), tmp_path / "m", old), strict=True)
    assert "h.0.attn.c_attn.weight" in checkpoint.tensors
    assert checkpoint.notes == ()


def test_fused_experts_are_as_good_as_single_ones(tiny_models: Models, tmp_path: Path):
    def fuse(tensors: Tensors) -> Tensors:
        rest = {n: t for n, t in tensors.items() if ".experts." not in n}
        for layer in (0, 1):
            stem = f"model.layers.{layer}.mlp.experts"
            part = {p: torch.stack([tensors[f"{stem}.{e}.{p}_proj.weight"] for e in range(4)])
                    for p in ("gate", "up", "down")}  # fmt: skip
            rest[f"{stem}.gate_up_proj"] = torch.cat([part["gate"], part["up"]], 1).contiguous()
            rest[f"{stem}.down_proj"] = part["down"]
        return rest

    open_checkpoint(resave(tiny_models("qwen3_moe"), tmp_path / "m", fuse), strict=True)


def test_a_missing_expert_is_named(tiny_models: Models, tmp_path: Path):
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    without = resave(tiny_models("mixtral"), tmp_path / "m",
                     lambda t: {n: v for n, v in t.items() if n != name})  # fmt: skip
    with pytest.raises(CheckpointError, match=r"experts\.2\.w3") as caught:
        open_checkpoint(without)
    assert caught.value.code == "CK21"


def test_expected_names_are_the_saved_names(tiny_models: Models):
    checkpoint = open_checkpoint(tiny_models("llama_tied"))
    wanted = expected_tensors(checkpoint.config)
    assert wanted == {n: i.shape for n, i in checkpoint.tensors.items()}
    assert "lm_head.weight" not in wanted


def test_a_tie_saved_twice_is_noted(tiny_models: Models, tmp_path: Path):
    def copy(tensors: Tensors) -> Tensors:
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    folder = resave(tiny_models("llama_tied"), tmp_path / "m", copy)
    (note,) = open_checkpoint(folder, strict=True).notes
    assert "lm_head.weight" in note
    assert "saved once" in note


def test_copies_of_a_tie_that_differ_are_kept_apart(tiny_models: Models, tmp_path: Path):
    def differ(tensors: Tensors) -> Tensors:
        return {**tensors, "lm_head.weight": -tensors["model.embed_tokens.weight"]}

    checkpoint = open_checkpoint(resave(tiny_models("llama_tied"), tmp_path / "m", differ))
    assert checkpoint.config["tie_word_embeddings"] is False
    assert "differ" in checkpoint.notes[0]


def test_packed_linears_stand_for_their_weights(tiny_models: Models, tmp_path: Path):
    def pack(tensors: Tensors) -> Tensors:
        stem = "model.layers.0.mlp.up_proj"
        weight = tensors.pop(f"{stem}.weight")
        rows, columns = weight.shape
        return {
            **tensors,
            f"{stem}.weight_packed": torch.zeros(rows, columns // 8, dtype=torch.int32),
            f"{stem}.weight_scale": torch.ones(rows, columns // 32),
            f"{stem}.weight_shape": torch.tensor([rows, columns]),
        }

    folder = resave(tiny_models("llama"), tmp_path / "m", pack)
    body: dict[str, Any] = json.loads((folder / "config.json").read_text())
    body["quantization_config"] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    (folder / "config.json").write_text(json.dumps(body))
    assert open_checkpoint(folder, strict=True).notes == ()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_bytes_never_raise_anything_but_a_named_fault(
    tmp_path: Path, changes: list[tuple[int, int]]
):
    whole = tmp_path / "a.safetensors"
    save_file({"x.weight": torch.ones(3, 2), "y.weight": torch.ones(4)}, whole)
    raw = bytearray(whole.read_bytes())
    for place, value in changes:
        raw[place % len(raw)] = value
    (tmp_path / "b.safetensors").write_bytes(raw)
    with suppress(CheckpointError, UnsupportedError):
        assert read_header(tmp_path, "b.safetensors").size == len(raw)
