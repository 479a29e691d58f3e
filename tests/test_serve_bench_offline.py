"""`compress bench --offline` measures the engine without HTTP."""

from dataclasses import replace
from pathlib import Path

import pytest

from compressor.errors import UsageError
from compressor.serve.bench import BenchOptions
from compressor.serve.bench_offline import facts, measure_engine, run_offline
from compressor.serve.engine import LLMEngine
from compressor.serve.options import ServeOptions
from tests.fixtures_serve import build_model

OPTIONS = BenchOptions(num_requests=4, concurrency=2, prompt_tokens=9, output_tokens=5)


@pytest.fixture(scope="module")
def engine():
    engine = LLMEngine(build_model(), None, ServeOptions(num_blocks=64))
    yield engine
    engine.close()


def test_rates_are_tokens_over_the_median_seconds(engine):
    result = measure_engine(engine, OPTIONS)
    first, second = result["seconds"]
    prefill = (first["prefill"] + second["prefill"]) / 2
    assert result["prefill_tokens_per_s"] == pytest.approx(2 * 9 / prefill)
    assert result["decode_tokens_per_s"] == pytest.approx(2 * result["decode_steps_per_s"])


def test_one_token_has_no_decoding_to_measure(engine):
    result = measure_engine(engine, replace(OPTIONS, output_tokens=1))
    assert result["decode_tokens_per_s"] is None


def test_the_bytes_of_a_step_are_those_of_the_linears(engine):
    model = engine.runner.model
    bytes_in_blocks = sum(
        p.nbytes for name, p in model.named_parameters() if "_proj" in name or "lm_head" in name
    )
    assert facts(engine)["weight_bytes"] == bytes_in_blocks
    assert facts(engine)["kernels"] == ["dense"]


def test_options_of_a_server_are_refused():
    with pytest.raises(UsageError, match="belong to a server"):
        run_offline(Path("nowhere"), replace(OPTIONS, request_rate=3.0))
