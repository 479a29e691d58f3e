"""Quantization-aware distillation: it starts at the stored codes and stores what it computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.algorithms.grid import mse_grid, quantize
from compressor.algorithms.latent_rounding import LatentWeight
from compressor.errors import Interrupted, RecipeError
from compressor.modeling.block import load_block
from compressor.modeling.state import ModelState
from compressor.modeling.whole import CodesLinear, WholeModel
from compressor.recipe import DataConfig
from compressor.recipe.quantization import Recovery
from tests.fixtures_models import SENTENCES, build
from tests.fixtures_stages import Bench, units

Models = Callable[[str], Path]
FORMATS = ["W3A16", "W2A16_ASYM", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "MXFP4"]


@pytest.fixture
def short(tmp_path: Path) -> dict[str, Any]:
    """Keys of a stage that takes a second and moves codes fast."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(SENTENCES[i % 5 :]) for i in range(24)))
    data = DataConfig(source=str(text), num_samples=16, seq_len=24, packing="joined")
    steps = {"steps": 6, "checkpoint_steps": 2, "batch_size": 4, "warmup_steps": 1}
    return {"data": data, "learning_rate": 2e-3, "train": "codes", **steps}


def quantized(bench: Bench, scheme: str = "W3A16") -> ModelState:
    """The model in a format, by rounding alone."""
    group = {"group_size": 32} if scheme in ("W3A16", "W2A16_ASYM") else {}
    return bench.apply(bench.original, "quantize", scheme=scheme, method="rtn", **group).state


def linears(model: WholeModel, position: int) -> dict[str, CodesLinear]:
    """The linears of a block that learn codes."""
    found = model.blocks[position].module.named_modules()
    return {name: m for name, m in found if isinstance(m, CodesLinear)}


def stored(state: ModelState, position: int) -> dict[str, Tensor]:
    """The weight of each linear of a block, by the reader of stored tensors."""
    skeleton = state.skeleton()
    block = load_block(skeleton, position, state.read_block(position, skeleton))
    return {name: linear.dense() for name, linear in block.linears.items()}


@pytest.mark.parametrize("scheme", FORMATS)
def test_the_start_is_what_is_stored_bit_for_bit(tmp_path: Path, scheme: str) -> None:
    bench = Bench(build("llama", tmp_path / "model", hidden_size=128), tmp_path / "run")
    state = quantized(bench, scheme)
    teacher = WholeModel(bench.original)
    model = WholeModel(state, near=teacher.dense_weight)
    for name, weight in stored(state, 0).items():
        layer = linears(model, 0)[name]
        assert torch.equal(layer.latent.value(), weight)
        assert bool(layer.offset.any())
    tensors = state.read_block(0, state.skeleton()).tensors
    exported = [s for s in model.slots if s.position == 0 and s.export is not None]
    assert all(torch.equal(s.stored(), tensors[s.name]) for s in exported)
    assert {s.kind for s in exported} == {"latent"} | ({"scale"} if scheme[0] == "W" else set())


@pytest.mark.parametrize("scheme", FORMATS)
def test_what_is_stored_is_what_was_computed_with(tmp_path: Path, scheme: str) -> None:
    model_path = build("llama", tmp_path / "model", hidden_size=128)
    state = quantized(Bench(model_path, tmp_path / "run"), scheme)
    model = WholeModel(state, near=lambda position, name: None)
    generator = torch.Generator().manual_seed(0)
    for slot in (s for s in model.slots if s.kind in ("latent", "scale")):
        noise = torch.randn(slot.parameter.shape, generator=generator)
        slot.parameter.data.add_(noise * (0.8 if slot.kind == "latent" else 0.02))
    skeleton = state.skeleton()
    source = state.read_block(0, skeleton)
    before = stored(state, 0)
    source.tensors.update({s.name: s.stored() for s in model.slots if s.position == 0})
    after = load_block(skeleton, 0, source).linears
    for name, layer in linears(model, 0).items():
        assert torch.equal(after[name].dense(), layer.latent.value())
        assert not torch.equal(after[name].dense(), before[name])


