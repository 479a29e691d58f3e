"""Evaluation of the saved artifact against the original, and the gate that judges it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressor.errors import CheckpointError, GateError
from compressor.recipe import EvaluateConfig
from compressor.stages.evaluate import check_gate, evaluate_models, evaluate_pair, samples
from tests.fixtures_models import SENTENCES, build
from tests.stage_fixtures import PACK, W4, Bench, Built, build_artifact, random_rows

Models = Callable[[str], Path]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [" ".join(SENTENCES[i % 5 :] + SENTENCES[: i % 5]) + f" {i}" for i in range(24)]
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return path


@pytest.fixture(scope="session")
def coarse(tiny_models: Models, tmp_path_factory: pytest.TempPathFactory) -> Built:
    stage = {**W4, "bits": 2, "method": "rtn"}
    return build_artifact(tiny_models("llama"), tmp_path_factory.mktemp("coarse") / "run", stage)


def config(text: Path, **gate: float) -> EvaluateConfig:
    data = {"source": str(text), "num_samples": 16, "seq_len": 48}
    return EvaluateConfig(kind="evaluate", data=data, gate=gate or None)


def test_a_model_is_exactly_as_good_as_itself(tiny_models: Models, text: Path) -> None:
    path = tiny_models("llama")
    facts = evaluate_models(config(text, max_kl=1e-9, min_top1_agreement=0.99), path, path)
    summary = facts["summary"]
    assert summary["kl_mean"] == pytest.approx(0.0, abs=1e-12)
    assert summary["top1_agreement"] == 1.0
    assert summary["perplexity_ratio"] == pytest.approx(1.0, abs=1e-12)
    assert summary["num_tokens"] == 16 * 47
    json.dumps(facts, allow_nan=False)
    check_gate(facts, path)


def test_a_coarse_model_is_worse_and_its_bytes_are_counted(coarse: Built, text: Path) -> None:
    facts = evaluate_models(config(text), coarse.model, coarse.artifact)
    assert facts["summary"]["kl_mean"] > 0.01
    assert facts["summary"]["top1_agreement"] < 1.0
    assert facts["verdict"]["status"] == "none"
    sizes = facts["bytes"]
    assert sizes["packed_quantized"] < sizes["original_weights"] / 8
    assert sum(facts["kernels"].values()) == 14
    check_gate(facts, coarse.artifact)


@pytest.mark.parametrize(
    ("gate", "status"),
    [
        ({"max_kl": 1e-6}, "fail"),
        ({"min_top1_agreement": 1.0}, "fail"),
        ({"max_kl": 10.0, "min_tokens": 10**6}, "inconclusive"),
    ],
)
def test_a_gate_that_is_not_passed_is_an_error_with_exit_code_7(
    coarse: Built, text: Path, tmp_path: Path, gate: dict[str, Any], status: str
) -> None:
    with pytest.raises(GateError, match=status) as caught:
        evaluate_pair(str(coarse.model), coarse.artifact, config(text, **gate), tmp_path)
    assert caught.value.exit_code == 7
    report = json.loads((tmp_path / "report.json").read_text())
    assert status in json.dumps(report)


def test_a_gate_that_passes_leaves_a_report(coarse: Built, text: Path, tmp_path: Path) -> None:
    found = evaluate_pair(str(coarse.model), coarse.artifact, config(text, max_kl=10), tmp_path)
    assert found["verdict"] == "pass"
    assert (tmp_path / "report.json").is_file()


def test_the_stage_measures_once_and_remembers(
    tiny_models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run", random_rows())
    bench.run({**W4, "method": "rtn"})
    bench.run(PACK)
    stage = config(text).model_dump(exclude_none=True)
    first = bench.run(stage).facts
    bench.index -= 1
    monkeypatch.setattr(
        "compressor.stages.evaluate.load_model", lambda *_, **__: pytest.fail("measured again")
    )
    assert bench.run(stage).facts == first


def test_two_measurements_are_equal(coarse: Built, text: Path) -> None:
    runs = [evaluate_models(config(text), coarse.model, coarse.artifact) for _ in range(2)]
    assert json.dumps(runs[0], sort_keys=True) == json.dumps(runs[1], sort_keys=True)


def test_a_model_without_a_tokenizer_cannot_be_evaluated_on_text(
    text: Path, tmp_path: Path
) -> None:
    path = build("llama", tmp_path / "model")
    for file in path.glob("*token*"):
        file.unlink()
    with pytest.raises(CheckpointError) as caught:
        evaluate_models(config(text), path, path)
    assert caught.value.code == "CK37"


def test_samples_stand_side_by_side(coarse: Built) -> None:
    (row,) = samples(coarse.model, coarse.artifact, [[1, 40, 50, 60]])
    assert set(row) == {"prompt", "base", "model"}
    (same,) = samples(coarse.model, coarse.model, [[1, 40, 50, 60]])
    assert same["base"] == same["model"] == row["base"]
