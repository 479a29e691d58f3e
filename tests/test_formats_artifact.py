"""Artifacts in every format: written, verified, and loaded by transformers to the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compressor.artifact.manifest import read_manifest
from compressor.errors import CompressError, RecipeError, UnsupportedError, VerificationError
from compressor.modeling.checkpoint import open_checkpoint
from compressor.modeling.load import load_model
from compressor.modeling.state import ModelState
from compressor.recipe.presets import FIXED, LOADERS, SCHEMES, Preset, loads
from compressor.stages.verify import verify_artifact
from tests.fixtures_models import build
from tests.stage_fixtures import Bench, Built, build_artifact, random_rows

pytestmark = pytest.mark.usefixtures("quiet_transformers")

FP4 = tuple(label for label in FIXED if "FP4" in label)
WIDE = {"hidden_size": 128, "intermediate_size": 256}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`built("NVFP4", "llama", method="gptq")`: an artifact of a wide tiny model, made once."""
    root, known = tmp_path_factory.mktemp("formats"), dict[str, Built]()

    def get(scheme: str, name: str = "llama", **keys: Any) -> Built:
        key = json.dumps([scheme, name, keys])
        if key not in known:
            folder = root / str(len(known))
            model = build(name, folder / "model", dtype="bfloat16", **WIDE)
            stage = {"kind": "quantize", "scheme": scheme, "method": "rtn", **keys}
            known[key] = build_artifact(model, folder / "run", stage)
        return known[key]

    return get


