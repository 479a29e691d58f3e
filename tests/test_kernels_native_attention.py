"""Attention of whole rows in C against softmax written out, and when torch takes its place."""

import pytest
import torch
from torch import nn

from compressor.modeling import attention
from compressor_kernels import native
from compressor_kernels import native_attention as rows_in_c
from compressor_kernels.native_attention import attend_rows, causal_ranges, key_ranges, takes

there = takes(*(torch.zeros(1, 1, 1, 32),) * 3)
needs_c = pytest.mark.skipif(not there, reason=native.reason())


def make(batch, heads, kv_heads, queries, keys, size, *, seed=0):
    """q, k, v as transformers hands them over: transposed views of [B, T, H, E]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    made = (torch.randn(batch, t, h, size, generator=generator) for t, h in shapes)
    return tuple(x.transpose(1, 2) for x in made)


def obvious(q, k, v, mask, scale):
    """Softmax over every key of the mask, in float64, head by head."""
    out = torch.zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1], dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            scores = scale * q[b, h].double() @ k[b, h // group].double().T
            weights = scores.masked_fill(~mask[b, 0], -torch.inf).softmax(-1)
            out[b, :, h] = weights @ v[b, h // group].double()
    return out


def causal(batch, length):
    return torch.ones(length, length, dtype=torch.bool).tril().expand(batch, 1, -1, -1).clone()


def documents(batch, length):
    """Causal within documents of uneven lengths."""
    numbers = torch.stack([(torch.arange(length) + 3 * b) // (5 + b) for b in range(batch)])
    return causal(batch, length) & (numbers[:, None, :, None] == numbers[:, None, None, :])


def window(batch, length):
    return causal(batch, length) & ~causal(batch, length).tril(-7)


SHAPES = [
    (2, 4, 2, 37, 32),
    (1, 8, 8, 130, 64),
    (3, 6, 1, 5, 16),
    (2, 2, 2, 1, 80),
    (1, 4, 2, 64, 512),
]


@needs_c
@pytest.mark.parametrize("mask_of", [causal, documents, window])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_softmax_written_out(shape, mask_of):
    batch, heads, kv_heads, length, size = shape
    q, k, v = make(batch, heads, kv_heads, length, length, size)
    mask = mask_of(batch, length)
    ranges = key_ranges(mask)
    found = attend_rows(q, k, v, ranges, size**-0.5)
    expected = obvious(q, k, v, mask, size**-0.5)
    assert found.shape == (batch, length, heads, size)
    assert (found - expected).abs().max() < 5e-6


@needs_c
def test_fewer_queries_than_keys_and_large_scores():
    q, k, v = make(2, 4, 2, 11, 50, 32)
    begin = torch.arange(22, dtype=torch.int32).view(2, 11)
    ranges = begin, begin + 9
    places = torch.arange(50)
    mask = (places >= ranges[0][:, None, :, None]) & (places < ranges[1][:, None, :, None])
    found = attend_rows(q, k, v, ranges, 40.0)  # exp of 40 * 32 overflows without its largest
    assert (found - obvious(q, k, v, mask, 40.0)).abs().max() < 1e-3
    assert torch.isfinite(found).all()


@needs_c
@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 3e38])
def test_what_overflows_in_torch_overflows_in_c(bad):
    q, k, v = make(1, 2, 2, 20, 20, 32)
    q[0, 1, 9] = k[0, 1, 4] = bad  # 3e38: their product overflows, its scaled one would not
    found = attend_rows(q, k, v, causal_ranges(1, 20), 1e-39)
    assert not torch.isfinite(found[0, 9, 1]).any()
    assert torch.isfinite(found[0, :, 0]).all()


def test_ranges_of_masks():
    begin, end = key_ranges(documents(2, 20))
    assert begin[0].tolist()[:7] == [0, 0, 0, 0, 0, 5, 5]
    assert end.tolist() == [list(range(1, 21))] * 2
    mask = causal(1, 4)
    assert all(a.equal(b) for a, b in zip(key_ranges(mask), causal_ranges(1, 4), strict=True))
    mask[0, 0, 3, 1] = False
    assert key_ranges(mask) is None  # a hole
    mask[0, 0, 3] = False
    assert key_ranges(mask) is None  # a query that sees nothing


@needs_c
def test_what_c_cannot_take_is_refused():
    q, k, v = make(1, 4, 2, 6, 6, 32)
    assert takes(q, k, v)
    assert not takes(q.double(), k.double(), v.double())
    assert not takes(*make(1, 4, 2, 6, 6, 20))  # fills no vectors
    assert not takes(q, k, v[..., :16])
    with pytest.raises(ValueError, match="cannot be attended to"):
        attend_rows(q.double(), k, v, causal_ranges(1, 6), 1.0)
    with pytest.raises(ValueError, match="do not belong"):
        attend_rows(q, k, v, causal_ranges(1, 5), 1.0)


class Layer(nn.Module):
    """What transformers' attention functions read of their module."""

    num_key_value_groups = 2
    is_causal = True


def count_calls(monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args)
        return attend_rows(*args)

    monkeypatch.setattr(attention, "attend_rows", counted)
    return calls


@needs_c
@pytest.mark.parametrize(
    "case", ["none", "documents", "one for all", "hole", "gradient", "dropout"]
)
def test_the_function_for_transformers_agrees_with_its_sdpa(monkeypatch, case):
    q, k, v = make(3, 4, 2, 24, 24, 32)
    mask = {"none": None, "one for all": causal(1, 24)}.get(case, documents(3, 24))
    if case == "hole":
        mask[0, 0, 4, 1] = False
    q.requires_grad_(case == "gradient")
    dropout = 1e-9 if case == "dropout" else 0.0
    calls = count_calls(monkeypatch)
    found, _ = attention.attend(Layer(), q, k, v, mask, dropout, scaling=0.3)
    expected, _ = attention.sdpa_attention_forward(Layer(), q, k, v, mask, dropout, scaling=0.3)
    assert torch.allclose(found, expected, atol=2e-6)
    assert len(calls) == (case in ("none", "documents", "one for all"))


@needs_c
def test_ranges_of_a_mask_are_found_once_and_forgotten_with_it(monkeypatch):
    q, k, v = make(3, 4, 2, 24, 24, 32)
    mask, found = documents(3, 24), []
    monkeypatch.setattr(attention, "key_ranges", lambda m: found.append(m.shape) or key_ranges(m))
    before = len(attention._known)
    for _ in range(3):
        attention.attend(Layer(), q, k, v, mask)
    assert len(found) == 1
    assert len(attention._known) == before + 1
    del mask
    assert len(attention._known) == before


def test_torch_computes_where_there_is_no_library(monkeypatch):
    monkeypatch.setattr(rows_in_c.native, "library", lambda: None)
    q, k, v = make(3, 4, 2, 24, 24, 32)
    calls = count_calls(monkeypatch)
    found, _ = attention.attend(Layer(), q, k, v, documents(3, 24))
    assert found.shape == (3, 24, 4, 32)
    assert not calls
