"""Quantized heads and embeddings, tied or not, and the scales of an fp8 cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.algorithms.input_rounding import round_inputs
from compressor.artifact.manifest import read_manifest
from compressor.errors import RecipeError, UnsupportedError, VerificationError
from compressor.modeling.checkpoint import open_checkpoint
from compressor.modeling.load import load_model
from compressor.modeling.state import ModelState
from compressor.recipe import QuantizeConfig, needs_calibration, parse_recipe
from compressor.stages import verify_logits
from compressor.stages.outer import outer_bytes
from compressor.stages.verify import verify_artifact
from tests.fixtures_models import build
from tests.stage_fixtures import Built, build_artifact, random_rows

pytestmark = pytest.mark.usefixtures("quiet_transformers")

BOTH = {"head": "W8A16", "embeddings": "W8A16"}
QUANTIZE: dict[str, Any] = {
    "kind": "quantize",
    "scheme": "W4A16",
    "group_size": 32,
    "method": "rtn",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`built("llama", head="W8A16")`: an artifact, made once."""
    root, known = tmp_path_factory.mktemp("outer"), dict[str, Built]()

    def get(name: str, **keys: Any) -> Built:
        key = json.dumps([name, keys])
        if key not in known:
            folder = root / str(len(known))
            model = build(name, folder / "model")
            known[key] = build_artifact(model, folder / "run", {**QUANTIZE, **keys})
        return known[key]

    return get


@torch.no_grad()
def logits(artifact: Path, *, packed: bool = True) -> Tensor:
    model = load_model(artifact, packed=packed, dtype=torch.float32).model
    out: Tensor = model(random_rows(2, 20).tokens).logits
    return out


def theirs(artifact: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        artifact, dtype=torch.float32, output_loading_info=True
    )
    # Gemma's embed_scale is a constant of the class that compressed-tensors lists as missing
    missing = {n for n in info.pop("missing_keys") if not n.endswith("embed_scale")}
    assert not missing, missing
    assert not any(info.values()), info
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma2", "gpt_neox"])
def test_transformers_reads_8_bit_heads_and_embeddings(built: Any, name: str) -> None:
    artifact = built(name, **BOTH).artifact
    want = theirs(artifact)(random_rows(2, 20).tokens).logits
    for packed in (True, False):
        assert (logits(artifact, packed=packed) - want).norm() <= 1e-5 * want.norm()
    verify_artifact(artifact)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["W8A16", "W4A16"])
def test_transformers_reads_an_untied_head(built: Any, scheme: str) -> None:
    artifact = built("llama", head=scheme).artifact
    want = theirs(artifact)(random_rows(2, 20).tokens).logits
    assert (logits(artifact) - want).norm() <= 1e-5 * want.norm()
    bits = {"W8A16": 8, "W4A16": 4}[scheme]
    assert read_manifest(artifact).formats["lm_head"]["bits"] == bits


def test_a_tied_matrix_is_stored_once_and_used_for_both(built: Any) -> None:
    artifact = built("llama_tied", embeddings="W8A16").artifact
    tensors = load_file(artifact / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.int8
    assert [n for n in tensors if n.startswith("lm_head")] == ["lm_head.weight_scale"]
    model = load_model(artifact, packed=False).model
    assert torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


def test_4_bit_embeddings_compute_with_what_is_stored(built: Any) -> None:
    for name in ("llama", "llama_tied"):
        artifact = built(name, head="W4A16", embeddings="W4A16", engines=["ours"]).artifact
        verify_artifact(artifact)
        packed, dense = logits(artifact), logits(artifact, packed=False)
        assert (packed - dense).norm() <= 1e-5 * dense.norm()


def test_8_bits_outside_of_the_blocks_change_little(built: Any) -> None:
    plain, both = logits(built("llama").artifact), logits(built("llama", **BOTH).artifact)
    assert 0 < (plain - both).norm() < 0.01 * plain.norm()


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt_neox"])
def test_the_bytes_are_those_announced(built: Any, name: str) -> None:
    config = QuantizeConfig(**{**QUANTIZE, **BOTH})
    state = ModelState.of_checkpoint(open_checkpoint(built(name, **BOTH).model))
    before, after = outer_bytes(config, state)
    sizes = [
        sum(
            t.nbytes for t in load_file(built(name, **keys).artifact / "model.safetensors").values()
        )
        for keys in ({}, BOTH)
    ]
    assert sizes[0] - sizes[1] == before - after


def test_large_models_are_verified_block_by_block(
    built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_logits, "WHOLE_MODEL_BYTES", 0)
    for name in ("llama_tied", "gpt_neox"):
        assert verify_logits.WALKED in verify_artifact(built(name, **BOTH).artifact).notes


def test_a_tied_head_with_other_scales_is_found(built: Any, tmp_path: Path) -> None:
    from compressor.stages.verify import _check_packing

    built_here = built("llama_tied", **BOTH)
    checkpoint = open_checkpoint(built_here.artifact)
    formats = dict(built_here.state.outer_formats)
    _check_packing(checkpoint, "lm_head", formats)
    with pytest.raises(VerificationError, match="scales of its own"):
        _check_packing(checkpoint, "lm_head", {"lm_head": formats["lm_head"]})


def test_two_formats_for_one_tied_matrix_are_refused(tmp_path: Path) -> None:
    model = build("llama_tied", tmp_path / "model")
    stage = {**QUANTIZE, "head": "W4A16", "embeddings": "W8A16", "engines": ["ours"]}
    with pytest.raises(RecipeError, match="one tied matrix"):
        build_artifact(model, tmp_path / "run", stage)


def test_a_4_bit_head_on_a_tied_model_is_refused_for_transformers(tmp_path: Path) -> None:
    model = build("llama_tied", tmp_path / "model")
    with pytest.raises(RecipeError, match="tied") as caught:
        build_artifact(model, tmp_path / "run", {**QUANTIZE, "head": "W4A16"})
    assert caught.value.code == "RC17"


@pytest.mark.parametrize(("embeddings", "engine"), [
    ("W4A16", "transformers"), ("W8A16", "vllm"), ("W8A16", "sglang"),
])  # fmt: skip
def test_embeddings_that_an_engine_cannot_read_are_refused(embeddings: str, engine: str) -> None:
    text = f"""
name: x
model: {{path: reference}}
output: out
stages:
  - {{kind: calibrate}}
  - {{kind: quantize, embeddings: {embeddings}, engines: [{engine}]}}
  - {{kind: pack}}
"""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, file="x.yaml")
    assert caught.value.code == "RC17"
    assert "embeddings" in caught.value.message


