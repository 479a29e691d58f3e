"""The artifact as a whole: transformers with compressed-tensors alone computes what we compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.artifact.formats import LayerFormat
from compressor.artifact.manifest import read_manifest
from compressor.artifact.packing import PackedWeight, dense_weight
from compressor.modeling.checkpoint import open_checkpoint
from compressor.modeling.load import load_model
from compressor.modeling.state import ModelState
from compressor.recipe import QuantizeConfig
from compressor.stages.selection import Selection, uniform_formats
from compressor.stages.verify import verify_artifact
from tests.fixtures_models import build
from tests.stage_fixtures import PACK, W4, Bench, Built, build_artifact, random_rows

Models = Callable[[str], Path]
Artifacts = Callable[..., Built]
pytestmark = pytest.mark.usefixtures("quiet_transformers")

MOE = ("qwen3_moe", "mixtral")
UNIFORM = ("llama", "llama_tied", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt_neox", *MOE)


@pytest.fixture(scope="session")
def artifacts(tiny_models: Models, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """`artifacts("llama", bits=3)` is a packed artifact, built at the first call: read-only."""
    root, built = tmp_path_factory.mktemp("artifacts"), dict[str, Built]()

    def get(name: str, dtype: str = "float32", **keys: Any) -> Built:
        key = json.dumps([name, dtype, keys])
        if key not in built:
            model = tiny_models(name)
            if dtype != "float32":
                model = build(name, root / f"{len(built)}-model", dtype=dtype)
            stage = {**W4, "method": "rtn", **keys}
            built[key] = build_artifact(model, root / str(len(built)), stage)
        return built[key]

    return get


def theirs(artifact: Path, dtype: torch.dtype) -> Any:
    """The model as transformers loads it; every tensor of the files must find its place."""
    model, info = AutoModelForCausalLM.from_pretrained(
        artifact, dtype=dtype, output_loading_info=True
    )
    assert not any(info.values()), info
    return model


@torch.no_grad()
def assert_same(artifact: Path, dtype: torch.dtype, tolerance: float) -> None:
    ours = load_model(artifact, packed=True, dtype=dtype)
    other = theirs(artifact, dtype)
    assert ours.packed_bytes > 0
    tokens = random_rows(2, 20).tokens
    got, want = ours.model(tokens).logits.float(), other(tokens).logits.float()
    assert (got - want).norm() <= tolerance * want.norm()
    assert (got - want).abs().max() <= 2 * tolerance * want.abs().max()
    if dtype == torch.float32:
        keys: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(tokens)
        assert torch.equal(
            ours.model.generate(tokens, attention_mask=mask, **keys),
            other.generate(tokens, attention_mask=mask, **keys),
        )


@pytest.mark.parametrize("name", UNIFORM)
def test_transformers_computes_what_we_compute(artifacts: Artifacts, name: str) -> None:
    assert_same(artifacts(name).artifact, torch.float32, 1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mistral", "gpt_neox"])
def test_transformers_computes_what_we_compute_in_bf16(artifacts: Artifacts, name: str) -> None:
    # They round code * scale to bf16, we do not: 1 % of the logits on these tiny models.
    assert_same(artifacts(name, dtype="bfloat16").artifact, torch.bfloat16, 1e-2)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_every_symmetric_width_loads(artifacts: Artifacts, bits: int) -> None:
    assert_same(artifacts("llama", bits=bits).artifact, torch.float32, 1e-4)


@pytest.mark.parametrize("effort", ["high", "max"])
def test_learned_and_recovered_artifacts_load(artifacts: Artifacts, effort: str) -> None:
    keys: dict[str, Any] = {
        "method": "gptq",
        "effort": effort,
        "learning": {"steps": 6, "batch_size": 2},
    }
    if effort == "max":
        keys["recovery"] = {"steps": 3, "batch_size": 2, "own_rows": 4}
    built = artifacts("llama", bits=3, **keys)
    scales = [
        tensor
        for position in range(len(built.state.blocks))
        for name, tensor in built.state.read_block(position, built.state.skeleton()).tensors.items()
        if name.endswith("weight_scale")
    ]
    assert any((scale < 0).any() for scale in scales)
    assert_same(built.artifact, torch.float32, 1e-4)


def test_one_scale_a_row_loads(artifacts: Artifacts) -> None:
    assert_same(artifacts("llama", group_size=-1).artifact, torch.float32, 1e-4)


def test_protected_linears_load(artifacts: Artifacts) -> None:
    assert_same(artifacts("qwen3", protect=["*.down_proj"]).artifact, torch.float32, 1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_a_mixture_of_widths_loads(artifacts: Artifacts, name: str) -> None:
    built = mixture(artifacts, name)
    config = json.loads((built.artifact / "config.json").read_text())["quantization_config"]
    bits = {g["weights"]["num_bits"] for g in config["config_groups"].values()}
    assert bits == {2, 3, 4, 8}
    assert_same(built.artifact, torch.float32, 1e-4)


def mixture(artifacts: Artifacts, name: str, experts: int | None = None) -> Built:
    """2, 3, 4 and 8 bits in turn over the units of a model; all experts alike if asked."""

    def cycle(
        config: QuantizeConfig, selection: Selection, state: ModelState
    ) -> dict[str, LayerFormat]:
        units = list(dict.fromkeys(t.unit for t in selection.targets))
        bits = {unit: (2, 3, 4, 8)[i % 4] for i, unit in enumerate(units)}
        bits |= {unit: experts for unit in units if experts and "experts" in unit}
        formats = uniform_formats(config, selection, state)
        return {t.name: replace(formats[t.name], bits=bits[t.unit]) for t in selection.targets}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressor.stages.quantize.uniform_formats", cycle)
        return artifacts(name, targets=["linear"], protect=[], dampening=0.02 + (experts or 0) / 99)


@pytest.mark.parametrize("name", MOE)
def test_experts_of_one_format_among_other_formats_load(artifacts: Artifacts, name: str) -> None:
    assert_same(mixture(artifacts, name, experts=4).artifact, torch.float32, 1e-4)


ASYMMETRIC = (
    "transformers 5.23 with compressed-tensors 0.20 cannot load asymmetric pack-quantized weights: "
    "ModelCompressor.compress_model on the meta device returns before it packs the zero points, so "
    "the model expects weight_zero_point [out, groups] and the file has [out*bits/32, groups]"
)
EXPERTS = (
    "transformers 5.23 unpacks the experts of all layers by the first config group that names a "
    "module exactly (get_experts_scheme), so experts of another format are misread: an error if "
    "shapes do not fit (other groups), silently wrong weights if they do (other bits)"
)


@pytest.mark.xfail(strict=True, raises=RuntimeError, reason=ASYMMETRIC)
@pytest.mark.parametrize("keys", [{}, {"bits": 8}, {"group_size": -1}])
def test_transformers_loads_asymmetric_weights(artifacts: Artifacts, keys: dict[str, Any]) -> None:
    assert_same(artifacts("llama", symmetric=False, **keys).artifact, torch.float32, 1e-4)


@pytest.mark.xfail(strict=True, raises=(RuntimeError, AssertionError), reason=EXPERTS)
@pytest.mark.parametrize("name", MOE)
def test_transformers_loads_experts_of_a_mixture(artifacts: Artifacts, name: str) -> None:
    built = mixture(artifacts, name)
    assert_same(built.artifact, torch.float32, 1e-4)


@pytest.mark.parametrize("name", ["gpt_neox", *MOE])
@pytest.mark.parametrize("keys", [
    {"bits": 3, "symmetric": False}, {"symmetric": False, "group_size": -1},
], ids=["3 bit asymmetric", "4 bit rows"])  # fmt: skip
def test_our_loader_computes_with_exactly_the_stored_weights(
    artifacts: Artifacts, name: str, keys: dict[str, Any]
) -> None:
    built = artifacts(name, **keys)
    assert_stored_weights(built)


@pytest.mark.parametrize("name", MOE)
def test_our_loader_reads_experts_of_a_mixture(artifacts: Artifacts, name: str) -> None:
    assert_stored_weights(mixture(artifacts, name))


@torch.no_grad()
def assert_stored_weights(built: Built) -> None:
    """Packed logits equal those of the dense original with every weight replaced by hand."""
    model = load_model(built.model, packed=False).model
    checkpoint = open_checkpoint(built.artifact)
    for name, fmt in read_manifest(built.artifact).formats.items():
        suffixes = [n.removeprefix(f"{name}.") for n in checkpoint.tensors if f"{name}.w" in n]
        tensors = {s: checkpoint.read(f"{name}.{s}") for s in suffixes}
        packed = PackedWeight(tensors, LayerFormat.from_json(fmt))
        module = name.replace("block_sparse_moe", "mlp").replace(".w1", ".gate_proj")
        module = module.replace(".w2", ".down_proj").replace(".w3", ".up_proj")
        model.get_submodule(module).weight.copy_(dense_weight(packed))
    tokens = random_rows(2, 20).tokens
    want = model(tokens).logits
    for packed_in_memory in (True, False):
        got = load_model(built.artifact, packed=packed_in_memory).model(tokens).logits
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_the_mixture_of_experts_is_stored_under_the_names_of_its_family(
    artifacts: Artifacts,
) -> None:
    names = set(open_checkpoint(artifacts("mixtral").artifact).tensors)
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight_packed" in names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names
    assert not any(".mlp." in name for name in names)


def test_the_artifact_brings_everything_that_belongs_to_a_model(
    tiny_models: Models, tmp_path: Path
) -> None:
    model = build("llama", tmp_path / "model")
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "secret.bin"):
        (model / name).write_text(name)
    built = build_artifact(model, tmp_path / "run", {**W4, "method": "rtn"})
    names = {p.name for p in built.artifact.iterdir()}
    assert {"LICENSE", "NOTICE.txt", "USE_POLICY.md", "generation_config.json"} <= names
    assert {"recipe.yaml", "manifest.json", "config.json", "model.safetensors"} <= names
    assert "secret.bin" not in names
    for path in (model, built.artifact):
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert tokenizer("def read(path)")["input_ids"][:2]
    texts = [AutoTokenizer.from_pretrained(p).chat_template for p in (model, built.artifact)]
    assert texts[0] == texts[1] is not None


def test_packing_repeats_itself_byte_for_byte_and_names_no_path(
    tiny_models: Models, tmp_path: Path
) -> None:
    found = []
    for name in ("one", "two"):
        built = build_artifact(tiny_models("llama"), tmp_path / name, W4)
        files = [p for p in built.artifact.rglob("*") if p.is_file()]
        found.append({str(p.relative_to(built.artifact)): p.read_bytes() for p in files})
    assert found[0] == found[1]
    for name, data in found[0].items():
        assert str(tmp_path).encode() not in data, name


def test_shards_are_as_small_as_asked_and_still_load(tiny_models: Models, tmp_path: Path) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run", random_rows())
    bench.run({**W4, "method": "rtn"})
    facts = bench.run({**PACK, "max_shard_size": "100KB"}).facts
    shards = sorted(bench.artifact.glob("*.safetensors"))
    assert facts["num_shards"] == len(shards) > 1
    assert_same(bench.artifact, torch.float32, 1e-4)
    assert verify_artifact(bench.artifact).num_quantized == 14


def test_sizes_in_the_report_are_those_of_the_files(artifacts: Artifacts) -> None:
    built = artifacts("llama")
    facts = built.reports[-1].facts
    with safe_open(built.artifact / "model.safetensors", framework="pt") as opened:
        total = sum(opened.get_tensor(n).nbytes for n in opened.keys())  # noqa: SIM118
    assert facts["weight_bytes"] == total == sum(facts["components"].values())
    assert facts["original_bytes"] == sum(facts["original_components"].values())
    assert facts["original_bytes"] > 1.5 * total


def test_a_state_without_quantization_packs_to_the_plain_model(
    tiny_models: Models, tmp_path: Path
) -> None:
    for name in ("llama_tied", "mixtral", "gpt2", "gpt_neox"):
        bench = Bench(tiny_models(name), tmp_path / name)
        bench.run(PACK)
        assert "quantization_config" not in json.loads((bench.artifact / "config.json").read_text())
        before, after = (open_checkpoint(p) for p in (tiny_models(name), bench.artifact))
        assert set(before.tensors) == set(after.tensors)
        for tensor in before.tensors:
            assert torch.equal(before.read(tensor), after.read(tensor))
