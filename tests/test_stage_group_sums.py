"""Sums of a group counted in several lanes, and weights that passes share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compressor.algorithms.side_by_side import at_once
from compressor.modeling import block as block_module
from compressor.modeling.block import Block
from compressor.modeling.checkpoint import open_checkpoint
from compressor.modeling.state import ModelState
from compressor.modeling.walk import Walk, WalkOptions
from compressor.stages.group_sums import NARROW, Batch, GroupSums, Watched, num_lanes, summed
from tests.stage_fixtures import random_rows

Models = Callable[[str], Path]
INPUT, OUTPUT = "mlp.gate_proj", "mlp.down_proj"
CPU = torch.device("cpu")


@pytest.fixture
def walk(tiny_models: Models, tmp_path: Path) -> Walk:
    state = ModelState.of_checkpoint(open_checkpoint(tiny_models("llama")))
    return Walk(state, random_rows(), WalkOptions(tmp_path))


def batches(block: Block, watched: Watched, *, masked: bool) -> list[Batch]:
    """Of unequal lengths; the rows of a mask differ."""
    draw = torch.Generator().manual_seed(0)
    name = (watched.inputs + watched.outputs)[0]
    rows, columns = block.linears[name].shape
    width = columns if watched.inputs else rows
    found: list[Batch] = []
    for count in (7, 1, 12, 5):
        x = torch.randn(count, columns, generator=draw)
        seen = {name: torch.randn(count, width, generator=draw)}
        mask = torch.rand(count, generator=draw) > 0.3 if masked else None
        found.append((x, seen, mask))
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("watched", [Watched((INPUT,), ()), Watched((), (OUTPUT,))])
@pytest.mark.parametrize("count", [2, 3, 30])
def test_lanes_count_every_token_once(
    walk: Walk, watched: Watched, count: int, masked: bool
) -> None:
    block = walk.load(0)
    columns = block.linears[watched.names[0]].shape[1]
    seen = batches(block, watched, masked=masked)
    one, many = (
        summed([GroupSums(block, columns, watched, CPU) for _ in range(n)], seen).finish()
        for n in (1, count)
    )
    assert one.num_tokens == many.num_tokens > 0
    torch.testing.assert_close(one.hessian, many.hessian, rtol=1e-5, atol=1e-6)
    if watched.inputs:
        torch.testing.assert_close(one.cross, many.cross, rtol=1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(one.drift, many.drift, rtol=1e-5, atol=1e-5)


def test_wide_sums_have_one_lane() -> None:
    assert num_lanes(NARROW, CPU) == min(torch.get_num_threads(), num_lanes(8, CPU))
    assert num_lanes(NARROW, CPU) == at_once(CPU)
    assert num_lanes(NARROW + 1, CPU) == 1


def test_held_weights_are_shared_and_let_go(walk: Walk) -> None:
    block, rows = walk.load(0), slice(0, 2)
    hidden, kwargs = walk.open_stream("s").read(rows), walk.kwargs(rows, 0)
    with torch.no_grad():
        plain = block.run(hidden, kwargs)
        with block.holding([INPUT]):
            assert [n for n, linear in block.linears.items() if linear.held is not None] == [INPUT]
        with block.holding():
            assert all(linear.held is not None for linear in block.linears.values())
            assert torch.equal(block.run(hidden, kwargs), plain)
        with pytest.raises(KeyError), block.holding():
            raise KeyError
    assert all(linear.held is None for linear in block.linears.values())


def test_large_weights_are_not_held(walk: Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    block = walk.load(0)
    rows, columns = block.linears[INPUT].shape
    monkeypatch.setattr(block_module, "HELD_BYTES", 4 * rows * columns)
    with block.holding([INPUT]):
        assert block.linears[INPUT].held is not None
    with block.holding([INPUT, OUTPUT]):
        assert block.linears[INPUT].held is None
