"""Adapters of low rank: they start at the model, stay in its masks, and end as its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from compressor.errors import Interrupted, RecipeError
from compressor.modeling.adapters import AdaptedLinear, Adapter
from compressor.modeling.linears import StoredLinear
from compressor.modeling.whole import Slot
from compressor.recipe import DistillConfig, parse_recipe
from compressor.stages.distill_costs import adapter_numbers, training_bytes
from compressor.stages.sharding import check_sharding
from tests.fixtures_models import build
from tests.fixtures_stages import (
    Bench,
    groups_hold,
    held_out_kl,
    short_distillation,
    units,
    weights,
)

Models = Callable[[str], Path]


@pytest.fixture
def short(tmp_path: Path) -> dict[str, Any]:
    keys = {"train": "lora", "lora": {"rank": 4, "alpha": 4.0}, "learning_rate": 2e-3}
    return short_distillation(tmp_path) | keys


def adapted_linear(weight: torch.Tensor, *, masked: bool = False) -> AdaptedLinear:
    """With factors that are not at their start."""
    adapter = Adapter(3, 0.5, torch.Generator().manual_seed(0))
    layer = AdaptedLinear(StoredLinear(weight, None), adapter, masked=masked)
    assert torch.equal(layer.merged(), weight.float())
    layer.factors.data.normal_(generator=torch.Generator().manual_seed(1))
    return layer


def test_the_merged_weight_does_what_weight_and_factors_do() -> None:
    weight, x = torch.randn(10, 7), torch.randn(5, 7)
    layer = adapted_linear(weight)
    a, b = layer.factors[:, :7], layer.factors[:, 7:].mT
    wanted = x @ weight.mT + 0.5 * (x @ a.mT) @ b.mT
    assert torch.allclose(layer(x), wanted, atol=1e-5)
    assert torch.allclose(x @ layer.exported_weight().mT, wanted, atol=1e-5)


def test_pruned_weights_get_neither_values_nor_gradients() -> None:
    weight = torch.randn(10, 7)
    weight[:, 2] = 0
    layer = adapted_linear(weight, masked=True)
    assert not layer.merged()[:, 2].any()
    layer.factors.requires_grad_(True)
    layer(torch.randn(5, 7)).square().sum().backward()
    gradient = layer.factors.grad
    assert gradient is not None
    assert not gradient[:, 2].any()
    assert gradient[:, 3].any()


def test_it_computes_with_what_is_stored_in_half_precision() -> None:
    layer = adapted_linear(torch.randn(10, 7).bfloat16())
    merged = layer.merged()
    assert torch.equal(merged, merged.bfloat16().float())
    layer.factors.requires_grad_(True)
    layer.merged().sum().backward()  # type: ignore[no-untyped-call]
    assert layer.factors.grad is not None


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_the_model_comes_closer_and_is_what_was_measured(
    tmp_path: Path, short: dict[str, Any], name: str
) -> None:
    bench = Bench(build(name, tmp_path / "model", dtype="bfloat16"), tmp_path / "run")
    short |= {"student": {"layers": [0]}}
    report = bench.apply(bench.original, "distill", **short)
    assert set(report.facts["trained"]) == {"adapter", "vector"}
    assert report.facts["kl_after"] < report.facts["kl_before"]
    assert held_out_kl(bench, report.state, short) == pytest.approx(
        report.facts["kl_after"], rel=1e-5
    )


def test_zeros_stay_and_only_targets_change(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any]
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    pruned = bench.apply(bench.original, "prune", pattern="2:4").state
    targets = {"lora": {"rank": 4, "targets": ["*.q_proj", "*.down_proj"]}}
    report = bench.apply(pruned, "distill", **short | targets)
    before, after = weights(pruned), weights(report.state)
    changed = {n for n in after if not torch.equal(before[n], after[n])}
    assert {n.rpartition(".")[2] for n in changed} == {"q_proj", "down_proj"}
    assert all(groups_hold(weight, 2, 4) for weight in after.values())
    assert report.facts["trained"]["adapter"] == 2 * 4 * sum(
        sum(after[f"0.{n}"].shape) for n in ("self_attn.q_proj", "mlp.down_proj")
    )


@pytest.mark.parametrize("stop_after", [1, 3, 6])
def test_a_stopped_run_ends_with_the_same_bytes(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any], stop_after: int
) -> None:
    short |= {"student": {"layers": [1]}}
    whole = Bench(tiny_models("llama"), tmp_path / "whole")
    whole.apply(whole.original, "distill", **short)
    halved = Bench(tiny_models("llama"), tmp_path / "halved")
    with pytest.raises(Interrupted):
        halved.apply(halved.original, "distill", stop_after=stop_after, index=1, **short)
    halved.apply(halved.original, "distill", index=1, **short)
    assert units(tmp_path / "whole") == units(tmp_path / "halved")


def test_codes_take_no_adapter(tiny_models: Models, tmp_path: Path, short: dict[str, Any]) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    quantized = bench.apply(bench.original, "quantize", scheme="W4A16", method="rtn").state
    with pytest.raises(RecipeError, match="cannot be merged into codes") as caught:
        bench.apply(quantized, "distill", **short)
    assert caught.value.code == "RC17"


@pytest.mark.parametrize(
    ("lora", "code"), [({"rank": 1000}, "RC17"), ({"rank": 2, "targets": ["*.q_prj"]}, "RC14")]
)
def test_adapters_that_do_not_fit_are_refused(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any], lora: dict[str, Any], code: str
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    with pytest.raises(RecipeError) as caught:
        bench.apply(bench.original, "distill", **short | {"lora": lora})
    assert caught.value.code == code


def test_keys_of_adapters_belong_to_adapters() -> None:
    with pytest.raises(ValidationError, match="train: lora"):
        DistillConfig.model_validate({"kind": "distill", "lora": {"rank": 4}})


def test_a_plan_knows_numbers_and_memory(tiny_models: Models, tmp_path: Path) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    pack = {"kind": "pack"}
    stages = [{"kind": "distill", "train": "lora", "lora": {"rank": 4}}, pack]
    body = {"name": "t", "model": {"path": "x"}, "output": "y", "stages": stages}
    recipe = parse_recipe(json.dumps(body))
    shapes = [w.shape for w in weights(bench.original).values()]
    assert adapter_numbers(recipe, bench.original) == 4 * sum(o + i for o, i in shapes)
    full = parse_recipe(json.dumps(body | {"stages": [{"kind": "distill"}, pack]}))
    bytes_of = [training_bytes(r, bench.original, 1000) for r in (recipe, full)]
    assert bytes_of == [16_000, 24_000]


def test_adapters_are_not_sharded_and_the_refusal_names_them(short: dict[str, Any]) -> None:
    config = DistillConfig(kind="distill", sharding="fsdp", **short)
    slot = Slot(0, "mlp.weight", "adapter", torch.nn.Parameter(torch.ones(2)), torch.float32)
    with pytest.raises(RecipeError, match="train: lora"):
        check_sharding(config, [slot], 2)
