"""How a training is run: losses that fall, spikes that are undone, checkpoints, early stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import tracking as accelerate_tracking
from pydantic import ValidationError
from safetensors.torch import load_file

from compressor.errors import Interrupted, NumericError, UnsupportedError
from compressor.recipe import DistillConfig
from compressor.stages.draft import expected_tokens
from compressor.stages.on_policy import own_count
from compressor.stages.training import Progress, Training
from tests.fixtures_stages import Bench, logits, short_distillation, units

Models = Callable[[str], Path]


@pytest.fixture
def short(tmp_path: Path) -> dict[str, Any]:
    return short_distillation(tmp_path) | {"student": {"num_hidden_layers": 1}}


@pytest.mark.parametrize(
    "keys",
    [
        {"loss": "reverse_kl"},
        {"loss": "jsd", "beta": 0.2},
        {"loss": "total_variation"},
        {"hidden_weight": 0.5, "student": {"hidden_size": 32}},
        {"attention_weight": 1.0},
        {"attention_weight": 1.0, "student": {"hidden_size": 32, "num_attention_heads": 2}},
        {"on_policy": {"fraction": 0.5, "prefix_tokens": 4}},
        {"precision": "bfloat16"},
        {"student": {"layers": [1]}},
        {"student": {"depth": 0.4}},
        {"teacher": {"targets": "top_k", "count": 8}},
    ],
    ids=str,
)
def test_the_student_comes_closer(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any], keys: dict[str, Any]
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    facts = bench.apply(bench.original, "distill", **short | keys).facts
    assert facts["kl_after"] < facts["kl_before"]
    assert 0 < facts["acceptance"] < 1


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt2", "mixtral"])
def test_own_rows_are_what_the_model_would_write_without_a_cache(
    tiny_models: Models, name: str
) -> None:
    from compressor.modeling.checkpoint import open_checkpoint
    from compressor.modeling.state import ModelState
    from compressor.modeling.whole import WholeModel
    from compressor.recipe.data import Sampling
    from compressor.stages.on_policy import _written
    from compressor.stages.self_text import draw, uniform

    model = WholeModel(ModelState.of_checkpoint(open_checkpoint(tiny_models(name))))
    prefix = torch.tensor([[5, 9, 11], [7, 3, 20]])
    rows, _ = _written(model, prefix, 8, 0, [4, 5], Sampling())
    with torch.no_grad():
        for place in range(3, 8):
            hidden = model.hidden_states(rows[:, :place])[0][:, -1]
            u = torch.tensor([uniform(0, number, place) for number in (4, 5)])
            assert torch.equal(rows[:, place], draw(model.head(hidden), u, Sampling()))


def test_the_acceptance_rate_is_what_both_distributions_share(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any]
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    report = bench.apply(bench.original, "distill", **short)
    stored = load_file(tmp_path / "run" / "units" / "01-distill" / "tokens.safetensors")
    held_out = stored["tokens"][-2:]
    p, q = (logits(state, held_out).softmax(-1) for state in (bench.original, report.state))
    assert report.facts["acceptance"] == pytest.approx(float(torch.minimum(p, q).sum(-1).mean()))
    greedy = (p.argmax(-1) == q.argmax(-1)).float().mean()
    assert report.facts["agreement"] == pytest.approx(float(greedy), abs=1e-6)
    assert f"rate {report.facts['acceptance']:.3f} sampled" in report.facts["notes"][-1]


def test_expected_tokens_are_those_of_guesses_accepted_one_after_another() -> None:
    generator = torch.Generator().manual_seed(0)
    accepted = torch.rand(200_000, 4, generator=generator) < 0.7
    tokens = 1 + accepted.int().cumprod(-1).sum(-1).double().mean()
    assert expected_tokens(0.7, 4) == pytest.approx(float(tokens), rel=0.01)
    assert expected_tokens(1.0, 4) == 5


def test_own_rows_are_the_asked_fraction() -> None:
    counts = [own_count(step, 8, 0.3) for step in range(10)]
    assert sum(counts) == 24
    assert set(counts) == {2, 3}


def test_recomputing_blocks_changes_nothing(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any]
) -> None:
    losses = []
    for index, recompute in enumerate((False, True)):
        bench = Bench(tiny_models("gemma3"), tmp_path / f"run{index}")
        keys = short | {"gradient_checkpointing": recompute, "hidden_weight": 0.5}
        losses.append(bench.apply(bench.original, "distill", **keys).facts["losses"])
    assert losses[0] == losses[1]


def test_a_spike_goes_back_to_the_checkpoint_and_on_at_half_the_rate(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, seen = Training._backward, []

    def jumps_once(self: Training, batch: Any) -> float:
        step = self.progress.step
        seen.append(step)
        loss = usual(self, batch)
        return loss if step != 3 or self.progress.spikes else float("inf")

    monkeypatch.setattr(Training, "_backward", jumps_once)
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    facts = bench.apply(bench.original, "distill", **short).facts
    assert seen == [0, 1, 2, 3, 2, 3, 4, 5]
    assert facts["spikes"] == [3]
    assert any("back to a checkpoint" in note for note in facts["notes"])
    assert len(facts["losses"]) == 6


def test_a_spike_before_any_checkpoint_starts_anew_and_retries_end(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []

    def jumps(self: Training, batch: Any) -> float:
        steps.append(self.progress.step)
        return float("nan")

    monkeypatch.setattr(Training, "_backward", jumps)
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    with pytest.raises(NumericError) as caught:
        bench.apply(bench.original, "distill", **short)
    assert steps == [0, 0, 0]
    assert "half the rate 2 times" in caught.value.why


def test_a_loss_is_a_spike_when_it_is_far_above_the_last_ones() -> None:
    made = Training.__new__(Training)
    made.config = DistillConfig(kind="distill", spike_factor=4.0)
    made.progress = Progress(first_loss=3.0)
    assert made._most_loss() == 12.0
    made.progress.recent = [0.5, 0.6, 0.4]
    assert made._most_loss() == 2.0
    made.progress.recent = [0.001]
    assert made._most_loss() == pytest.approx(0.4)


def test_training_stops_when_held_out_kl_falls_no_more(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any]
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    keys = short | {"steps": 40, "patience": 2, "learning_rate": 1.0, "spike_factor": 1e9}
    facts = bench.apply(bench.original, "distill", **keys).facts
    assert facts["steps"] == facts["best_step"] + 4
    assert len(facts["losses"]) == facts["steps"]
    assert any("stopped after" in note for note in facts["notes"])


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_a_timed_checkpoint_is_gone_on_from(
    tiny_models: Models,
    tmp_path: Path,
    short: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    stop_after: int,
) -> None:
    usual, steps = Training._step, []

    def noted(self: Training) -> dict[str, float]:
        steps.append(self.progress.step)
        return usual(self)

    monkeypatch.setattr(Training, "_step", noted)
    keys = short | {"checkpoint_steps": 6, "checkpoint_minutes": 1e-9}
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    with pytest.raises(Interrupted):
        bench.apply(bench.original, "distill", stop_after=stop_after, index=1, **keys)
    facts = bench.apply(bench.original, "distill", index=1, **keys).facts
    assert steps == list(range(6))
    plain = Bench(tiny_models("llama"), tmp_path / "plain")
    wanted = plain.apply(plain.original, "distill", **short | {"checkpoint_steps": 6})
    assert facts == wanted.facts
    assert units(tmp_path / "run") == units(tmp_path / "plain")


@pytest.mark.parametrize("keys", [{"on_policy": {"fraction": 0.5}}, {"hidden_weight": 1.0}])
def test_a_stopped_run_with_more_parts_ends_with_the_same_bytes(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any], keys: dict[str, Any]
) -> None:
    keys = short | {"student": {"hidden_size": 32}} | keys
    whole = Bench(tiny_models("llama"), tmp_path / "whole")
    whole.apply(whole.original, "distill", **keys)
    halved = Bench(tiny_models("llama"), tmp_path / "halved")
    with pytest.raises(Interrupted):
        halved.apply(halved.original, "distill", stop_after=3, index=1, **keys)
    halved.apply(halved.original, "distill", index=1, **keys)
    assert units(tmp_path / "whole") == units(tmp_path / "halved")


def test_relations_need_separate_projections(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any]
) -> None:
    bench = Bench(tiny_models("gpt2"), tmp_path / "run")
    with pytest.raises(UnsupportedError, match="q_proj"):
        bench.apply(bench.original, "distill", **short, attention_weight=1.0)


class Notebook(accelerate_tracking.GeneralTracker):  # type: ignore[misc]
    """A tracker that keeps what it is told."""

    name, requires_logging_directory = "trackio", False
    lines: list[tuple[int | None, dict[str, Any]]]

    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__()
        Notebook.lines = []

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        assert values["steps"] == 6

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        Notebook.lines.append((step, values))


def test_trackers_are_told_every_step(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = accelerate_tracking.LOGGER_TYPE_TO_CLASS
    monkeypatch.setitem(kinds, "trackio", Notebook)
    known = accelerate_tracking.LoggerType.TRACKIO
    monkeypatch.setattr(accelerate_tracking, "_available_trackers", [known])
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    facts = bench.apply(bench.original, "distill", **short, trackers=["trackio"]).facts
    assert [values["loss"] for _, values in Notebook.lines] == facts["losses"]
    assert [step for step, _ in Notebook.lines] == [1, 2, 3, 4, 5, 6]
    assert {"learning_rate", "gradient_norm", "held_out_kl"} <= Notebook.lines[0][1].keys()


def test_a_tracker_that_is_not_installed_is_refused(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerate_tracking, "_available_trackers", [])
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    with pytest.raises(UnsupportedError, match="wandb is not installed"):
        bench.apply(bench.original, "distill", **short, trackers=["wandb"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"teacher": {"targets": "full", "cache": "auto"}}, "not full distributions"),
        ({"teacher": {"targets": "sampled"}}, "for a cache"),
        ({"teacher": {"targets": "sampled", "cache": "auto"}, "loss": "jsd"}, "forward_kl only"),
        ({"teacher": {"targets": "top_k", "cache": "auto"}, "hidden_weight": 1.0}, "every step"),
        ({"teacher": {"targets": "top_k", "cache": "auto"}, "on_policy": {}}, "every step"),
        ({"on_policy": {}, "ce_weight": 0.5}, "ce_weight"),
        ({"student": {"layers": [0], "hidden_size": 8}}, "either path"),
        ({"student": {"layers": [1, 0]}}, "order of the teacher"),
        ({"loss": "kl"}, "forward_kl"),
    ],
)
def test_settings_that_contradict_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DistillConfig.model_validate({"kind": "distill", **keys})


def test_a_block_that_the_teacher_has_not_is_refused(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any]
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    with pytest.raises(Exception, match="no block 9"):
        bench.apply(bench.original, "distill", **short | {"student": {"layers": [0, 9]}})
