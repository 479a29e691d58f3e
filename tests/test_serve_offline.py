"""Texts, smoke test and benchmark of a folder, without a browser in sight."""

import math
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pytest

from compressor.errors import CheckpointError, ResourceError, UsageError
from compressor.serve.bench import BenchOptions, Sample, measure, run_bench, spread, summary
from compressor.serve.client import Client
from compressor.serve.offline import LLM, generate_text
from compressor.serve.options import ServeOptions
from compressor.serve.sequence import SamplingParams
from compressor.serve.server import serve
from compressor.serve.smoke import Subject, _difference, run_smoke
from tests.fixtures_serve import Live

SMALL = ServeOptions(num_blocks=64)


def test_texts_of_a_batch_equal_texts_alone(tiny_models):
    path, texts = tiny_models("llama"), ["The quick", "import numpy", "for index"]
    params = SamplingParams(temperature=0, max_tokens=6)
    together = generate_text(path, texts, params=params, options=SMALL)
    with LLM.open(path, SMALL) as llm:
        alone = [llm.generate([llm.encode(t)], params)[0] for t in texts]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert all(a.finish_reason in ("length", "stop") for a in together)


def test_pieces_of_text_arrive_as_they_are_made(tiny_models):
    pieces = []
    with LLM.open(tiny_models("qwen3"), SMALL) as llm:
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        (answer,) = llm.generate(
            [llm.encode("Hi", chat=True)], params, on_text=lambda i, text: pieces.append(text)
        )
    assert "".join(pieces) == answer.text


def test_a_prompt_that_cannot_fit_leaves_nothing_behind(tiny_models):
    with LLM.open(tiny_models("llama"), SMALL) as llm:
        with pytest.raises(UsageError):
            llm.generate([[5], [5] * 5000], SamplingParams())
        assert not llm.engine.has_work


def test_the_smoke_test_passes_a_sound_model(tiny_models):
    result = run_smoke(tiny_models("llama"), SMALL, new_tokens=6)
    assert result["ok"], result
    names = [c["name"] for c in result["checks"]]
    assert "greedy parity in a batch" in names
    assert "stream equals whole answer" in names
    assert result["speed"]["tokens_per_s"] > 0


def test_the_smoke_test_names_the_token_where_texts_part():
    live = Live()
    live.engine.runner.close()
    subject = Subject(live, SMALL, 4)
    subject.prompts, subject.expected = [[1, 2, 3]], [[4, 5]]
    assert _difference(subject, 0, [4, 5]) == ""
    assert "token 1 differs" in _difference(subject, 0, [4, 6])
    assert "1 tokens instead of 2" in _difference(subject, 0, [4])
    live.close()


def test_a_changed_file_is_found_before_serving(tiny_models, tmp_path):
    import json
    import shutil

    path = shutil.copytree(tiny_models("llama"), tmp_path / "model")
    digests = {"config.json": "0" * 64}
    keys = ("base", "data", "versions", "tensors", "formats")
    manifest = {**{k: {} for k in keys}, "recipe_sha256": "", "seed": 0, "files": digests}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"config\.json has changed"):
        generate_text(path, ["x"], options=SMALL)


def test_the_benchmark_counts_every_token_and_request():
    live = Live(max_num_seqs=4)
    options = BenchOptions(num_requests=4, concurrency=2, prompt_tokens=20, output_tokens=8)
    result = measure(Client("127.0.0.1", live.port), options)
    live.close()
    assert result["num_failed"] == 0, result["first_error"]
    produced = result["output_tokens_per_s"] * result["duration_s"]
    assert produced == pytest.approx(4 * 8)
    assert result["goodput"] == pytest.approx(result["request_throughput"])
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms"):
        assert 0 <= result[name]["p50"] <= result[name]["p90"] <= result[name]["p99"]


def test_goodput_counts_only_requests_within_the_limits():
    samples = [Sample(10, 1, 20, (1,), 5), Sample(30, 1, 40, (1,), 5), Sample(error="x")]
    result = summary(samples, 2.0, BenchOptions(max_ttft_ms=20))
    assert result["goodput"] == 0.5
    assert result["request_throughput"] == 1.0
    assert result["num_failed"] == 1


def test_percentiles_are_values_that_occurred():
    found = spread([float(v) for v in range(1, 101)])
    assert (found["p50"], found["p90"], found["p99"], found["max"]) == (50, 90, 99, 100)
    assert spread([]) is None
    assert math.isclose(found["mean"], 50.5)


@pytest.mark.parametrize("target", ["https://x", "http://127.0.0.1:9"])
def test_a_target_that_cannot_be_reached_is_an_error(target):
    with pytest.raises((UsageError, ResourceError)):
        run_bench(target)


@pytest.mark.slow
def test_a_served_process_ends_with_status_0_on_sigterm(tiny_models):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    options = replace(SMALL, port=0)
    process = context.Process(target=_serve, args=(tiny_models("llama"), options, theirs))
    process.start()
    theirs.close()
    client = Client("127.0.0.1", ours.recv())
    body = {"prompt": "Hi", "max_tokens": 60, "ignore_eos": True}
    events = client.stream("/v1/completions", body)
    next(events)
    os.kill(process.pid, signal.SIGTERM)
    started = time.monotonic()
    assert [e for _, e in events][-1]["choices"][0]["finish_reason"] == "length"
    process.join(20)
    assert process.exitcode == 0
    assert time.monotonic() - started < 15


def _serve(path, options, connection):
    serve(path, options, on_ready=connection.send)
