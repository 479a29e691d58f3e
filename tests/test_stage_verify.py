"""Verification notices every kind of damage, names it, and passes what is healthy."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.errors import CompressError, VerificationError
from compressor.modeling.packed_linear import PackedLinear
from compressor.stages import verify_logits
from compressor.stages.verify import verify_artifact
from compressor.stages.verify_logits import check_logits
from tests.stage_fixtures import PACK, W4, Bench, Built, build_artifact, random_rows

Models = Callable[[str], Path]
VERIFY = {"kind": "verify", "tokens": 16}
WEIGHTS = "model.safetensors"
SCALE = "model.layers.1.mlp.down_proj.weight_scale"
PACKED = "model.layers.0.self_attn.q_proj.weight_packed"


@pytest.fixture(scope="session")
def healthy(tiny_models: Models, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("healthy") / "run"
    return build_artifact(tiny_models("llama"), folder, {**W4, "symmetric": False})


@pytest.fixture
def artifact(healthy: Built, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(healthy.artifact, tmp_path / "artifact"))


def failure(path: Path) -> VerificationError:
    with pytest.raises(VerificationError) as caught:
        verify_artifact(path, tokens=8)
    assert caught.value.exit_code == 11
    return caught.value


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change tensors and make the manifest's digests fit again: damage that hashes do not show."""
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["tensors"] = {
        n: hashlib.sha256(t.flatten().view(torch.uint8).numpy().data).hexdigest()
        for n, t in tensors.items()
    }
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_healthy_artifact_passes_and_says_what_was_checked(healthy: Built) -> None:
    report = verify_artifact(healthy.artifact)
    assert report.num_quantized == 14
    assert report.num_tensors == len(load_file(healthy.artifact / WEIGHTS))
    assert report.logits_difference <= 2e-5
    assert sum(report.kernels.values()) == 14
    assert report.kernels_match is True
    json.dumps(report.as_json())


@pytest.mark.parametrize("name", ["mixtral", "gpt_neox"])
def test_other_architectures_pass(tiny_models: Models, tmp_path: Path, name: str) -> None:
    built = build_artifact(tiny_models(name), tmp_path / "run", {**W4, "method": "rtn", "bits": 3})
    assert verify_artifact(built.artifact).num_quantized > 0


def test_an_artifact_without_quantized_layers_passes(tiny_models: Models, tmp_path: Path) -> None:
    bench = Bench(tiny_models("gpt2"), tmp_path / "run")
    bench.run(PACK)
    assert verify_artifact(bench.artifact).num_quantized == 0


def test_one_flipped_bit_is_found_with_file_and_tensor(artifact: Path) -> None:
    file = artifact / WEIGHTS
    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    start = json.loads(data[8 : 8 + size])[PACKED]["data_offsets"][0]
    data[8 + size + start + 5] ^= 0x10
    file.write_bytes(data)
    error = failure(artifact)
    assert error.code == "CK40"
    assert error.where.tensor == PACKED
    assert error.where.file.endswith(WEIGHTS)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_scale_that_is_zero_or_not_finite_is_found_behind_a_fitting_digest(
    artifact: Path, value: float
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[SCALE][3, 1] = value

    rewrite(artifact, change)
    error = failure(artifact)
    assert error.code == "NU06"
    assert error.where.tensor == SCALE


def test_stray_bits_between_rows_are_found(tiny_models: Models, tmp_path: Path) -> None:
    built = build_artifact(tiny_models("llama"), tmp_path / "run", {**W4, "symmetric": False})

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight_shape"][0] -= 3

    rewrite(built.artifact, change)
    with pytest.raises(CompressError):
        verify_artifact(built.artifact)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "recipe.yaml"])
def test_a_missing_file_is_named(artifact: Path, name: str) -> None:
    (artifact / name).unlink()
    assert name in str(failure(artifact))


def test_missing_weights_are_a_verification_error(artifact: Path) -> None:
    (artifact / WEIGHTS).unlink()
    failure(artifact)