# ------------------------------------------------------------------ the cache


@torch.no_grad()
def test_scales_of_keys_and_values_are_the_largest_over_448(built: Any) -> None:
    result = built("qwen3", kv_cache="fp8")
    tensors = load_file(result.artifact / "model.safetensors")
    scales = {n: t for n, t in tensors.items() if n.endswith(("k_scale", "v_scale"))}
    assert len(scales) == 4
    model = load_model(result.artifact, dtype=torch.float32).model
    cache = model(random_rows().tokens[:8], use_cache=True).past_key_values  # the 9th is held out
    for index, layer in enumerate(cache.layers):
        for leaf, values in (("k", layer.keys), ("v", layer.values)):
            want = values.abs().max() / 448
            got = tensors[f"model.layers.{index}.self_attn.{leaf}_scale"]
            assert torch.isclose(got, want, rtol=1e-4)


@torch.no_grad()
def test_transformers_rounds_its_cache_and_computes_the_same_without(built: Any) -> None:
    artifact = built("llama", kv_cache="fp8").artifact
    tokens = random_rows(2, 20).tokens
    model, ours = theirs(artifact), logits(artifact)
    rounded = model(tokens).logits
    for module in model.modules():
        if hasattr(module, "kv_cache"):
            module.quantization_enabled = False
    plain = model(tokens).logits
    assert (plain - ours).norm() <= 1e-5 * plain.norm()
    assert 0 < (rounded - plain).norm() < 0.2 * plain.norm()


def test_our_runtime_says_that_it_does_not_round_the_cache(built: Any) -> None:
    artifact = built("llama", kv_cache="fp8").artifact
    assert any("fp8 cache" in note for note in load_model(artifact).notes)
    config = json.loads((artifact / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["num_bits"] == 8
    verify_artifact(artifact)


def test_a_cache_that_the_library_does_not_know_is_refused(tmp_path: Path) -> None:
    model = build("gpt_neox", tmp_path / "model")
    with pytest.raises(UnsupportedError, match="no attention layer"):
        build_artifact(model, tmp_path / "run", {**QUANTIZE, "kv_cache": "fp8"})


def test_a_calibrated_cache_needs_calibration() -> None:
    assert needs_calibration(QuantizeConfig(**QUANTIZE, kv_cache="fp8"))
    assert not needs_calibration(QuantizeConfig(**QUANTIZE))


# ------------------------------------------------------------------ rounding of inputs


@pytest.mark.parametrize("kind", ["int8", "fp8", "fp8_group", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_rounded_as_the_library_rounds_them(kind: str, dtype: torch.dtype) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize
    from compressed_tensors.quantization.quant_config import QuantizationStatus

    from compressor.artifact.schema import _INPUTS

    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(2, 5, 256, generator=generator) * torch.logspace(-3, 2, 256)).to(dtype)
    x[0, 0], x[0, 1, :64] = 0.0, 0.0
    module = torch.nn.Module()
    module.quantization_status = QuantizationStatus.COMPRESSED
    scale = torch.tensor([4.0])
    if kind == "nvfp4":
        module.input_global_scale = torch.nn.Parameter(scale, requires_grad=False)
    want = forward_quantize(module, x, "input", QuantizationArgs(**_INPUTS[kind]))
    got = round_inputs(x, kind, scale)
    assert got.dtype == x.dtype
    assert torch.equal(got, want.to(dtype))
