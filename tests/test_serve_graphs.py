"""Recorded decode steps: which graph runs, what padding touches, and that answers stay the same."""

import pytest
import torch

from compressor.serve import runner as runner_module
from compressor.serve.engine import LLMEngine
from compressor.serve.graphs import Captured, buckets, obstacle, warm_sizes
from compressor.serve.offline import LLM
from compressor.serve.options import ServeOptions
from compressor.serve.scheduler import Scheduled
from compressor.serve.sequence import SamplingParams, Sequence
from compressor_kernels.tuning import GemmSpec, choose_config
from tests.test_serve_kv_pools import PARAMS, PROMPTS, build


class Recorder:
    """Stands in for `torch.cuda.graph`: replaying computes again on what is in the buffers."""

    def __init__(self, wrong=1.0):
        self.replayed = []
        self.wrong = wrong

    def __call__(self, compute):
        output = compute().clone()

        def replay():
            self.replayed.append(len(output))
            output.copy_(compute() * self.wrong)

        return Captured(replay, output)


@pytest.fixture
def recorded(monkeypatch):
    """Engines that record; the obstacle of this machine, which has no GPU, is put aside."""
    monkeypatch.setattr(runner_module, "obstacle", lambda *_: "")
    engines = []

    def make(capture, **options):
        given = {"num_blocks": 64, "block_size": 4, "max_num_seqs": 6} | options
        engine = LLMEngine(build(), None, ServeOptions(**given))
        engines.append(engine)
        return engine, engine.runner.open_graphs(6, 64, capture)

    yield make
    for engine in engines:
        engine.close()


def decode(length, blocks, token=5):
    """One new token at the end of a context."""
    sequence = Sequence("x", tuple([token] * length), SamplingParams())
    sequence.block_table = blocks
    return Scheduled(sequence, length - 1, 1)


STEPS = [[decode(3, [1]), decode(9, [2, 7, 3], 8), decode(1, [5], 9)], [decode(4, [1])]]


@pytest.mark.parametrize("kept", ["auto", "fp8"])
def test_answers_are_those_without_graphs(recorded, kept):
    recorder = Recorder()
    engine, note = recorded(recorder, kv_cache_dtype=kept)
    plain = LLMEngine(build(), None, ServeOptions(num_blocks=64, block_size=4, kv_cache_dtype=kept))
    with LLM(plain) as llm:
        expected = [a.token_ids for a in llm.generate(PROMPTS, PARAMS)]
    recorder.replayed.clear()
    found = LLM(engine).generate(PROMPTS, PARAMS)
    assert [a.token_ids for a in found] == expected
    assert 4 in recorder.replayed
    assert "up to 6 sequences recorded" in note


def test_buckets_are_powers_of_two_and_the_largest_number():
    assert [buckets(n) for n in (1, 6, 8)] == [[1], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_a_step_takes_the_smallest_graph_that_holds_it(recorded):
    recorder = Recorder()
    engine, _ = recorded(recorder)
    recorder.replayed.clear()
    for count in range(1, 8):
        engine.runner.run([decode(1, [index]) for index in range(count)])
    assert recorder.replayed == [1, 2, 4, 4, 6, 6]  # seven are run without a graph


def test_padding_rows_write_nothing_but_the_trash_block(recorded):
    engine, _ = recorded(Recorder())
    engine.runner.run([decode(2, [block], 7) for block in (8, 9, 10, 11)])  # fills the buffers
    cache = engine.runner.cache
    for pool in cache.pools[0]:
        pool.data.fill_(float("inf"))
    engine.runner.run(STEPS[0])
    written = [(~p.data.isinf()).flatten(1).any(1).nonzero().flatten() for p in cache.pools[0]]
    assert [w.tolist() for w in written] == [[6, 12, 20, cache.trash_slot]] * 2


@pytest.mark.parametrize("step", STEPS, ids=["three in four", "one"])
def test_padded_logits_are_those_of_the_step_alone(recorded, step):
    engine, _ = recorded(Recorder())
    with_graphs, rows = engine.runner.run(step)
    with_graphs = with_graphs.clone()
    engine.runner.graphs = None
    alone, same_rows = engine.runner.run(step)
    torch.testing.assert_close(with_graphs, alone, rtol=1e-5, atol=1e-5)
    assert rows == same_rows


def test_only_the_rows_asked_for_come_back(recorded):
    engine, _ = recorded(Recorder())
    waiting = decode(3, [1])
    waiting.sequence.tokens.append(4)  # its last token is not in this step
    logits, rows = engine.runner.run([waiting, decode(2, [2])])
    assert (len(logits), rows[0].sampled, rows[1].sampled) == (1, None, 0)


def test_a_model_that_cannot_be_recorded_runs_without_graphs_and_says_why(recorded):
    def refuse(compute):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    engine, note = recorded(refuse)
    assert note == "decoding without CUDA graphs: operation not permitted when stream is capturing"
    assert engine.runner.graphs is None
    assert LLM(engine).generate(PROMPTS[:1], PARAMS)[0].token_ids


def test_graphs_with_other_logits_are_dropped(recorded):
    engine, note = recorded(Recorder(wrong=1.5))
    assert engine.runner.graphs is None
    assert "without CUDA graphs: they differ by 0.5" in note


def test_layers_without_an_attention_kernel_are_an_obstacle():
    engine = LLMEngine(build(), None, ServeOptions(num_blocks=8))
    rules = engine.runner.rules.items()
    found = obstacle(torch.empty(0), engine.runner.cache, rules)
    engine.close()
    assert found == "attention of layer 0 has no kernel for pools of float32"
    assert "without CUDA graphs" in engine.runner.open_graphs(4, 64, Recorder())


@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 512)])
def test_warming_up_runs_every_configuration_of_a_product(shape):
    spec, most = GemmSpec("int4", 128, shape), 700

    def kernel(rows):
        config = choose_config("sm_90", spec, rows)
        return config, rows == 1, rows % 16 == 0

    warmed = {kernel(rows) for rows in warm_sizes(most)}
    assert {kernel(rows) for rows in range(1, most + 1)} == warmed


def test_a_warm_engine_answers_the_same(recorded):
    engine, _ = recorded(Recorder())
    before = LLM(engine).generate(PROMPTS[:1], PARAMS)[0].token_ids
    engine.pool.forget_all()
    engine.runner.warm_up(warm_sizes(64))
    assert LLM(engine).generate(PROMPTS[:1], PARAMS)[0].token_ids == before
