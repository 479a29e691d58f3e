"""Documents that share a row do not see each other, in every architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compressor.data import TokenRows, one_document_a_row
from compressor.errors import RecipeError, UnsupportedError
from compressor.modeling.checkpoint import open_checkpoint
from compressor.modeling.state import ModelState
from compressor.modeling.walk import Walk, WalkOptions
from tests.fixtures_models import ARCHITECTURES
from tests.stage_fixtures import Bench, random_rows

Models = Callable[[str], Path]
LENGTHS = ((7, 1, 16), (24,), (3, 21), (12, 12))


def packed() -> TokenRows:
    """Rows of 24 tokens with documents of LENGTHS."""
    rows = random_rows(len(LENGTHS))
    places = [[i for n in lengths for i in range(n)] for lengths in LENGTHS]
    return TokenRows(rows.tokens, rows.mask, "packed", positions=torch.tensor(places))


def final_states(model: Path, folder: Path, rows: TokenRows) -> Tensor:
    """Outputs [N, T, D] of the last block."""
    state = ModelState.of_checkpoint(open_checkpoint(model))
    walk = Walk(state, rows, WalkOptions(folder, tokens_per_batch=48))
    stream = walk.open_stream("s")
    for position in range(walk.num_blocks):
        walk.advance(stream, walk.load(position), position)
    return stream.read(slice(0, len(rows.tokens)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_packed_document_is_computed_as_if_it_were_alone(
    name: str, tiny_models: Models, tmp_path: Path
) -> None:
    rows = packed()
    together = final_states(tiny_models(name), tmp_path, rows).flatten(0, 1)
    apart_rows = one_document_a_row(rows)
    apart = final_states(tiny_models(name), tmp_path, apart_rows)
    alone = [n for lengths in LENGTHS for n in lengths]
    keep = torch.tensor([n > 1 for n in alone for _ in range(n)])  # a single token is passed over
    torch.testing.assert_close(together[keep], apart[apart_rows.mask], rtol=1e-4, atol=1e-5)


def test_documents_apart_are_the_same_tokens_padded_at_the_end() -> None:
    rows = packed()
    apart = one_document_a_row(rows)
    assert apart.mask.sum(1).tolist() == [n for lengths in LENGTHS for n in lengths if n > 1]
    assert torch.equal(apart.tokens[2][:24], rows.tokens[1])
    assert not (apart.mask[:, 1:] & ~apart.mask[:, :-1]).any()
    plain = random_rows()
    assert one_document_a_row(plain) is plain


def test_quantizing_takes_packed_rows(tiny_models: Models, tmp_path: Path) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run", packed())
    report = bench.run({"kind": "quantize", "scheme": "W4A16", "group_size": 32})
    assert report.facts["held_out_kl"] > 0


def test_blocks_that_get_no_mask_are_refused(tiny_models: Models, tmp_path: Path) -> None:
    state = ModelState.of_checkpoint(open_checkpoint(tiny_models("llama")))
    skeleton = state.skeleton()
    skeleton.fill_outer(state.read_outer(skeleton), torch.float32)
    rows = packed()
    run = skeleton._run
    skeleton._run = lambda tokens, mask, positions, **_: run(tokens, mask, None)  # type: ignore[method-assign]
    with pytest.raises(UnsupportedError, match="cannot be kept") as caught:
        skeleton.enter(rows.tokens, positions=rows.positions)
    assert "packing: rows" in caught.value.fix


def test_distillation_refuses_packed_rows(tiny_models: Models, tmp_path: Path) -> None:
    from tests.fixtures_stages import Bench as StageBench

    bench = StageBench(tiny_models("llama"), tmp_path)
    with pytest.raises(RecipeError, match="packed") as caught:
        bench.apply(bench.original, "distill", data={"packing": "packed"}, steps=1)
    assert "joined" in caught.value.fix