@pytest.mark.parametrize("name", ["extra.txt", "kernels/extra.py", "pytorch_model.bin"])
def test_a_file_that_nobody_listed_is_named(artifact: Path, name: str) -> None:
    (artifact / name).parent.mkdir(exist_ok=True)
    (artifact / name).write_text("x")
    error = failure(artifact)
    assert Path(name).name in str(error)


def test_an_extra_weight_file_is_noticed(artifact: Path) -> None:
    save_file({"x": torch.ones(2)}, artifact / "other.safetensors")
    assert failure(artifact).code == "CK40"


def test_an_edited_config_is_noticed(artifact: Path) -> None:
    config = json.loads((artifact / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (artifact / "config.json").write_text(json.dumps(config))
    error = failure(artifact)
    assert error.code == "CK40"
    assert "config.json has changed" in error.message


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"tensors": 3}'])
def test_a_missing_or_damaged_manifest_is_noticed(artifact: Path, text: str | None) -> None:
    if text is None:
        (artifact / "manifest.json").unlink()
    else:
        (artifact / "manifest.json").write_text(text)
    assert failure(artifact).code == "CK40"


def test_a_tensor_that_the_manifest_does_not_know_is_named(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    del manifest["tensors"][SCALE]
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    error = failure(artifact)
    assert error.where.tensor == SCALE
    assert "not in the manifest" in error.message


def test_a_manifest_with_another_format_than_the_config_is_noticed(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    name = SCALE.removesuffix(".weight_scale")
    manifest["formats"][name]["bits"] = 8
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    failure(artifact)


def test_cards_and_reports_may_change(artifact: Path) -> None:
    (artifact / "README.md").write_text("# hello")
    (artifact / "report.html").write_text("<html></html>")
    verify_artifact(artifact, tokens=8)


def test_a_kernel_that_computes_something_else_is_noticed(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: 1.01 * real(self, x))
    error = failure(artifact)
    assert error.code == "NU07"
    assert "logits differ" in error.message


@pytest.mark.parametrize(
    ("dtype", "inputs"), [("bfloat16", "int8"), ("bfloat16", "none"), ("float32", "int8")]
)
def test_what_bf16_itself_rounds_away_is_no_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch, dtype: str, inputs: str
) -> None:
    """Inputs rounded to eight bits from bf16: the dense model is that far from itself, too."""
    dense = torch.linspace(-1, 1, 64, dtype=getattr(torch, dtype))
    monkeypatch.setattr(verify_logits, "dense_bytes", lambda *_: 0)
    monkeypatch.setattr(verify_logits, "_whole", lambda *_: (dense + 0.04, dense, {}))
    formats: Any = {"linear": SimpleNamespace(activations=inputs)}
    checkpoint: Any = SimpleNamespace(path=Path("artifact"))
    excused = (dtype, inputs) == ("bfloat16", "int8")
    for noise, passes in ((0.06, excused), (0.001, False)):
        monkeypatch.setattr(verify_logits, "_rounding", lambda *_, found=noise: found)
        if passes:
            assert check_logits(checkpoint, formats, 8).difference == pytest.approx(0.04, abs=0.01)
        else:
            with pytest.raises(VerificationError, match="logits differ"):
                check_logits(checkpoint, formats, 8)


def verified(model: Path, folder: Path, *, change: Callable[[Bench], None] | None = None) -> Any:
    bench = Bench(model, folder, random_rows())
    bench.run(W4)
    bench.run(PACK)
    if change:
        change(bench)
    return bench.run(VERIFY)


def test_inside_a_run_every_tensor_is_compared_with_the_units(
    tiny_models: Models, tmp_path: Path
) -> None:
    facts = verified(tiny_models("qwen3_moe"), tmp_path / "run").facts
    assert facts["compared_with_units"] == facts["num_tensors"]


def test_inside_a_run_other_codes_are_noticed_behind_fitting_digests(
    tiny_models: Models, tmp_path: Path
) -> None:
    def change(bench: Bench) -> None:
        rewrite(bench.artifact, lambda tensors: tensors[PACKED][0].add_(1))

    with pytest.raises(VerificationError, match="not what the stages made") as caught:
        verified(tiny_models("llama"), tmp_path / "run", change=change)
    assert caught.value.where.tensor == PACKED
