"""Pruning: exact counts, patterns that survive storage, and smaller models that still agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.algorithms.masks import ria
from compressor.errors import CompressError, Interrupted, RecipeError, UnsupportedError
from compressor.modeling.state import ModelState
from compressor.recipe import Width
from compressor.stages.prune_allocation import levels
from tests.fixtures_models import ARCHITECTURES, build
from tests.fixtures_stages import Bench, export, groups_hold, logits, token_rows, units, weights

Models = Callable[[str], Path]
TOKENS = token_rows(2, 24).tokens


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "sparsegpt", "alps"])
def test_every_method_removes_exactly_the_fraction_asked(
    tiny_models: Models, tmp_path: Path, method: str
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    report = bench.apply(bench.original, "prune", method=method, sparsity=0.5)
    for weight in weights(report.state).values():
        assert int((weight == 0).sum()) == weight.numel() // 2
    assert report.facts["sparsity"] == 0.5


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_patterns_hold_in_every_group_of_a_bf16_model_after_storage(
    tmp_path: Path, pattern: str
) -> None:
    bench = Bench(build("llama", tmp_path / "model", dtype="bfloat16"), tmp_path / "run")
    report = bench.apply(bench.original, "prune", pattern=pattern)
    kept, width = map(int, pattern.split(":"))
    for weight in weights(report.state).values():
        assert weight.dtype == torch.bfloat16
        assert groups_hold(weight, width - kept, width)
        assert int((weight == 0).sum()) == weight.numel() // 2


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "alps"])
def test_counts_are_exact_in_the_stored_bf16_weights(tmp_path: Path, method: str) -> None:
    bench = Bench(build("llama", tmp_path / "model", dtype="bfloat16"), tmp_path / "run")
    report = bench.apply(bench.original, "prune", method=method, sparsity=0.25)
    AutoModelForCausalLM.from_pretrained(export(report.state, tmp_path / "out"))
    for weight in weights(report.state).values():
        assert weight.dtype == torch.bfloat16
        assert int((weight == 0).sum()) == weight.numel() // 4


def test_experts_are_pruned_to_the_exact_count(tiny_models: Models, tmp_path: Path) -> None:
    bench = Bench(tiny_models("qwen3_moe"), tmp_path / "run")
    report = bench.apply(bench.original, "prune", pattern="2:4")
    found = weights(report.state)
    assert any("experts.3.down_proj" in name for name in found)
    assert all(groups_hold(weight, 2, 4) for weight in found.values())


def test_reconstruction_lowers_the_error_of_every_layer_and_of_the_model(
    tiny_models: Models, tmp_path: Path
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    plain = bench.apply(bench.original, "prune", method="wanda", sparsity=0.5, reconstruct=False)
    solved = bench.apply(bench.original, "prune", method="wanda", sparsity=0.5)
    for facts in solved.facts["linears"].values():
        assert facts["error"] <= facts["error_before_repair"]
    assert solved.facts["held_out_kl"] < plain.facts["held_out_kl"]


def test_a_quantized_model_keeps_its_formats_and_gets_exact_zeros(
    tiny_models: Models, tmp_path: Path
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    scheme: dict[str, Any] = {"scheme": "W4A16_ASYM", "group_size": 32}
    quantized = bench.apply(bench.original, "quantize", **scheme).state
    pruned = bench.apply(quantized, "prune", pattern="2:4").state
    before = quantized.read_block(1, quantized.skeleton())
    after = pruned.read_block(1, pruned.skeleton())
    assert after.formats == before.formats
    assert after.masked == set(after.formats)
    assert all(groups_hold(weight, 2, 4) for weight in weights(pruned).values())


def test_quantizing_after_pruning_leaves_the_pattern_in_place(
    tiny_models: Models, tmp_path: Path
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    pruned = bench.apply(bench.original, "prune", pattern="2:4").state
    quantized = bench.apply(pruned, "quantize", scheme="W4A16", group_size=32).state
    after = weights(quantized)
    for name, weight in weights(pruned).items():
        assert bool((after[name][weight == 0] == 0).all())


def test_magnitude_needs_no_calibration_and_wanda_does(tiny_models: Models, tmp_path: Path) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run", calibrated=False)
    report = bench.apply(
        bench.original, "prune", method="magnitude", sparsity=0.25, reconstruct=False
    )
    assert report.facts["sparsity"] == 0.25
    with pytest.raises(RecipeError, match="calibrate"):
        bench.apply(bench.original, "prune", method="wanda", sparsity=0.25)


def test_a_stopped_run_goes_on_to_the_same_bytes(tiny_models: Models, tmp_path: Path) -> None:
    whole = Bench(tiny_models("llama"), tmp_path / "whole")
    whole.apply(whole.original, "prune", sparsity=0.5)
    halved = Bench(tiny_models("llama"), tmp_path / "halved")
    with pytest.raises(Interrupted):
        halved.apply(halved.original, "prune", sparsity=0.5, stop_after=1, index=1)
    halved.apply(halved.original, "prune", sparsity=0.5, index=1)
    assert units(tmp_path / "whole") == units(tmp_path / "halved")


def silenced(model: Path, path: Path) -> Path:
    """A copy of a model in which half of the MLP channels of every layer do nothing."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    for layer in loaded.model.layers:
        layer.mlp.down_proj.weight.data[:, ::2] = 0
    loaded.save_pretrained(path)
    return path


