"""Mixtures under several limits, kept profiles, measured searches, and the KL that must be held."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from compressor.errors import RecipeError
from compressor.recipe import Budget, QuantizeConfig
from compressor.recipe.budget import parse_footprint
from compressor.stages.context import StageReport
from compressor.stages.costs import kv_bytes, limits_of
from compressor.stages.held_out import is_better
from compressor.stages.latency import DEVICES, find_device
from compressor.stages.prediction import Curve
from compressor.stages.selection import select
from tests.fixtures_models import build
from tests.stage_fixtures import PACK, W4, Bench, random_rows

Models = Callable[[str], Path]
WIDTHS = ["W2A16", "W3A16", "W4A16", "W8A16", "BF16"]


def mixed(model: Path, folder: Path, **budget: Any) -> StageReport:
    budget = {"trials": 0, "profile": "none", **budget}
    stage = {**W4, "method": "rtn", "candidates": WIDTHS, "scores": "swap_in_kl"}
    return Bench(model, folder, random_rows(6, 16)).run({**stage, "budget": budget})


def test_a_footprint_is_bytes_at_a_context() -> None:
    footprint = parse_footprint("24GB@32k")
    assert (footprint.num_bytes, footprint.context) == (24 * 10**9, 32 * 1024)
    with pytest.raises(ValueError, match="24GB@32k"):
        parse_footprint("24GB")


def test_weights_and_cache_fit_together(tiny_models: Models, tmp_path: Path) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run", random_rows(6, 16))
    text = bench.original.config
    width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    cache = 2 * 100 * len(bench.state.blocks) * text["num_key_value_heads"] * width * 2
    assert kv_bytes(bench.original, 100) == cache == 2 * kv_bytes(bench.original, 100, fp8=True)
    budget = {"fits": f"{205 * 1024 + cache}B@100", "trials": 0, "profile": "none"}
    bench.run({**W4, "method": "rtn", "candidates": WIDTHS, "budget": budget})
    written = bench.run(PACK).facts["weight_bytes"]
    assert 0.9 * 205 * 1024 < written <= 205 * 1024


def test_the_decoding_time_is_kept_together_with_the_bytes(
    tiny_models: Models, tmp_path: Path
) -> None:
    device = tmp_path / "slow.json"
    rates = {"W2A16": 0.05, "W3A16": 0.9, "W4A16": 0.9, "W8A16": 0.9, "BF16": 0.9}
    device.write_text(json.dumps({"bandwidth_gb_s": 0.1, "launch_us": 0, "efficiency": rates}))
    limits = {"average_bits": 5.5, "device": str(device)}
    free = mixed(tiny_models("llama"), tmp_path / "a", decode_ms=1e6, **limits).facts
    wanted = 0.9 * free["front"]["chosen"]["decode_ms"]
    fixed = _fixed_ms(tiny_models("llama"), tmp_path, limits)
    tight = mixed(tiny_models("llama"), tmp_path / "b", decode_ms=wanted + fixed, **limits).facts
    assert tight["front"]["chosen"]["decode_ms"] <= wanted + 1e-9
    assert tight["front"]["chosen"]["average_bits"] <= 5.5
    assert tight["front"]["chosen"]["additive_kl"] >= free["front"]["chosen"]["additive_kl"]


def _fixed_ms(model: Path, folder: Path, limits: dict[str, Any]) -> float:
    """What head and norms take of the decoding time."""
    from compressor.run_dir import RunDir

    bench = Bench(model, folder / "limits", random_rows(6, 16))
    config = QuantizeConfig(kind="quantize", budget=Budget(decode_ms=1e6, **limits))
    with RunDir.open(bench.folder, identity={"test": "1"}) as run:
        context = bench.context(run, "quantize")
        found = limits_of(config, context, select(config, bench.state.skeleton()))
    assert found.milliseconds is not None
    return 1e6 - found.milliseconds


def test_devices_are_known_by_name_or_described_by_a_file(tmp_path: Path) -> None:
    where = QuantizeConfig(kind="quantize").where("budget.device")
    assert find_device("H200", where) is DEVICES["h200"]
    assert DEVICES["h200"].milliseconds("W4A16", 4.8e9) == pytest.approx(1 / 0.7 + 0.003)
    with pytest.raises(RecipeError, match="no device is called"):
        find_device("abacus", where)
    (tmp_path / "bad.json").write_text('{"bandwidth": 3}')
    with pytest.raises(RecipeError, match="describes no device"):
        find_device(str(tmp_path / "bad.json"), where)


def test_another_budget_with_a_kept_profile_runs_no_scoring_pass(
    tiny_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = str(tmp_path / "llama.json")
    first = mixed(tiny_models("llama"), tmp_path / "a", average_bits=5.0, profile=kept)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a unit was scored again")

    monkeypatch.setattr("compressor.stages.sensitivity._swap_block", refuse)
    monkeypatch.setattr("compressor.stages.sensitivity.Walk", refuse)
    second = mixed(tiny_models("llama"), tmp_path / "b", average_bits=6.0, profile=kept)
    scores = [r.facts["allocation"]["scores"] for r in (first, second)]
    assert scores[0] == scores[1]


def test_the_profile_is_kept_in_the_cache_folder_unless_told_otherwise(
    tiny_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    mixed(tiny_models("llama"), tmp_path / "a", average_bits=5.0)
    assert not (tmp_path / "cache").exists()
    mixed(tiny_models("llama"), tmp_path / "b", average_bits=5.0, profile="auto")
    assert len(list((tmp_path / "cache/profiles").glob("*.json"))) == 1


def test_a_profile_of_another_model_is_refused(tiny_models: Models, tmp_path: Path) -> None:
    kept = str(tmp_path / "kept.json")
    mixed(tiny_models("llama"), tmp_path / "a", average_bits=5.0, profile=kept)
    with pytest.raises(RecipeError, match="not of this model") as caught:
        mixed(tiny_models("gpt_neox"), tmp_path / "b", average_bits=5.0, profile=kept)
    assert caught.value.code == "KI13"


def test_a_profile_of_other_weights_of_the_same_shape_is_not_used(
    tiny_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    scores = []
    for name in ("same", "other"):
        path = build("llama", tmp_path / name)
        tensors = load_file(path / "model.safetensors")
        if name == "other":
            tensors["model.layers.0.mlp.up_proj.weight"] *= 3
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        found = mixed(path, tmp_path / f"run-{name}", average_bits=5.0, profile="auto")
        scores.append(found.facts["allocation"]["scores"])
    assert scores[0] != scores[1]


def test_the_smallest_model_that_holds_a_kl_holds_it_when_measured(
    tiny_models: Models, tmp_path: Path
) -> None:
    sizes = []
    for max_kl in (3e-3, 3e-4, 3e-5):
        report = mixed(tiny_models("llama"), tmp_path / f"{max_kl}", max_kl=max_kl, trials=2)
        assert report.facts["held_out_kl"] <= max_kl
        sizes.append(report.facts["front"]["chosen"]["bytes"])
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_a_kl_that_no_candidate_holds_is_refused(tiny_models: Models, tmp_path: Path) -> None:
    stage = {**W4, "method": "rtn", "candidates": ["W2A16", "W3A16"], "scores": "swap_in_kl"}
    bench = Bench(tiny_models("llama"), tmp_path / "run", random_rows(6, 16))
    with pytest.raises(RecipeError, match="holds max_kl") as caught:
        bench.run({**stage, "budget": {"max_kl": 1e-9, "profile": "none"}})
    assert caught.value.code == "NU12"


def test_a_finished_search_is_not_made_again(
    tiny_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run", random_rows(6, 16))
    stage = {**W4, "method": "rtn", "candidates": WIDTHS, "budget": {"average_bits": 5.0}}
    first = bench.run(stage)
    monkeypatch.setattr("compressor.stages.search.make_problem", None)
    bench.index, bench.state = 0, bench.original
    again = bench.run(stage)
    assert again.facts == first.facts
    files = {p.name.split("block")[0] for p in bench.folder.rglob("*-block-*.safetensors")}
    assert files == {f"{first.facts['kept']}-"}  # the others are gone


def test_trials_are_kept_only_if_they_are_better(tiny_models: Models, tmp_path: Path) -> None:
    facts = mixed(tiny_models("llama"), tmp_path / "run", average_bits=5.0, trials=3).facts
    trials = [name for name in facts["measured"] if name.startswith("trial")]
    sizes = facts["allocation"]["bytes"]
    assert len(trials) == 3
    assert all(sizes[t] <= facts["allocation"]["budget_bytes"] for t in trials)
    assert facts["held_out_kl"] <= facts["measured"]["mixed"]
    assert any("neighbours tried" in note for note in facts["notes"])


def test_the_front_says_its_formats_and_what_was_measured(
    tiny_models: Models, tmp_path: Path
) -> None:
    facts = mixed(tiny_models("llama"), tmp_path / "run", average_bits=5.0).facts
    front = facts["front"]
    assert all(set(p["formats"].values()) <= set(WIDTHS) for p in front["points"])
    assert front["points"][-1]["predicted_kl"] == 0.0
    assert {row["name"] for row in front["uniform"]} == set(WIDTHS)
    assert front["chosen"]["formats"] == facts["allocation"]["labels"]


def test_the_prediction_passes_through_what_was_measured() -> None:
    curve = Curve()
    assert curve(0.2) == 0.2
    curve.add(0.3, 0.5)
    assert curve(0.15) == pytest.approx(0.25)
    curve.add(0.03, 0.02)
    assert curve(0.3) == pytest.approx(0.5)
    assert curve(0.03) == pytest.approx(0.02)
    assert 0.02 < curve(0.1) < 0.5
    assert curve(0.003) == pytest.approx(0.002)


def test_better_means_better_on_paired_rows() -> None:
    base = [0.1, 0.5, 0.3, 0.9, 0.2, 0.7]
    assert is_better([k - 0.01 - 0.001 * i for i, k in enumerate(base)], base)
    assert not is_better([k + (0.1 if i % 2 else -0.1) for i, k in enumerate(base)], base)
    assert not is_better(base, base)


def test_a_score_table_of_the_search_adds_up(tiny_models: Models, tmp_path: Path) -> None:
    facts = mixed(tiny_models("llama"), tmp_path / "run", average_bits=5.0).facts
    scores, labels = facts["allocation"]["scores"], facts["allocation"]["labels"]
    total = sum(scores[unit].get(label, 0.0) for unit, label in labels.items())
    assert facts["front"]["chosen"]["additive_kl"] == pytest.approx(total)
