"""Quantization of whole models: formats, protection, exact resumption, and what feeds on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.artifact.formats import LayerFormat
from compressor.errors import Interrupted, RecipeError, UnsupportedError
from compressor.modeling.block import load_block
from compressor.modeling.checkpoint import open_checkpoint
from compressor.modeling.state import ModelState
from compressor.modeling.walk import Walk, WalkOptions
from compressor.recipe import QuantizeConfig
from compressor.run_dir import RunDir
from compressor.stages.context import StageReport
from compressor.stages.selection import block_linears, select
from tests.fixtures_models import ARCHITECTURES, build
from tests.stage_fixtures import W4, Bench, random_rows, unit_files

Models = Callable[[str], Path]
QUANTIZABLE = tuple(a for a in ARCHITECTURES if a != "gpt2")
MIXED = {**W4, "bits": 3, "symmetric": False}


def quantized(model: Path, folder: Path, **keys: Any) -> tuple[Bench, StageReport]:
    bench = Bench(model, folder, random_rows())
    return bench, bench.run({**W4, **keys})


def formats_of(state: ModelState) -> dict[str, LayerFormat]:
    skeleton = state.skeleton()
    return {
        f"{skeleton.blocks_name}.{i}.{n}": f
        for i in range(len(state.blocks))
        for n, f in state.read_block(i, skeleton).formats.items()
    }


@pytest.mark.parametrize("name", QUANTIZABLE)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_every_linear_of_every_architecture_is_stored_in_the_format_asked_for(
    tiny_models: Models, tmp_path: Path, name: str, method: str
) -> None:
    bench, report = quantized(tiny_models(name), tmp_path / "run", method=method)
    found = formats_of(report.state)
    assert set(found) == {t.name for t in block_linears(bench.state.skeleton())}
    assert set(found.values()) == {LayerFormat(4, 32, True, "float32")}
    assert set(report.facts["linears"]) == set(found)
    assert {f["method"] for f in report.facts["linears"].values()} == {method}
    if method == "gptq":
        assert 0 < report.facts["held_out_kl"] < 0.5


def test_gpt2_is_refused_because_no_packed_format_covers_it(
    tiny_models: Models, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="Conv1D") as caught:
        quantized(tiny_models("gpt2"), tmp_path / "run")
    assert caught.value.exit_code == 10


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3_moe"])
def test_what_is_stored_reproduces_what_the_stage_measured(
    tiny_models: Models, tmp_path: Path, name: str
) -> None:
    bench, report = quantized(tiny_models(name), tmp_path / "run", bits=3, symmetric=False)
    assert bench.tokens is not None
    options = WalkOptions(tmp_path / "again")
    streams = []
    for state in (bench.original, report.state):
        walk = Walk(state, bench.tokens, options)
        stream = walk.open_stream("again")
        for position in range(walk.num_blocks):
            stored = state.read_block(position, walk.skeleton)
            walk.advance(stream, load_block(walk.skeleton, position, stored), position)
        streams.append(walk.logits(stream, slice(8, 9)).double().log_softmax(-1))
    kl = (streams[0].exp() * (streams[0] - streams[1])).sum(-1).mean()
    assert float(kl) == pytest.approx(report.facts["held_out_kl"], rel=1e-3)


def test_solving_against_activations_beats_rounding(tiny_models: Models, tmp_path: Path) -> None:
    errors = {}
    for method in ("gptq", "rtn"):
        bench, report = quantized(tiny_models("llama"), tmp_path / method, method=method, bits=3)
        assert bench.tokens is not None
        walk = Walk(report.state, bench.tokens, WalkOptions(tmp_path))
        base = Walk(bench.original, bench.tokens, WalkOptions(tmp_path))
        logp = [_logp(w) for w in (base, walk)]
        errors[method] = float((logp[0].exp() * (logp[0] - logp[1])).sum(-1).mean())
    assert errors["gptq"] < 0.7 * errors["rtn"]


def _logp(walk: Walk) -> torch.Tensor:
    stream = walk.open_stream("kl")
    for position in range(walk.num_blocks):
        walk.advance(stream, walk.load(position), position)
    return walk.logits(stream, slice(0, 9)).double().log_softmax(-1)


def test_protected_linears_stay_exactly_as_they_were(tiny_models: Models, tmp_path: Path) -> None:
    protect = [r"re:.*\.1\.mlp\.down_proj"]
    bench, report = quantized(tiny_models("llama"), tmp_path / "run", protect=protect)
    name = "model.layers.1.mlp.down_proj"
    assert name not in formats_of(report.state)
    assert report.facts["protected"] == [name]
    assert not any("protected" in note for note in report.facts["notes"])
    stored = report.state.read_block(1, report.state.skeleton()).tensors["mlp.down_proj.weight"]
    assert stored.equal(bench.original.checkpoint.read(f"{name}.weight"))


def test_protecting_one_of_a_fused_group_protects_the_group_and_says_so(
    tiny_models: Models, tmp_path: Path
) -> None:
    protect = ["model.layers.0.self_attn.k_proj"]
    _, report = quantized(tiny_models("llama"), tmp_path / "run", method="rtn", protect=protect)
    qkv = [f"model.layers.0.self_attn.{n}_proj" for n in "qkv"]
    assert sorted(report.facts["protected"]) == sorted(qkv)
    assert not set(qkv) & set(formats_of(report.state))
    (note,) = [n for n in report.facts["notes"] if "protected" in n]
    assert qkv[0] in note
    assert qkv[2] in note


def test_one_protected_expert_protects_all_experts_of_its_layer(
    tiny_models: Models, tmp_path: Path
) -> None:
    protect = ["model.layers.1.mlp.experts.2.up_proj"]
    _, report = quantized(tiny_models("qwen3_moe"), tmp_path / "run", method="rtn", protect=protect)
    dense = set(report.facts["protected"])
    assert len(dense) == 12
    assert all(n.startswith("model.layers.1.mlp.experts.") for n in dense)


@pytest.mark.parametrize("keys", [{"protect": ["model.layers.9.*"]}, {"targets": ["mlp.nothing"]}])
def test_a_pattern_that_matches_nothing_is_refused(
    tiny_models: Models, tmp_path: Path, keys: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError) as caught:
        quantized(tiny_models("llama"), tmp_path / "run", **keys)
    assert caught.value.code == "RC14"


def test_targets_choose_and_the_rest_stays_dense(tiny_models: Models, tmp_path: Path) -> None:
    _, report = quantized(tiny_models("llama"), tmp_path / "run", targets=["*.mlp.*"], method="rtn")
    assert all(".mlp." in name for name in formats_of(report.state))
    assert len(formats_of(report.state)) == 6


def test_a_group_that_does_not_divide_falls_back_and_says_so(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model", intermediate_size=160)
    _, report = quantized(model, tmp_path / "run", group_size=64, method="rtn")
    sizes = {n: f.group_size for n, f in formats_of(report.state).items()}
    assert {s for n, s in sizes.items() if "down_proj" in n} == {32}
    assert {s for n, s in sizes.items() if "down_proj" not in n} == {64}
    note = "group_size 64 does not divide the inputs of 2 linears: they use 32"
    assert note in report.facts["notes"]


def test_a_group_that_does_not_divide_can_be_an_error(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model", intermediate_size=160)
    with pytest.raises(RecipeError, match="does not divide 160") as caught:
        quantized(model, tmp_path / "run", group_size=64, indivisible="error")
    assert caught.value.code == "CK29"


@pytest.mark.parametrize(("stored", "asked", "want"), [
    ("bfloat16", "auto", "bfloat16"), ("float16", "auto", "float16"),
    ("float32", "auto", "float32"), ("bfloat16", "float32", "float32"),
])  # fmt: skip
def test_scales_have_the_dtype_of_the_checkpoint_unless_asked(
    tmp_path: Path, stored: str, asked: str, want: str
) -> None:
    model = build("llama", tmp_path / "model", dtype=stored)
    _, report = quantized(model, tmp_path / "run", scale_dtype=asked, method="rtn")
    assert {f.scale_dtype for f in formats_of(report.state).values()} == {want}
    block = report.state.read_block(0, report.state.skeleton())
    scale = block.tensors["mlp.up_proj.weight_scale"]
    assert scale.dtype == getattr(torch, want)
    assert block.tensors["input_layernorm.weight"].dtype == getattr(torch, stored)


BUDGET = {"budget": {"average_bits": 4.5}, "candidates": ["W3A16", "W4A16"]}


@pytest.mark.parametrize(
    ("keys", "stop_at"),
    [
        pytest.param({}, 1, id="gptq"),
        pytest.param({"method": "rtn"}, 1, id="rtn"),
        pytest.param({"true_sequential": False, "asymmetric_target": False}, 1, id="plain"),
        pytest.param(BUDGET, 1, id="while scoring"),
        pytest.param({**BUDGET, "scores": "output_fisher"}, 5, id="in the mixture"),
        pytest.param({"protect_auto": 0.3}, 3, id="protected"),
    ],
)
def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    tiny_models: Models, tmp_path: Path, keys: dict[str, Any], stop_at: int
) -> None:
    _, whole = quantized(tiny_models("llama"), tmp_path / "whole", **keys)
    bench = Bench(tiny_models("llama"), tmp_path / "halves", random_rows())
    with pytest.raises(Interrupted):
        bench.run({**W4, **keys}, stop_at=stop_at)
    finished = set(unit_files(tmp_path / "halves"))
    report = bench.run({**W4, **keys})
    assert unit_files(tmp_path / "halves") == unit_files(tmp_path / "whole")
    assert finished != set(unit_files(tmp_path / "halves"))
    assert report.facts == whole.facts


def test_finished_blocks_are_not_solved_again(
    tiny_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run", random_rows())
    bench.run(W4)
    bench.index, bench.state = 0, bench.original
    monkeypatch.setattr(RunDir, "log", lambda *_: None)
    monkeypatch.setattr("compressor.stages.solve.gptq", lambda *_, **__: pytest.fail("solved"))
    bench.run(W4)


def test_quantizing_twice_is_refused(tiny_models: Models, tmp_path: Path) -> None:
    bench, _ = quantized(tiny_models("llama"), tmp_path / "run", method="rtn")
    with pytest.raises(RecipeError, match="quantized already"):
        bench.run(W4)


def test_an_expert_without_tokens_is_quantized_nevertheless(
    tiny_models: Models, tmp_path: Path
) -> None:
    bench = Bench(tiny_models("qwen3_moe"), tmp_path / "run", random_rows(2, 2))
    report = bench.run(W4)
    tokens = {f["num_tokens"] for f in report.facts["linears"].values()}
    assert 0 in tokens
    assert len(formats_of(report.state)) == len(block_linears(bench.state.skeleton()))


def test_padding_tokens_do_not_reach_the_statistics(tiny_models: Models, tmp_path: Path) -> None:
    rows = random_rows(9, 16, padded=True)
    rows.tokens[~rows.mask] = 5
    changed = random_rows(9, 16, padded=True)
    changed.tokens[~changed.mask] = 300
    for name, tokens in (("a", rows), ("b", changed)):
        Bench(tiny_models("llama"), tmp_path / name, tokens).run(W4)
    assert unit_files(tmp_path / "a") == unit_files(tmp_path / "b")


def test_the_selection_says_what_every_pattern_matched(tiny_models: Models) -> None:
    skeleton = ModelState.of_checkpoint(open_checkpoint(tiny_models("llama"))).skeleton()
    config = QuantizeConfig(kind="quantize", protect=["*.o_proj"])
    selection = select(config, skeleton)
    assert selection.matched["*.o_proj"] == [f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)]
    assert selection.matched["lm_head"] == ["lm_head"]
    assert len(selection.targets) + len(selection.protected) == 14


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, []),
        ({"scheme": "W4A16_ASYM"}, ["asymmetric"]),
        ({"scheme": "W4A16_ASYM", "engines": ["ours"]}, []),
        ({"budget": {"average_bits": 5.0}, "candidates": ["W4A16", "W8A16"]}, ["experts"]),
    ],
)
def test_what_transformers_cannot_read_is_said(
    tiny_models: Models, keys: dict[str, Any], words: list[str]
) -> None:
    state = ModelState.of_checkpoint(open_checkpoint(tiny_models("qwen3_moe")))
    notes = select(QuantizeConfig(kind="quantize", **keys), state.skeleton()).notes
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))
