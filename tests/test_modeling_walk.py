"""Blocks one at a time give exactly the whole model, for every architecture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.data import TokenRows
from compressor.errors import NumericError
from compressor.modeling import attention
from compressor.modeling.activations import ActivationStore
from compressor.modeling.block import input_phases, inputs_of
from compressor.modeling.checkpoint import Checkpoint, open_checkpoint
from compressor.modeling.state import ModelState
from compressor.modeling.walk import Walk, WalkOptions
from compressor_kernels.native_attention import attend_rows
from tests.fixtures_models import ARCHITECTURES
from tests.stage_fixtures import random_rows

Models = Callable[[str], Path]


def walk_over(path: Path, rows: TokenRows, workdir: Path, **options: Any) -> Walk:
    state = ModelState.of_checkpoint(open_checkpoint(path))
    return Walk(state, rows, WalkOptions(workdir, **options))


def walked_logits(walk: Walk) -> torch.Tensor:
    stream = walk.open_stream("test")
    for position in range(walk.num_blocks):
        walk.advance(stream, walk.load(position), position)
    return walk.logits(stream, slice(0, walk.tokens.shape[0]))


@torch.no_grad()
def whole_logits(path: Path, rows: TokenRows) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    logits: torch.Tensor = model(rows.tokens, attention_mask=rows.mask.long()).logits
    return logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_walk_gives_the_logits_of_transformers(
    tiny_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rows = random_rows(3, 40)
    whole = whole_logits(tiny_models(name), rows)
    walk = walk_over(tiny_models(name), rows, tmp_path, tokens_per_batch=80)
    assert (walked_logits(walk) - whole).abs().max() <= 1e-5  # attention in C sums otherwise
    monkeypatch.setattr(attention, "takes", lambda *_: False)
    assert (walked_logits(walk) - whole).abs().max() <= 1e-6


@pytest.mark.skipif(not attention.takes(*(torch.zeros(1, 1, 1, 32),) * 3), reason="no vectors")
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_attention_in_c_keeps_documents_and_windows_apart_as_torch_does(
    tiny_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rows = random_rows(3, 40)
    places = torch.stack([torch.arange(40) % length for length in (40, 17, 9)])
    rows = TokenRows(rows.tokens, rows.mask, "", positions=places)
    calls = []

    def counted(*args: Any) -> torch.Tensor:
        calls.append(args)
        return attend_rows(*args)

    monkeypatch.setattr(attention, "attend_rows", counted)
    in_c = walked_logits(walk_over(tiny_models(name), rows, tmp_path))
    assert calls
    monkeypatch.setattr(attention, "takes", lambda *_: False)
    by_torch = walked_logits(walk_over(tiny_models(name), rows, tmp_path))
    torch.testing.assert_close(in_c, by_torch, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox", "qwen3_moe"])
def test_padding_does_not_change_the_logits_of_real_tokens(
    tiny_models: Models, tmp_path: Path, name: str
) -> None:
    padded = random_rows(3, 20, padded=True)
    logits = walked_logits(walk_over(tiny_models(name), padded, tmp_path, tokens_per_batch=40))
    for row in range(3):
        length = int(padded.mask[row].sum())
        tokens = padded.tokens[row : row + 1, :length]
        alone = whole_logits(tiny_models(name), TokenRows(tokens, tokens >= 0, ""))
        torch.testing.assert_close(logits[row, :length], alone[0], rtol=1e-4, atol=1e-5)


def test_batches_cover_the_rows_in_order_and_do_not_change_the_result(
    tiny_models: Models, tmp_path: Path
) -> None:
    rows = random_rows(5, 16)
    whole = walked_logits(walk_over(tiny_models("mistral"), rows, tmp_path))
    walk = walk_over(tiny_models("mistral"), rows, tmp_path, tokens_per_batch=33)
    assert [(r.start, r.stop) for r in walk.batches()] == [(0, 2), (2, 4), (4, 5)]
    assert [(r.start, r.stop) for r in walk.batches(slice(1, 4))] == [(1, 3), (3, 4)]
    torch.testing.assert_close(walked_logits(walk), whole, rtol=1e-5, atol=1e-6)


def test_a_memory_mapped_walk_is_the_same_and_leaves_no_file(
    tiny_models: Models, tmp_path: Path
) -> None:
    rows = random_rows(4, 16)
    walk = walk_over(tiny_models("llama"), rows, tmp_path, tokens_per_batch=16, limit_bytes=0)
    stream = walk.open_stream("mapped")
    for position in range(walk.num_blocks):
        walk.advance(stream, walk.load(position), position)
    assert stream.file is not None
    assert stream.file.is_file()
    mapped = walk.logits(stream, slice(0, 4))
    stream.close()
    assert list(tmp_path.iterdir()) == []
    in_memory = walk_over(tiny_models("llama"), rows, tmp_path, tokens_per_batch=16)
    assert torch.equal(mapped, walked_logits(in_memory))


def test_a_store_returns_copies_and_overwrites_in_place(tmp_path: Path) -> None:
    for limit in (0, 1 << 20):
        store = ActivationStore((3, 2, 4), file=tmp_path / "a" / "b", limit_bytes=limit)
        store.write(slice(1, 3), torch.ones(2, 2, 4))
        copy = store.read(slice(0, 3))
        store.write(slice(0, 1), torch.full((1, 2, 4), 5.0))
        assert copy[0].eq(0).all()
        assert store.read(slice(0, 3)).sum(dim=(1, 2)).tolist() == [40.0, 8.0, 8.0]
        store.close()
        assert not (tmp_path / "a" / "b").exists()


def test_only_the_block_at_hand_is_read(
    tiny_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    real = Checkpoint.read

    def counting(self: Checkpoint, name: str, **keys: Any) -> torch.Tensor:
        reads.append(name)
        return real(self, name, **keys)

    monkeypatch.setattr(Checkpoint, "read", counting)
    walk = walk_over(tiny_models("gemma3"), random_rows(2, 8), tmp_path)
    assert not any(".layers." in name for name in reads)
    for position in range(walk.num_blocks):
        reads.clear()
        walk.load(position)
        assert reads
        assert all(f".layers.{position}." in name for name in reads)
        assert max(Counter(reads).values()) == 1


def test_opening_a_state_reads_no_weight(
    tiny_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "_load", lambda *_: pytest.fail("a weight was read"))
    for name in ("llama", "mixtral"):
        ModelState.of_checkpoint(open_checkpoint(tiny_models(name))).skeleton()


def test_activations_that_are_not_finite_name_the_block_and_the_row(
    tiny_models: Models, tmp_path: Path
) -> None:
    walk = walk_over(tiny_models("llama"), random_rows(4, 8), tmp_path, tokens_per_batch=16)
    stream = walk.open_stream("broken")
    broken = stream.read(slice(3, 4))
    broken[0, 2, 5] = float("nan")
    stream.write(slice(3, 4), broken)
    with pytest.raises(NumericError, match=r"after model\.layers\.1 \(calibration row 3\)") as got:
        walk.advance(stream, walk.load(1), 1)
    assert got.value.code == "NU01"


LLAMA = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
PHASES = {
    "llama": LLAMA,
    "qwen3": LLAMA,
    "gemma2": LLAMA,
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
}


@pytest.mark.parametrize("name", sorted(PHASES))
def test_linears_that_share_an_input_are_found_in_the_order_of_the_block(
    tiny_models: Models, tmp_path: Path, name: str
) -> None:
    walk = walk_over(tiny_models(name), random_rows(2, 8), tmp_path)
    stream, rows = walk.open_stream("phases"), slice(0, 2)
    phases = input_phases(walk.load(0), stream.read(rows), walk.kwargs(rows, 0))
    assert all(len(phase) == 1 for phase in phases)
    assert [[n.rpartition(".")[2] for n in phase[0]] for phase in phases] == PHASES[name]


def test_parallel_residuals_do_not_make_different_inputs_one(
    tiny_models: Models, tmp_path: Path
) -> None:
    walk = walk_over(tiny_models("gpt_neox"), random_rows(2, 8), tmp_path)
    stream, rows = walk.open_stream("phases"), slice(0, 2)
    phases = input_phases(walk.load(0), stream.read(rows), walk.kwargs(rows, 0))
    assert all(len(group) == 1 for phase in phases for group in phase)
    assert len(phases) == 4


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("tokens", [1, 24])
def test_experts_are_two_phases_with_every_expert_in_both(
    tiny_models: Models, tmp_path: Path, name: str, tokens: int
) -> None:
    walk = walk_over(tiny_models(name), random_rows(1, tokens), tmp_path)
    stream, rows = walk.open_stream("phases"), slice(0, 1)
    block = walk.load(0)
    phases = input_phases(block, stream.read(rows), walk.kwargs(rows, 0))
    experts = [phase for phase in phases if "experts" in phase[0][0]]
    gates, downs = experts
    assert phases.index(gates) < phases.index(downs)
    assert sorted(sorted(g) for g in gates) == [
        [f"mlp.experts.{i}.gate_proj", f"mlp.experts.{i}.up_proj"] for i in range(4)
    ]
    assert sorted(downs) == [[f"mlp.experts.{i}.down_proj"] for i in range(4)]
    assert {n for p in phases for g in p for n in g} == set(block.linears)


def test_inputs_are_those_the_linears_get(tiny_models: Models, tmp_path: Path) -> None:
    walk = walk_over(tiny_models("llama"), random_rows(2, 8), tmp_path)
    stream, rows = walk.open_stream("inputs"), slice(0, 2)
    block, names = walk.load(1), ["self_attn.q_proj", "mlp.down_proj"]
    seen = inputs_of(block, names, stream.read(rows), walk.kwargs(rows, 1))
    model = AutoModelForCausalLM.from_pretrained(tiny_models("llama"), dtype=torch.float32)
    layer, want = model.model.layers[1], {}
    for name in names:
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: want.__setitem__(name, args[0])
        )
    with torch.no_grad():
        layer(stream.read(rows), **walk.kwargs(rows, 1))
    for name in names:
        torch.testing.assert_close(seen[name], want[name], rtol=1e-5, atol=1e-6)
