"""Passes that wait inside a block: same numbers as plain runs, and nothing is left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.modeling import paused
from compressor.modeling.block import Block, inputs_of
from compressor.modeling.checkpoint import open_checkpoint
from compressor.modeling.paused import PausedRuns
from compressor.modeling.state import ModelState
from compressor.modeling.walk import Walk, WalkOptions
from compressor.stages.statistics import BlockStatistics, Collection, Streams, calibration_rows
from tests.stage_fixtures import random_rows

HEADS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
Models = Callable[[str], Path]


def opened(model: Path, folder: Path, **options: Any) -> Walk:
    state = ModelState.of_checkpoint(open_checkpoint(model))
    return Walk(state, random_rows(), WalkOptions(folder, tokens_per_batch=72, **options))


def forwards(walk: Walk, block: Block) -> list[Callable[[], torch.Tensor]]:
    stream = walk.open_stream("s")
    return [
        lambda r=rows: block.run(stream.read(r), walk.kwargs(r, 0))  # type: ignore[misc]
        for rows in walk.batches()
    ]


def test_inputs_and_outputs_are_those_of_plain_runs(tiny_models: Models, tmp_path: Path) -> None:
    walk = opened(tiny_models("llama"), tmp_path)
    block, first = walk.load(0), next(walk.batches())
    hidden = walk.open_stream("s").read(first)
    plain = inputs_of(block, HEADS, hidden, walk.kwargs(first, 0))
    with torch.no_grad():
        out = block.run(hidden, walk.kwargs(first, 0))
    with PausedRuns(block, HEADS, forwards(walk, block)) as runs:
        for head in HEADS:
            assert torch.equal(runs.inputs(head)[0], plain[head])
        assert torch.equal(next(runs.outputs()), out)


def test_what_is_changed_while_a_pass_waits_is_seen_behind_it(
    tiny_models: Models, tmp_path: Path
) -> None:
    walk = opened(tiny_models("llama"), tmp_path)
    block = walk.load(0)
    with PausedRuns(block, HEADS, forwards(walk, block)) as runs:
        runs.inputs(HEADS[0])
        before = runs.inputs(HEADS[1])[0]
        block.linears["self_attn.o_proj"].set_dense(torch.zeros(64, 64))
        after = runs.inputs(HEADS[2])[0]
    fresh = inputs_of(
        block, HEADS, walk.open_stream("s").read(slice(0, 3)), walk.kwargs(slice(0, 3), 0)
    )
    assert torch.equal(fresh[HEADS[1]], before)
    assert torch.equal(fresh[HEADS[2]], after)


def test_no_thread_is_left_when_the_work_in_between_ends_early(
    tiny_models: Models, tmp_path: Path
) -> None:
    walk = opened(tiny_models("llama"), tmp_path)
    block, before = walk.load(0), threading.active_count()
    runs = PausedRuns(block, HEADS, forwards(walk, block))
    runs.inputs(HEADS[0])
    runs.close()  # as leaving the `with` block does, whatever happened in it
    assert threading.active_count() == before


def test_an_error_of_a_pass_reaches_whoever_waits_for_it(
    tiny_models: Models, tmp_path: Path
) -> None:
    walk = opened(tiny_models("llama"), tmp_path)
    block = walk.load(0)

    def broken() -> torch.Tensor:
        raise FloatingPointError("inside")

    with pytest.raises(FloatingPointError, match="inside"), PausedRuns(block, HEADS, [broken]) as r:
        r.inputs(HEADS[0])


def test_a_slow_pass_does_not_keep_the_others_from_going_on(
    tiny_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paused, "at_once", lambda device: 2)
    walk, others_are_through = opened(tiny_models("llama"), tmp_path), threading.Event()

    def slow() -> torch.Tensor:
        return torch.tensor(float(others_are_through.wait(timeout=30)))

    def last() -> torch.Tensor:
        others_are_through.set()
        return torch.zeros(())

    passes = [slow, lambda: torch.zeros(()), lambda: torch.zeros(()), last]
    with PausedRuns(walk.load(0), [], passes) as runs:
        assert next(runs.outputs()) == 1.0, "the last pass never had its turn"


def collected(walk: Walk, *, final: bool) -> tuple[list[Any], torch.Tensor, torch.Tensor]:
    """H and D of the groups of block 0, each group zeroed after it was handed out; the streams."""
    streams = Streams(walk.open_stream("r"), walk.open_stream("c"))
    rows = calibration_rows(walk)
    statistics = BlockStatistics(walk, streams, rows, Collection(True, True, final))
    original, block = walk.load(0), walk.load(0)
    found = []
    for group, result in statistics.groups(0, original, block, set(block.linears)):
        drift = [result.cross] if result.drift is None else list(result.drift.values())
        found.append((group, result.hessian, *drift))
        for name in group:
            block.linears[name].set_dense(block.linears[name].dense() * 0.5)
    walk.advance(streams.reference, original, 0)
    walk.advance(streams.compressed, block, 0)
    every = slice(0, len(walk.tokens))
    return found, streams.reference.read(every), streams.compressed.read(every)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2", "gpt2"])
@pytest.mark.parametrize("final", [True, False])
def test_waiting_and_running_again_give_the_same_statistics(
    tiny_models: Models, tmp_path: Path, name: str, final: bool
) -> None:
    fast = collected(opened(tiny_models(name), tmp_path), final=final)
    slow = collected(opened(tiny_models(name), tmp_path, pause_bytes=0), final=False)
    assert [g for g, *_ in fast[0]] == [g for g, *_ in slow[0]]
    tensors = [[t for _, *each in found for t in each] + rest for found, *rest in (fast, slow)]
    torch.testing.assert_close(*tensors, rtol=1e-5, atol=1e-6)
