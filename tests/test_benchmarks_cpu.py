"""The CPU benchmark's model is a model, and its numbers are what they say."""

import pytest
import torch

from benchmarks import cpu, cpu_dense, cpu_linears
from benchmarks.cpu_linears import candidates, turns
from benchmarks.cpu_model import Shape, write_artifact
from compressor.modeling.load import load_model

SMALL = Shape(hidden=64, inner=96, layers=2, heads=4, kv_heads=2, vocab=320, context=64)


def test_the_random_artifact_loads_with_everything_packed(tmp_path):
    loaded = load_model(write_artifact(SMALL, tmp_path), cpu_activations="auto")
    assert sum(loaded.kernels.values()) == 7 * 2 + 1
    assert loaded.packed_bytes == pytest.approx(SMALL.read_bytes)
    logits = loaded.model(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert logits.isfinite().all()


def test_everything_takes_turns():
    order = []
    calls = {"a": [lambda: order.append("a0"), lambda: order.append("a1")],
             "b": [lambda: order.append("b0")]}  # fmt: skip
    times = turns(calls, 0.0)
    assert order == ["a0", "b0", "a0", "b0", "a1", "b0", "a0", "b0"]  # one of each to warm up
    assert {len(values) for values in times.values()} == {3}


def test_every_row_count_has_a_product_in_bf16(monkeypatch):
    monkeypatch.setattr(cpu_linears, "ROTATED", 1)
    rows = [cpu_linears.measure((64, 128), m, seconds=0.0, inductor=False) for m in (1, 64)]
    page = cpu._linear_tables(rows)
    assert "| 64 x 128, over bf16 | " in page
    assert all({"bf16", "torch int4", "torch int8"} <= row["ways"].keys() for row in rows)
    assert "share of the read bandwidth" in page


def test_all_ways_compute_a_product_of_the_same_shape(monkeypatch):
    monkeypatch.setattr(cpu_linears, "ROTATED", 1)
    for name, candidate in candidates((64, 128), 3, inductor=False).items():
        result = candidate.calls[0]()
        assert isinstance(result, torch.Tensor)
        assert name == "read" or result.shape == (3, 64), name


def test_ratios_are_those_of_turns_side_by_side():
    read = {"read": 9.0, "read_best": 9.5}
    ours = [{"prefill": 10.0, "decode": 4.0, **read}, {"prefill": 1.0, "decode": 1.0, **read}]
    theirs = [{"prefill": 5.0, "decode": 2.0}, {"prefill": 0.5, "decode": 0.5}]
    summary = cpu._summary({"ours": ours, "llama.cpp": theirs}, SMALL)
    assert (summary["prefill_ratio"], summary["decode_ratio"]) == (2.0, 2.0)
    page = cpu._model_table(summary)
    assert "prefill 2.00, decode 2.00" in page


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_model_of_the_same_shape_is_timed(dtype):
    found = cpu_dense.measure(cpu_dense._model(SMALL, dtype), long_prompt=False)
    assert found["decode"] > 0
    assert "prefill" not in found
    rows = [{"prefill": 1.0, "decode": 1.0, "read": 9.0, "read_best": 9.5}]
    turns_of = {"ours": rows, "transformers bfloat16": [{"decode": 0.5}]}
    summary = cpu._summary(turns_of, SMALL)
    assert summary["transformers bfloat16"]["gb_per_s"] == pytest.approx(
        0.5 * SMALL.read_bytes / 4.5 * 16 / 1e9
    )
    assert "| transformers bfloat16 |  | 0.5 |" in cpu._model_table(summary)
