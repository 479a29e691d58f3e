"""Distillation: stored forms stay, a killed run ends the same, and it never gets worse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.errors import CheckpointError, Interrupted, NumericError, RecipeError
from compressor.recipe import DistillConfig, Student
from compressor.stages.schedule import batch_rows, learning_rate
from compressor.stages.student import spaced
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
    return short_distillation(tmp_path)


def test_pruned_weights_stay_zero_and_the_model_comes_closer(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any]
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    pruned = bench.apply(bench.original, "prune", pattern="2:4").state
    report = bench.apply(pruned, "distill", **short)
    before, after = weights(pruned), weights(report.state)
    assert all(groups_hold(weight, 2, 4) for weight in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in after)
    assert report.facts["kl_after"] < report.facts["kl_before"]
    assert report.facts["teacher"] == bench.original.checkpoint.digest


def test_training_scales_keeps_every_code_and_what_is_stored_is_what_was_measured(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any]
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    quantized = bench.apply(bench.original, "quantize", scheme="W2A16_ASYM", group_size=32).state
    report = bench.apply(quantized, "distill", **short | {"learning_rate": 2e-4})
    assert report.facts["best_step"] > 0
    for position in range(2):
        old, new = (s.read_block(position, s.skeleton()) for s in (quantized, report.state))
        assert new.formats == old.formats
        same = {n for n in old.tensors if torch.equal(old.tensors[n], new.tensors[n])}
        assert {n for n in old.tensors if n.endswith(("packed", "shape", "zero_point"))} <= same
        assert "self_attn.q_proj.weight_scale" not in same
    assert held_out_kl(bench, report.state, short) == pytest.approx(report.facts["kl_after"])


def test_a_bf16_student_is_judged_as_it_is_stored(tmp_path: Path, short: dict[str, Any]) -> None:
    bench = Bench(build("qwen2", tmp_path / "model", dtype="bfloat16"), tmp_path / "run")
    pruned = bench.apply(bench.original, "prune", sparsity=0.5).state
    report = bench.apply(pruned, "distill", **short)
    assert weights(report.state)["0.mlp.up_proj"].dtype == torch.bfloat16
    assert held_out_kl(bench, report.state, short) == pytest.approx(
        report.facts["kl_after"], rel=1e-5
    )


def test_a_rate_that_ruins_the_model_leaves_it_as_it_was(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any]
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    pruned = bench.apply(bench.original, "prune", sparsity=0.25).state
    report = bench.apply(pruned, "distill", **short | {"learning_rate": 1.0, "spike_factor": 1e9})
    assert report.facts["best_step"] == 0
    assert report.facts["kl_after"] == report.facts["kl_before"]
    assert report.state.blocks == pruned.blocks


def test_an_explosion_stops_at_the_last_good_step_and_keeps_it(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any]
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    pruned = bench.apply(bench.original, "prune", sparsity=0.25).state
    keys = short | {"learning_rate": 1.0, "spike_factor": 1.5, "spike_retries": 0}
    with pytest.raises(NumericError, match="diverged") as caught:
        bench.apply(pruned, "distill", **keys)
    assert caught.value.code == "NU10"
    assert any(name.endswith("last-good.safetensors") for name in units(tmp_path / "run"))


@pytest.mark.parametrize("stop_after", [1, 2, 3, 6])
def test_a_run_stopped_at_any_step_ends_with_the_same_bytes(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any], stop_after: int
) -> None:
    whole = Bench(tiny_models("llama_tied"), tmp_path / "whole")
    shallow = {"student": Student(num_hidden_layers=1)}
    first = whole.apply(whole.original, "distill", **short | shallow)
    halved = Bench(tiny_models("llama_tied"), tmp_path / "halved")
    with pytest.raises(Interrupted):
        halved.apply(halved.original, "distill", stop_after=stop_after, index=1, **short | shallow)
    second = halved.apply(halved.original, "distill", index=1, **short | shallow)
    assert units(tmp_path / "whole") == units(tmp_path / "halved")
    assert first.facts == second.facts
    assert journal(tmp_path / "whole") == journal(tmp_path / "halved")


def journal(folder: Path) -> list[str]:
    """The chain digests of a run."""
    lines = (folder / "journal.jsonl").read_text().splitlines()
    return [json.loads(line)["chain"] for line in lines]


def test_micro_batches_do_not_change_the_losses(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any]
) -> None:
    losses = []
    for index, size in enumerate((4096, 24)):
        bench = Bench(tiny_models("llama"), tmp_path / f"run{index}")
        keys = short | {"student": Student(num_hidden_layers=1), "ce_weight": 0.5}
        keys |= {"micro_batch_tokens": size, "hidden_weight": 0.5, "attention_weight": 0.5}
        losses.append(bench.apply(bench.original, "distill", **keys).facts["losses"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_hidden_states_are_matched_with_the_blocks_that_were_kept(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any]
) -> None:
    bench = Bench(tiny_models("gemma3"), tmp_path / "run")
    state = bench.apply(bench.original, "prune", depth=[0, 2]).state
    report = bench.apply(state, "distill", **short | {"hidden_weight": 1.0})
    assert report.facts["kl_after"] < report.facts["kl_before"]


def test_a_random_student_is_the_same_for_the_same_seed(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any]
) -> None:
    runs = []
    for name in ("a", "b"):
        bench = Bench(tiny_models("qwen3"), tmp_path / name)
        report = bench.apply(bench.original, "distill", **short, student=Student(hidden_size=32))
        runs.append(units(tmp_path / name))
        assert "starts from random weights" in report.facts["notes"][0]
        assert report.state.config["hidden_size"] == 32
        assert report.facts["kl_after"] < report.facts["kl_before"]
    assert runs[0] == runs[1]


def test_a_student_with_another_vocabulary_is_refused(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any]
) -> None:
    other = build("llama", tmp_path / "other", vocab_size=400)
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    with pytest.raises(CheckpointError, match="vocabulary"):
        bench.apply(bench.original, "distill", **short, student=Student(path=str(other)))


def test_a_student_may_be_a_checkpoint_of_another_architecture(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any]
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    student = Student(path=str(tiny_models("gpt2")))
    report = bench.apply(bench.original, "distill", **short, student=student)
    assert report.state.config["model_type"] == "gpt2"
    assert report.facts["kl_after"] < report.facts["kl_before"]


@pytest.mark.parametrize("train", ["weights", "scales"])
def test_training_what_is_not_there_is_refused(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any], train: str
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    state = bench.original
    if train == "weights":
        state = bench.apply(state, "quantize", method="rtn", group_size=32).state
    with pytest.raises(RecipeError, match="nothing to train"):
        bench.apply(state, "distill", **short | {"train": train})


def test_changed_text_stops_a_resumed_run(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any]
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    with pytest.raises(Interrupted):
        bench.apply(bench.original, "distill", stop_after=3, index=1, **short)
    Path(short["data"].source).write_text("Other words. " * 400)
    with pytest.raises(RecipeError) as caught:
        bench.apply(bench.original, "distill", index=1, **short)
    assert caught.value.code == "KI13"


def test_batches_are_permutations_of_the_rows_epoch_after_epoch() -> None:
    taken = torch.cat([batch_rows(step, 4, 10, seed=3) for step in range(5)])
    assert sorted(taken[:10].tolist()) == list(range(10))
    assert sorted(taken[10:].tolist()) == list(range(10))
    assert taken[:10].tolist() != taken[10:].tolist()
    assert len(batch_rows(0, 25, 10, seed=3)) == 25


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_rate_warms_up_and_ends_near_zero(schedule: Any) -> None:
    config = DistillConfig(
        kind="distill", steps=100, warmup_steps=10, schedule=schedule, learning_rate=0.5
    )
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.05)
    assert max(rates) == pytest.approx(0.5)
    assert rates[-1] < 0.05
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_students_take_evenly_spaced_blocks() -> None:
    assert spaced(3, 9) == [0, 4, 8]
    assert spaced(1, 9) == [0]
    assert spaced(4, 4) == [0, 1, 2, 3]