def test_pruning_silent_channels_leaves_the_logits_as_they_were(
    tiny_models: Models, tmp_path: Path
) -> None:
    bench = Bench(silenced(tiny_models("llama"), tmp_path / "model"), tmp_path / "run")
    report = bench.apply(bench.original, "prune", width=Width(mlp=0.5))
    assert report.state.config["intermediate_size"] == 64
    torch.testing.assert_close(
        logits(report.state, TOKENS), logits(bench.original, TOKENS), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"])
def test_a_narrower_model_loads_in_transformers_with_the_same_logits(
    tiny_models: Models, tmp_path: Path, name: str
) -> None:
    bench = Bench(tiny_models(name), tmp_path / "run")
    state = bench.apply(bench.original, "prune", width=Width(mlp=0.75, kv_groups=1)).state
    model = AutoModelForCausalLM.from_pretrained(export(state, tmp_path / "out")).eval()
    assert model.config.intermediate_size == 96
    assert model.config.num_attention_heads == 2
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, logits(state, TOKENS))


def test_mending_the_reader_lowers_the_error_of_a_narrower_model(
    tiny_models: Models, tmp_path: Path
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    report = bench.apply(bench.original, "prune", width=Width(mlp=0.5, kv_groups=1))
    for facts in report.facts["linears"].values():
        assert facts["error"] < facts["error_before_repair"]


def test_a_quantized_model_is_narrowed_in_its_own_formats(
    tiny_models: Models, tmp_path: Path
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    quantized = bench.apply(bench.original, "quantize", scheme="W4A16", group_size=32).state
    state = bench.apply(quantized, "prune", width=Width(mlp=96, kv_groups=1)).state
    sizes = {name.partition(".")[2]: tuple(w.shape) for name, w in weights(state).items()}
    assert sizes["mlp.down_proj"] == (64, 96)
    assert sizes["mlp.gate_proj"] == (96, 64)
    assert sizes["self_attn.o_proj"] == (64, 32)
    assert sizes["self_attn.k_proj"] == (16, 64)
    assert bool(torch.isfinite(logits(state, TOKENS)).all())


def with_idle_block(model: Path, path: Path) -> Path:
    """A copy of a model whose block 1 adds nothing."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.model.layers[1].self_attn.o_proj.weight.data.zero_()
    loaded.model.layers[1].mlp.down_proj.weight.data.zero_()
    loaded.save_pretrained(path)
    return path


def test_depth_removes_the_block_that_does_nothing(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "deep", num_hidden_layers=3)
    bench = Bench(with_idle_block(model, tmp_path / "model"), tmp_path / "run")
    report = bench.apply(bench.original, "prune", depth=2)
    assert report.facts["removed"] == [1]
    assert report.facts["held_out_kl"] < 1e-6
    torch.testing.assert_close(logits(report.state, TOKENS), logits(bench.original, TOKENS))


def test_block_influence_finds_the_same_idle_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.stages.prune_depth.COST_LIMIT", 0.0)
    model = build("llama", tmp_path / "deep", num_hidden_layers=3)
    bench = Bench(with_idle_block(model, tmp_path / "model"), tmp_path / "run")
    report = bench.apply(bench.original, "prune", depth=0.67)
    assert (report.facts["ranking"], report.facts["removed"]) == ("block influence", [1])


def test_a_shallower_model_keeps_the_kinds_of_its_layers(
    tiny_models: Models, tmp_path: Path
) -> None:
    bench = Bench(tiny_models("gemma3"), tmp_path / "run")
    kinds = AutoModelForCausalLM.from_pretrained(bench.model).config.layer_types
    state: ModelState = bench.apply(bench.original, "prune", depth=[2, 0]).state
    assert state.config["layer_types"] == [kinds[0], kinds[2]]
    model = AutoModelForCausalLM.from_pretrained(export(state, tmp_path / "out")).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, logits(state, TOKENS))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"depth": 2}, "nothing would be removed"),
        ({"depth": [0, 5]}, "no block 5"),
        ({"depth": [0, 0]}, "repeated"),
        ({"width": Width(mlp=500)}, "500 of 128"),
        ({"width": Width(kv_groups=1.0)}, "keeps everything"),
        ({"sparsity": 0.5, "ignore": ["linear"]}, "every linear layer is ignored"),
    ],
)
def test_requests_that_do_not_fit_the_model_are_refused(
    tiny_models: Models, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    with pytest.raises(RecipeError, match=message):
        bench.apply(bench.original, "prune", **keys)


def test_head_counts_that_the_architecture_forbids_name_the_legal_ones(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "m", num_attention_heads=8, num_key_value_heads=4)
    bench = Bench(model, tmp_path / "run")
    with pytest.raises(RecipeError) as caught:
        bench.apply(bench.original, "prune", width=Width(kv_groups=3))
    assert "1, 2" in caught.value.fix


def test_a_pattern_that_does_not_tile_the_inputs_is_refused(tmp_path: Path) -> None:
    bench = Bench(build("llama", tmp_path / "m", intermediate_size=126), tmp_path / "run")
    with pytest.raises(CompressError, match="do not tile") as caught:
        bench.apply(bench.original, "prune", pattern="2:4")
    assert caught.value.code == "CK29"


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "mixtral"])
def test_width_names_the_architecture_it_does_not_cover(
    tiny_models: Models, tmp_path: Path, name: str
) -> None:
    bench = Bench(tiny_models(name), tmp_path / "run")
    with pytest.raises(UnsupportedError, match=name):
        bench.apply(bench.original, "prune", width=Width(mlp=0.5))


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_a_model_with_fewer_experts_loads_in_transformers_with_the_same_logits(
    tiny_models: Models, tmp_path: Path, name: str
) -> None:
    bench = Bench(tiny_models(name), tmp_path / "run")
    state = bench.apply(bench.original, "prune", width=Width(experts=0.75)).state
    model = AutoModelForCausalLM.from_pretrained(export(state, tmp_path / "out")).eval()
    assert getattr(model.config, "num_local_experts", model.config.num_experts) == 3
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, logits(state, TOKENS))


def test_the_expert_that_adds_nothing_is_the_one_that_goes(
    tiny_models: Models, tmp_path: Path
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(tiny_models("qwen3_moe"))
    for layer in loaded.model.layers:
        layer.mlp.experts.down_proj.data[2] = 0
    loaded.save_pretrained(tmp_path / "model")
    bench = Bench(tmp_path / "model", tmp_path / "run")
    report = bench.apply(bench.original, "prune", width=Width(experts=3))
    kept = [fact["kept"] for fact in report.facts["experts"].values()]
    assert kept == [[0, 1, 3], [0, 1, 3]]


@pytest.mark.parametrize(("name", "count"), [("qwen3_moe", 1), ("qwen3_moe", 4), ("llama", 2)])
def test_experts_that_cannot_be_spared_are_refused(
    tiny_models: Models, tmp_path: Path, name: str, count: int
) -> None:
    bench = Bench(tiny_models(name), tmp_path / "run")
    with pytest.raises(CompressError, match="experts"):
        bench.apply(bench.original, "prune", width=Width(experts=count))


def test_blocks_in_a_row_go_together_if_asked(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "deep", num_hidden_layers=5)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    for index in (0, 2, 3):  # 0 is idle too, but has no idle neighbour
        loaded.model.layers[index].self_attn.o_proj.weight.data.zero_()
        loaded.model.layers[index].mlp.down_proj.weight.data.zero_()
    loaded.save_pretrained(tmp_path / "model")
    bench = Bench(tmp_path / "model", tmp_path / "run")
    report = bench.apply(bench.original, "prune", depth=3, ranking="contiguous")
    assert report.facts["removed"] == [2, 3]
    assert report.facts["rounds"][0]["kl"] < 1e-6


def test_the_last_linear_of_a_block_makes_up_for_the_next_one(tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(build("llama", tmp_path / "deep"))
    first, second = loaded.model.layers
    second.load_state_dict(first.state_dict())
    second.self_attn.o_proj.weight.data.zero_()
    second.mlp.down_proj.weight.data *= 0.1  # a small step that the first block can take, too
    loaded.save_pretrained(tmp_path / "model")
    bench = Bench(tmp_path / "model", tmp_path / "run")
    bench.tokens = token_rows(32, 32)
    mended = bench.apply(bench.original, "prune", depth=[0]).facts["linears"]
    (fact,) = mended.values()
    assert fact["left"] < fact["missing"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_mended_shallower_model_is_no_worse_and_loads_in_transformers(
    tiny_models: Models, tmp_path: Path, name: str
) -> None:
    bench = Bench(tiny_models(name), tmp_path / "run")
    bench.tokens = token_rows(24, 32)
    plain = bench.apply(bench.original, "prune", depth=[0], reconstruct=False)
    mended = bench.apply(bench.original, "prune", depth=[0])
    assert mended.facts["held_out_kl"] <= 1.05 * plain.facts["held_out_kl"]
    model = AutoModelForCausalLM.from_pretrained(export(mended.state, tmp_path / "out")).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, logits(mended.state, TOKENS))


def test_ria_weighs_shares_of_rows_and_columns() -> None:
    w = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    expected = [[1 / 4 + 1 / 3, 2 / 4 + 2 / 3], [3 / 4 + 3 / 5, 2 / 4 + 2 / 5]]
    torch.testing.assert_close(
        ria(w, torch.tensor([16.0, 1.0])), torch.tensor(expected) * torch.tensor([2.0, 1.0])
    )


def test_zeros_move_to_where_they_harm_less(tiny_models: Models, tmp_path: Path) -> None:
    bench = Bench(silenced(tiny_models("llama"), tmp_path / "model"), tmp_path / "run")
    keys = {"method": "wanda", "sparsity": 0.5}
    report = bench.apply(bench.original, "prune", allocation="measured", **keys)
    shares, kl = report.facts["shares"], report.facts["held_out_kl_of"]
    idle = [s for name, s in shares.items() if "down_proj" in name]
    assert min(idle) > 0.5  # half of their columns are zero already
    assert report.facts["allocation"] == "measured"
    assert report.facts["held_out_kl"] == kl["measured"] < kl["uniform"]


def test_shared_out_zeros_are_counted_exactly_and_no_fewer_than_asked(
    tiny_models: Models, tmp_path: Path
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    report = bench.apply(bench.original, "prune", sparsity=0.5, allocation="measured")
    found = weights(report.state)
    zeros = sum(int((w == 0).sum()) for w in found.values())
    assert zeros == report.facts["num_zeros"]
    assert report.facts["sparsity"] >= 0.499


def test_levels_lie_around_the_sparsity_and_below_one() -> None:
    assert levels(0.5) == [0.3, 0.4, 0.5, 0.6, 0.7]
    assert max(levels(0.9)) < 1


def without_last_channels(model: Path, path: Path, count: int) -> Path:
    """A copy of a model that never uses the last channels of its residual stream."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    stream = [loaded.model.embed_tokens.weight]
    for layer in loaded.model.layers:
        stream += [layer.self_attn.o_proj.weight.T, layer.mlp.down_proj.weight.T]
    for weight in stream:
        weight.data[:, -count:] = 0
    loaded.save_pretrained(path)
    return path


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_channels_of_the_stream_that_nobody_writes_go_without_loss(
    tiny_models: Models, tmp_path: Path, name: str
) -> None:
    bench = Bench(without_last_channels(tiny_models(name), tmp_path / "m", 16), tmp_path / "run")
    bench.tokens = token_rows(24, 32)
    report = bench.apply(bench.original, "prune", width=Width(hidden=0.75))
    assert report.state.config["hidden_size"] == 48
    assert report.facts["held_out_kl"] < 1e-4
    model = AutoModelForCausalLM.from_pretrained(export(report.state, tmp_path / "out")).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, logits(report.state, TOKENS))


def test_resolving_helps_a_narrower_stream(tiny_models: Models, tmp_path: Path) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    bench.tokens = token_rows(48, 32)
    plain = bench.apply(bench.original, "prune", width=Width(hidden=56), reconstruct=False)
    solved = bench.apply(bench.original, "prune", width=Width(hidden=56))
    assert solved.facts["held_out_kl"] < plain.facts["held_out_kl"]


@pytest.mark.parametrize(("name", "count"), [("gemma2", 48), ("mixtral", 48), ("llama", 64)])
def test_hidden_sizes_that_cannot_be_had_are_refused(
    tiny_models: Models, tmp_path: Path, name: str, count: int
) -> None:
    bench = Bench(tiny_models(name), tmp_path / "run")
    with pytest.raises(CompressError, match=r"hidden size|cannot be narrowed"):
        bench.apply(bench.original, "prune", width=Width(hidden=count))
