"""Whole models from checkpoints: names, experts, dtypes, and faults that are never silent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compressor.errors import CheckpointError, CompressError, UnsupportedError
from compressor.modeling.checkpoint import open_checkpoint
from compressor.modeling.families import disk_name, format_unit
from compressor.modeling.load import load_model, load_tokenizer
from compressor.modeling.skeleton import build_skeleton, empty_model
from compressor.modeling.state import ModelState
from tests.fixtures_models import ARCHITECTURES, build
from tests.stage_fixtures import random_rows

Models = Callable[[str], Path]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loading_gives_the_model_of_transformers(tiny_models: Models, name: str) -> None:
    loaded = load_model(tiny_models(name), packed=False)
    want = AutoModelForCausalLM.from_pretrained(tiny_models(name), dtype=torch.float32)
    rows = random_rows(2, 24)
    with torch.no_grad():
        ours, theirs = loaded.model(rows.tokens).logits, want(rows.tokens).logits
    assert (ours - theirs).abs().max() <= 1e-6
    assert type(loaded.model) is type(want)
    assert not any(p.is_meta for p in loaded.model.state_dict().values())
    assert not loaded.model.training


@pytest.mark.parametrize("name", ["llama_tied", "qwen3_moe", "mixtral"])
def test_a_sharded_bf16_checkpoint_loads_in_the_dtype_asked_for(tmp_path: Path, name: str) -> None:
    path = build(name, tmp_path / name, dtype="bfloat16", max_shard_size="60KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    loaded = load_model(path, packed=False, dtype=torch.bfloat16)
    want = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    rows = random_rows(1, 12)
    with torch.no_grad():
        ours, theirs = loaded.model(rows.tokens).logits, want(rows.tokens).logits
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_generation_works_with_the_loaded_tokenizer(tiny_models: Models) -> None:
    loaded = load_model(tiny_models("llama"), packed=False)
    ids = loaded.tokenizer("The quick brown", return_tensors="pt")["input_ids"]
    out = loaded.model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape[1] > ids.shape[1]


def test_a_tied_head_is_counted_once(tiny_models: Models) -> None:
    tied, own = load_model(tiny_models("llama_tied")), load_model(tiny_models("llama"))
    head = tied.model.get_output_embeddings().weight
    assert head.data_ptr() == tied.model.get_input_embeddings().weight.data_ptr()
    assert own.weight_bytes - tied.weight_bytes == head.nbytes


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


def test_a_broken_tokenizer_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.code == "CK37"


def test_a_missing_tensor_is_never_made_up(tiny_models: Models, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny_models("llama"), path)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match="up_proj"):
        load_model(path)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(UnsupportedError) as caught:
        empty_model({"model_type": "martian"})
    assert caught.value.code == "CK26"


def test_mixtral_keeps_its_old_names_on_disk() -> None:
    names = {
        "mlp.experts.3.gate_proj.weight": "block_sparse_moe.experts.3.w1.weight",
        "mlp.experts.3.down_proj.weight": "block_sparse_moe.experts.3.w2.weight",
        "mlp.experts.3.up_proj.weight_packed": "block_sparse_moe.experts.3.w3.weight_packed",
        "mlp.gate.weight": "block_sparse_moe.gate.weight",
        "self_attn.q_proj.weight": "self_attn.q_proj.weight",
    }
    for ours, theirs in names.items():
        assert disk_name("mixtral", ours) == theirs
        assert disk_name("qwen3_moe", ours) == ours


def test_every_name_of_mixtral_is_on_its_disk(tiny_models: Models) -> None:
    checkpoint = open_checkpoint(tiny_models("mixtral"))
    state = ModelState.of_checkpoint(checkpoint)
    skeleton = state.skeleton()
    found = {state.disk_tensor_name(n) for n in skeleton.outer_names()}
    for position, block in enumerate(skeleton.blocks):
        prefix = f"{skeleton.blocks_name}.{position}."
        found |= {
            state.disk_tensor_name(prefix + disk_name("mixtral", n)) for n in block.state_dict()
        }
    assert found == set(checkpoint.tensors)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_are_found_in_every_architecture(tiny_models: Models, name: str) -> None:
    skeleton = build_skeleton(open_checkpoint(tiny_models(name)).config)
    assert skeleton.num_blocks == (3 if name == "gemma3" else 2)
    assert all(p.is_meta for block in skeleton.blocks for p in block.parameters())


def test_fused_linears_and_experts_share_a_unit() -> None:
    q, v = format_unit("self_attn.q_proj"), format_unit("self_attn.v_proj")
    assert q == v != format_unit("self_attn.o_proj")
    assert format_unit("mlp.gate_proj") == format_unit("mlp.up_proj") != "mlp.down_proj"
    experts = {format_unit(f"mlp.experts.{i}.{n}_proj") for i in (0, 3) for n in ("up", "down")}
    assert experts == {"mlp.experts"}
    assert format_unit("mlp.shared_expert.gate_proj") != format_unit("mlp.gate_proj")


def test_the_generation_settings_of_the_folder_are_kept(tmp_path: Path) -> None:
    path = build("llama", tmp_path / "model")
    settings = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps({**settings, "top_k": 7}))
    assert load_model(path).model.generation_config.top_k == 7


def test_a_header_of_640_bytes_is_not_taken_for_a_pickle(
    tiny_models: Models, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny_models("llama"), path)
    file = path / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    padded = data[8 : 8 + size] + b" " * (0x10280 - size)
    file.write_bytes(len(padded).to_bytes(8, "little") + padded + data[8 + size :])
    assert file.read_bytes().startswith(b"\x80\x02")
    assert open_checkpoint(path).tensors