@torch.no_grad()
def their_logits(artifact: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of transformers, in fp32. It reads 4-bit floats as bf16 only (exactly: level * scale has six
    bits), so those are loaded in bf16, unpacked by a first call, and widened."""
    model, info = AutoModelForCausalLM.from_pretrained(
        artifact, dtype=dtype, output_loading_info=True
    )
    assert not any(info.values()), info
    model(tokens)
    torch.nn.Module.float(model)
    logits: torch.Tensor = model(tokens).logits
    return logits


@torch.no_grad()
def assert_same(artifact: Path, dtype: torch.dtype) -> None:
    tokens = random_rows(2, 20).tokens
    want = their_logits(artifact, tokens, dtype)
    for packed in (True, False):
        got = load_model(artifact, packed=packed, dtype=torch.float32).model(tokens).logits
        assert (got - want).norm() <= 1e-3 * want.norm()


def dtype_of(scheme: str) -> torch.dtype:
    return torch.bfloat16 if scheme in FP4 else torch.float32


@pytest.mark.parametrize("scheme", FIXED)
def test_transformers_computes_what_we_compute(built: Any, scheme: str) -> None:
    assert_same(built(scheme).artifact, dtype_of(scheme))


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "NVFP4", "MXFP4A16", "W8A8", "W4A8"])
def test_gptq_artifacts_load_too(built: Any, scheme: str) -> None:
    artifact = built(scheme, "qwen3", method="gptq").artifact
    assert_same(artifact, dtype_of(scheme))
    verify_artifact(artifact)


@pytest.mark.parametrize("scheme", FIXED)
def test_every_format_is_verified_and_described(built: Any, scheme: str) -> None:
    artifact = built(scheme).artifact
    report = verify_artifact(artifact)
    assert report.num_quantized == 14
    config = json.loads((artifact / "config.json").read_text())["quantization_config"]
    assert config["format"] == config["config_groups"]["group_0"]["format"]
    notes = [n for n in load_model(artifact).notes if "no kernel" in n]
    assert bool(notes) == (SCHEMES[scheme].number == "float")


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_BLOCK", "NVFP4", "MXFP4"])
def test_a_changed_code_is_found(built: Any, scheme: str, tmp_path: Path) -> None:
    source = built(scheme).artifact
    tensors = load_file(source / "model.safetensors")
    name = next(n for n in tensors if n.endswith(("proj.weight", "proj.weight_packed")))
    tensors[name].view(torch.uint8)[0, 0] ^= 1
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.name != "model.safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError):
        verify_artifact(copy)


def test_nvfp4_inputs_have_a_calibrated_power_of_two(built: Any) -> None:
    tensors = load_file(built("NVFP4").artifact / "model.safetensors")
    scales = {n: t for n, t in tensors.items() if n.endswith("global_scale")}
    assert len(scales) == 28
    assert all(float(torch.frexp(t).mantissa) == 0.5 for t in scales.values())
    stem = "model.layers.1.self_attn."
    for kind in ("input_global_scale", "weight_global_scale"):
        assert len({float(tensors[f"{stem}{n}_proj.{kind}"]) for n in "qkv"}) == 1


def test_nvfp4_without_calibration_is_refused_by_the_recipe() -> None:
    from compressor.recipe import QuantizeConfig, needs_calibration

    stage = QuantizeConfig(kind="quantize", scheme="NVFP4", method="rtn")
    assert "calibrated" in needs_calibration(stage)
    assert not needs_calibration(stage.model_copy(update={"scheme": "NVFP4A16"}))


def test_blocks_that_do_not_divide_fall_back_and_say_so(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model")  # 64 inputs
    stage = {"kind": "quantize", "scheme": "FP8_BLOCK", "method": "rtn"}
    result = build_artifact(model, tmp_path / "run", stage)
    labels = {f["activations"] for f in read_manifest(result.artifact).formats.values()}
    assert labels == {"fp8", "fp8_group"}
    assert "does not divide" in str(result.reports[0].facts["notes"])


def test_fixed_groups_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model", hidden_size=72, num_attention_heads=4, head_dim=18)
    stage = {"kind": "quantize", "scheme": "NVFP4A16", "method": "rtn"}
    with pytest.raises(RecipeError) as caught:
        build_artifact(model, tmp_path / "run", stage)
    assert caught.value.code == "CK29"


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W8A8"])
def test_a_quantized_checkpoint_is_no_source(built: Any, scheme: str, tmp_path: Path) -> None:
    stage = {"kind": "quantize", "scheme": "W4A16", "method": "rtn"}
    with pytest.raises(CompressError) as caught:
        Bench(built(scheme).artifact, tmp_path, random_rows()).run(stage)
    assert caught.value.code in ("CK34", "CK21")


def test_a_mixture_of_ways_of_storing_loads(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from compressor.artifact.formats import LayerFormat
    from compressor.stages import quantize
    from compressor.stages.selection import uniform_formats

    order = ("W8A8", "FP8_DYNAMIC", "FP8A16", "W4A16")

    def cycle(config: Any, selection: Any, state: ModelState) -> dict[str, LayerFormat]:
        units = list(dict.fromkeys(t.unit for t in selection.targets))
        presets = {unit: SCHEMES[order[i % 4]] for i, unit in enumerate(units)}
        base = uniform_formats(config, selection, state)
        formats = {t.name: LayerFormat.of(presets[t.unit], "bfloat16") for t in selection.targets}
        return {n: replace(f, scale_dtype=base[n].scale_dtype) for n, f in formats.items()}

    monkeypatch.setattr(quantize, "uniform_formats", cycle)
    artifact = built("W4A16", "llama", dampening=0.03).artifact
    config = json.loads((artifact / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert len(config["config_groups"]) == 4
    assert_same(artifact, torch.float32)
    verify_artifact(artifact)


# ------------------------------------------------------------------ experts


@pytest.mark.parametrize("scheme", ["FP8A16", "MXFP4A16"])
def test_experts_load_where_transformers_can(built: Any, scheme: str) -> None:
    assert_same(built(scheme, "qwen3_moe").artifact, dtype_of(scheme))


# ------------------------------------------------------------------ the table of engines


@pytest.mark.parametrize(("engine", "preset", "readable"), [
    ("ours", Preset(7, False, 16), True), ("transformers", Preset(4, False, 32), False),
    ("vllm", Preset(4, True, 16), False), ("vllm", Preset(3, True, -1), True),
    ("vllm", SCHEMES["MXFP4"], False), ("vllm", SCHEMES["NVFP4"], True),
    ("sglang", SCHEMES["FP8_BLOCK"], True), ("sglang", SCHEMES["MXFP4A16"], False),
    ("sglang", Preset(2, True, 128), False),
])  # fmt: skip
def test_engines_load_what_their_sources_say(engine: str, preset: Preset, readable: bool) -> None:
    assert loads(engine, preset) is readable


def test_every_engine_of_the_recipe_has_its_row() -> None:
    from compressor.recipe import QuantizeConfig

    engines = QuantizeConfig.model_json_schema()["properties"]["engines"]["items"]["enum"]
    assert set(LOADERS) == set(engines)


def test_distilling_small_floats_is_refused(built: Any) -> None:
    from compressor.modeling.linears import StoredLinear, packed_from_tensors
    from compressor.modeling.whole import ScaledLinear

    state = built("FP8A16").state
    block = state.read_block(0, state.skeleton())
    name, fmt = next(iter(block.formats.items()))
    linear = StoredLinear(torch.empty(0), None)
    linear.set_packed(packed_from_tensors(block.tensors, name, fmt))
    with pytest.raises(UnsupportedError):
        ScaledLinear(linear)


def test_open_checkpoint_reads_every_dtype(built: Any) -> None:
    checkpoint = open_checkpoint(built("FP8A16").artifact)
    name = "model.layers.0.mlp.down_proj.weight"
    assert checkpoint.read(name, check_finite=True).dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("keys", [
    {"scheme": "NVFP4", "embeddings": "W8A16", "kv_cache": "fp8"},
    {"scheme": "W8A8", "head": "W4A16"},
], ids=["floats", "bytes"])  # fmt: skip
def test_our_server_generates_what_the_model_generates(built: Any, keys: dict[str, Any]) -> None:
    from compressor.serve.offline import generate_text
    from compressor.serve.options import ServeOptions
    from compressor.serve.sequence import SamplingParams
    from compressor.serve.smoke import run_smoke

    artifact = built(**keys).artifact
    options = ServeOptions(num_blocks=64)
    report = run_smoke(artifact, options, new_tokens=4)
    assert all(c["ok"] for c in report["checks"] if c["name"] != "resident bytes"), report
    params = SamplingParams(max_tokens=6, temperature=0.0)
    texts = generate_text(artifact, ["The quick brown"], params=params, options=options)
    assert texts


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    from compressor.errors import Interrupted
    from tests.stage_fixtures import unit_files

    model = build("llama_tied", tmp_path / "model")
    stage = {"kind": "quantize", "scheme": "NVFP4", "embeddings": "W8A16", "kv_cache": "fp8"}
    straight = Bench(model, tmp_path / "a", random_rows())
    straight.run(stage)
    broken = Bench(model, tmp_path / "b", random_rows())
    with pytest.raises(Interrupted):
        broken.run(stage, stop_at=2)
    broken.run(stage)
    assert unit_files(tmp_path / "a") == unit_files(tmp_path / "b")
    assert any("ranges-" in name for name in unit_files(tmp_path / "a"))
