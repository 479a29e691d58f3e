"""Transforms: the same function in other weights, and less harm when these are rounded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.algorithms.divergence import kl_tokens
from compressor.errors import CompressError, Interrupted, RecipeError, UnsupportedError
from compressor.modeling.load import load_model
from compressor.modeling.state import ModelState
from compressor.recipe import TransformConfig, parse_recipe
from tests import fixtures_models
from tests.fixtures_models import ARCHITECTURES, build
from tests.fixtures_stages import Bench, export, groups_hold, logits, token_rows, units, weights
from tests.stage_fixtures import W4, build_artifact

Models = Callable[[str], Path]
TOKENS = token_rows(2, 24).tokens
AWQ: dict[str, Any] = {"method": "awq", "group_size": 32, "grid_points": 6}
SANDWICHED = ("gemma2", "gemma3")  # a norm between each writer and the stream
ROTATABLE = tuple(name for name in ARCHITECTURES if name not in SANDWICHED)
RTN: dict[str, Any] = {"method": "rtn", "scheme": "W4A16", "group_size": 32}


READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def divergence(state: ModelState, original: ModelState) -> float:
    return float(kl_tokens(logits(original, TOKENS), logits(state, TOKENS)).mean())


def with_outliers(model: Path, path: Path, factor: float = 50.0) -> Path:
    """The same function with two huge channels behind each norm of a llama (2 of 64)."""
    shutil.copytree(model, path)
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            tensor[[5, 40]] *= factor
        elif name.removesuffix(".weight").endswith(READERS):
            tensor[:, [5, 40]] /= factor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


SMOOTH: dict[str, Any] = {"method": "smoothquant"}
ALL_PAIRS: dict[str, Any] = {**SMOOTH, "pairs": ["norm", "value", "mlp"]}


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        *((name, AWQ) for name in ARCHITECTURES),
        *((name, ALL_PAIRS) for name in ("llama", "gemma2", "mixtral")),
        *((name, {**SMOOTH, "pairs": ["norm", "value"]}) for name in ("gpt2", "gpt_neox")),
    ],
)
def test_scaling_leaves_the_logits_of_every_architecture(
    tiny_models: Models, tmp_path: Path, name: str, keys: dict[str, Any]
) -> None:
    bench = Bench(tiny_models(name), tmp_path / "run")
    report = bench.apply(bench.original, "transform", **keys)
    assert relative(logits(report.state, TOKENS), logits(bench.original, TOKENS)) < 1e-4
    changed = [f for f in report.facts["pairs"].values() if f["largest_scale"] > 1.01]
    assert changed
    assert report.facts["rounding_kl"] < 1e-6


@pytest.mark.parametrize(
    ("name", "rotation"),
    [*((name, "hadamard") for name in ROTATABLE), ("llama", "random"), ("gpt2", "random")],
)
def test_rotation_leaves_the_logits_of_every_architecture_it_accepts(
    tiny_models: Models, tmp_path: Path, name: str, rotation: str
) -> None:
    bench = Bench(tiny_models(name), tmp_path / "run", calibrated=False)
    report = bench.apply(bench.original, "transform", method="rotate", rotation=rotation)
    assert relative(logits(report.state, TOKENS), logits(bench.original, TOKENS)) < 1e-4
    before = bench.original.read_block(0, bench.original.skeleton()).tensors
    after = report.state.read_block(0, report.state.skeleton()).tensors
    matrices = [n for n, t in before.items() if t.ndim == 2]
    assert all(relative(after[n].float(), before[n].float()) > 0.1 for n in matrices)


GROUPED = fixtures_models._GROUPED
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
MULTIPLIED = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}


@pytest.mark.parametrize("keys", [AWQ, {"method": "rotate"}])
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("phi", fixtures_models._COMMON),  # one norm feeds attention and MLP
        ("phi3", {**GROUPED, "pad_token_id": 0}),  # q, k, v in one matrix; gate and up in another
        ("qwen2_moe", {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 96}),
        ("granite", {**GROUPED, **MULTIPLIED}),
        ("cohere", {**GROUPED, "logit_scale": 0.25}),  # LayerNorm without bias, parallel
        ("gemma", {**GROUPED, "head_dim": 32}),  # 1 + w and no post-norms
    ],
)
def test_other_structures_are_found_without_being_listed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    settings: dict[str, Any],
    keys: dict[str, Any],
) -> None:
    monkeypatch.setitem(fixtures_models._CONFIGS, model_type, (model_type, settings))
    bench = Bench(build(model_type, tmp_path / "model"), tmp_path / "run")
    state = bench.apply(bench.original, "transform", **keys).state
    assert relative(logits(state, TOKENS), logits(bench.original, TOKENS)) < 1e-4


@pytest.mark.parametrize("name", SANDWICHED)
def test_rotation_refuses_post_norms_and_names_them(
    tiny_models: Models, tmp_path: Path, name: str
) -> None:
    bench = Bench(tiny_models(name), tmp_path / "run")
    with pytest.raises(UnsupportedError) as caught:
        bench.apply(bench.original, "transform", method="rotate")
    assert caught.value.code == "CK26"
    assert "post_feedforward_layernorm" in caught.value.why


def test_a_pair_whose_channels_are_read_elsewhere_is_refused(
    tiny_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressor.modeling import smooth_pairs
    from compressor.stages import transform_scaling

    def blind(*args: Any) -> list[smooth_pairs.SmoothPair]:
        pairs = smooth_pairs.norm_pairs(*args[:3])
        return [
            smooth_pairs.SmoothPair("norm", p.source, p.readers[:-1], offset=p.offset)
            for p in pairs
        ]

    monkeypatch.setattr(transform_scaling, "find_pairs", blind)
    bench = Bench(tiny_models("qwen3_moe"), tmp_path / "run")
    with pytest.raises(UnsupportedError, match="would change the output") as caught:
        bench.apply(bench.original, "transform", **AWQ, pairs=["norm"])
    assert caught.value.code == "CK26"


def test_awq_never_raises_the_error_it_searches_on(tiny_models: Models, tmp_path: Path) -> None:
    bench = Bench(tiny_models("mixtral"), tmp_path / "run")
    report = bench.apply(bench.original, "transform", **AWQ)
    pairs = report.facts["pairs"]
    assert any(".experts." in name for name in pairs)
    assert all(f["error"] <= f["error_before"] for f in pairs.values())


@pytest.mark.parametrize("keys", [{**AWQ, "grid_points": 20}, {"method": "rotate"}])
def test_transforms_repair_what_outlier_channels_break(
    tiny_models: Models, tmp_path: Path, keys: dict[str, Any]
) -> None:
    plain = Bench(tiny_models("llama"), tmp_path / "plain")
    bench = Bench(with_outliers(tiny_models("llama"), tmp_path / "model"), tmp_path / "run")
    assert relative(logits(bench.original, TOKENS), logits(plain.original, TOKENS)) < 1e-4
    easy = divergence(plain.apply(plain.original, "quantize", **RTN).state, plain.original)
    broken = divergence(bench.apply(bench.original, "quantize", **RTN).state, bench.original)
    changed = bench.apply(bench.original, "transform", **keys).state
    repaired = divergence(bench.apply(changed, "quantize", **RTN).state, bench.original)
    assert broken > 2 * easy
    assert repaired < 0.6 * broken


@pytest.mark.parametrize(("name", "limit"), [("llama", 1e-12), ("qwen2", 1e-12), ("gemma2", 1e-4)])
def test_powers_of_two_cost_a_bf16_checkpoint_next_to_nothing(
    tmp_path: Path, name: str, limit: float
) -> None:
    model = build(name, tmp_path / "model", dtype="bfloat16")
    bench = Bench(model, tmp_path / "run")
    report = bench.apply(bench.original, "transform", method="smoothquant", alpha=0.9)
    stored = report.state.read_block(0, report.state.skeleton()).tensors
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert report.facts["rounding_kl"] <= limit
    rounded = Bench(model, tmp_path / "any").apply(
        bench.original, "transform", method="smoothquant", alpha=0.9, scales="any"
    )
    assert report.facts["rounding_kl"] <= rounded.facts["rounding_kl"]


def test_a_tied_head_parts_from_the_embedding_and_the_report_says_what_that_costs(
    tiny_models: Models, tmp_path: Path
) -> None:
    bench = Bench(tiny_models("llama_tied"), tmp_path / "run")
    report = bench.apply(bench.original, "transform", method="rotate")
    outer = report.state.read_outer(report.state.skeleton())
    assert report.state.config["tie_word_embeddings"] is False
    assert report.facts["untied_bytes"] == outer["lm_head.weight"].nbytes
    loaded = AutoModelForCausalLM.from_pretrained(export(report.state, tmp_path / "out")).eval()
    with torch.no_grad():
        assert relative(loaded(TOKENS).logits, logits(bench.original, TOKENS)) < 1e-4


def test_scaling_keeps_the_zeros_of_a_pruned_model(tiny_models: Models, tmp_path: Path) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    pruned = bench.apply(bench.original, "prune", pattern="2:4").state
    report = bench.apply(pruned, "transform", **AWQ)
    assert all(groups_hold(weight, 2, 4) for weight in weights(report.state).values())
    assert report.state.blocks[0].meta["masked"] == pruned.blocks[0].meta["masked"]
    with pytest.raises(RecipeError, match="pruned"):
        bench.apply(pruned, "transform", method="rotate")


@pytest.mark.parametrize("keys", [AWQ, {"method": "rotate"}])
def test_an_interrupted_transform_resumes_to_the_same_bytes(
    tiny_models: Models, tmp_path: Path, keys: dict[str, Any]
) -> None:
    whole = Bench(tiny_models("llama_tied"), tmp_path / "whole")
    whole.apply(whole.original, "transform", **keys)
    cut = Bench(tiny_models("llama_tied"), tmp_path / "cut")
    with pytest.raises(Interrupted):
        cut.apply(cut.original, "transform", stop_after=1, **keys)
    cut.apply(cut.original, "transform", index=1, **keys)
    assert units(tmp_path / "cut") == units(tmp_path / "whole")


@pytest.mark.parametrize("name", ["llama_tied", "qwen3_moe"])
@pytest.mark.parametrize("keys", [AWQ, {"method": "rotate"}])
def test_transformers_reads_the_packed_artifact_of_a_transformed_model(
    tiny_models: Models, tmp_path: Path, name: str, keys: dict[str, Any]
) -> None:
    built = build_artifact(
        tiny_models(name), tmp_path / "run", {"kind": "transform", **keys}, {**W4, "bits": 8}
    )
    ours = load_model(built.artifact, packed=True, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(built.artifact, dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(built.model)
    with torch.no_grad():
        got, want, first = (m(TOKENS).logits for m in (ours.model, theirs.eval(), original.eval()))
    assert relative(got, want) < 1e-4
    assert relative(got, first) < 0.1


def recipe(*stages: dict[str, Any]) -> dict[str, Any]:
    calibrate: dict[str, Any] = {"kind": "calibrate"}
    body = {"name": "t", "model": {"path": "m"}, "output": "o"}
    return body | {"stages": [calibrate, *stages, {"kind": "pack"}]}


TRANSFORM: dict[str, Any] = {"kind": "transform", "group_size": 32}
ROTATE: dict[str, Any] = {"kind": "transform", "method": "rotate"}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([W4, TRANSFORM], "neither scaled nor rotated"),
        ([TRANSFORM, ROTATE], "would undo"),
        ([{"kind": "prune", "pattern": "2:4"}, ROTATE], "mix the zeros"),
        ([ROTATE, {"kind": "distill", "hidden_weight": 1.0}], "has rotated"),
        ([{**TRANSFORM, "bits": 3}, W4], "searches scales for bits 3"),
        ([{**TRANSFORM, "group_size": 64}, W4], "group_size 64"),
        ([TRANSFORM, {"kind": "distill", "student": {"num_hidden_layers": 1}}], "throws away"),
    ],
)
def test_orders_that_make_no_sense_are_refused(stages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        parse_recipe(json.dumps(recipe(*stages)), file="r.yaml")
    assert caught.value.code == "RC17"


def test_orders_that_make_sense_are_accepted() -> None:
    for stages in ([ROTATE, TRANSFORM, W4], [{"kind": "prune", "pattern": "2:4"}, TRANSFORM, W4]):
        parse_recipe(json.dumps(recipe(*stages)), file="r.yaml")


@pytest.mark.parametrize(
    "keys", [{"alpha": 0.3}, {"method": "rotate", "bits": 3}, {"method": "smoothquant", "seed": 1}]
)
def test_keys_of_another_method_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises((CompressError, ValueError), match="says nothing to method"):
        TransformConfig.model_validate({"kind": "transform", **keys})


def test_scales_without_calibration_are_refused(tiny_models: Models, tmp_path: Path) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run", calibrated=False)
    with pytest.raises(RecipeError, match="needs a calibrate stage"):
        bench.apply(bench.original, "transform", **AWQ)