def test_training_codes_changes_codes_and_ends_no_worse(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any]
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    state = quantized(bench, "W2A16_ASYM")
    report = bench.apply(state, "distill", **short)
    assert set(report.facts["trained"]) == {"latent", "scale", "vector"}
    assert report.facts["kl_after"] < report.facts["kl_before"]
    old, new = (s.read_block(0, s.skeleton()).tensors for s in (state, report.state))
    assert not torch.equal(old["mlp.up_proj.weight_packed"], new["mlp.up_proj.weight_packed"])


@pytest.mark.parametrize("stop_after", [1, 3, 6])
def test_a_stopped_run_ends_with_the_same_bytes(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any], stop_after: int
) -> None:
    whole = Bench(tiny_models("llama"), tmp_path / "whole")
    whole.apply(quantized(whole), "distill", **short)
    halved = Bench(tiny_models("llama"), tmp_path / "halved")
    state = quantized(halved)
    with pytest.raises(Interrupted):
        halved.apply(state, "distill", stop_after=stop_after, index=2, **short)
    halved.apply(state, "distill", index=2, **short)
    assert units(tmp_path / "whole") == units(tmp_path / "halved")


def test_pruned_weights_stay_zero(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any]
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    pruned = bench.apply(bench.original, "prune", pattern="2:4").state
    state = bench.apply(pruned, "quantize", scheme="W3A16", group_size=32).state
    report = bench.apply(state, "distill", **short)
    assert report.facts["best_step"] > 0
    changed = False
    for name, before in stored(state, 0).items():
        after = stored(report.state, 0)[name]
        assert not after[before == 0].any()
        changed |= not torch.equal(before, after)
    assert changed


def test_codes_need_a_quantized_linear(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any]
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    with pytest.raises(RecipeError, match="no linear is quantized") as caught:
        bench.apply(bench.original, "distill", **short)
    assert caught.value.code == "RC17"


def test_rounding_of_inputs_passes_gradients_on(tiny_models: Models, tmp_path: Path) -> None:
    state = quantized(Bench(tiny_models("llama"), tmp_path / "run"), "W8A8")
    layer = next(iter(linears(WholeModel(state, near=lambda p, n: None), 0).values()))
    x = torch.randn(2, 5, layer.latent.value().shape[1])
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    expected = layer.latent.value().detach().sum(0).expand_as(x)
    assert torch.allclose(x.grad, expected, atol=1e-5)


def test_a_distant_weight_starts_inside_the_cell_of_its_code() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    grid = mse_grid(weight, bits=3, group_size=32, symmetric=True)
    codes = quantize(weight.flip(1), grid)  # of other weights: most are further off than a step
    start = LatentWeight(codes, grid, scale_dtype=torch.bfloat16, near=weight)
    assert torch.equal(start.rounded()[0], codes)
    assert float(start.offset.detach().abs().max()) <= 0.5
    towards = torch.sign(weight.view(8, 2, 32) / grid.scale.unsqueeze(-1) - start.groups)
    assert torch.equal(torch.sign(start.offset.detach()), towards)


def test_scales_alone_move_no_code() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    grid = mse_grid(weight, bits=3, group_size=32, symmetric=True)
    pupil = LatentWeight(quantize(weight, grid), grid, scale_dtype=torch.float32, near=weight)
    before = pupil.rounded()[0]
    with torch.no_grad():
        pupil.factor.mul_(1.5)
    assert torch.equal(pupil.rounded()[0], before)


def test_recovery_trains_codes_if_it_is_told_to(tiny_models: Models, tmp_path: Path) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    keys = {"recovery": {"steps": 4, "batch_size": 2, "own_rows": 0, "train": "codes"}}
    learning = {"learning": {"steps": 2, "batch_size": 2}}
    state = bench.original
    report = bench.apply(state, "quantize", bits=3, group_size=32, effort="max", **learning, **keys)
    assert set(report.facts["recovery"]["trained"]) == {"latent", "scale", "vector"}
    assert Recovery().train == "scales_and_norms"
