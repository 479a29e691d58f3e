"""Pools of keys and values: codes are those of the definition, and come back as what they are."""

import pytest
import torch

from compressor_kernels.kv_pool import KVPool, load, pack, store, unpack
from compressor_kernels.reference import float_levels

HERE = torch.device("cpu")
STEPS = {"int8": 127, "int4": 7}


def empty(kind, size=64):
    return KVPool.empty((5, 2, size), kind, dtype=torch.float32, device=HERE)


@pytest.mark.parametrize("kind", STEPS)
def test_integers_are_the_nearest_multiples_of_the_largest_number_over_the_top(kind):
    x = torch.randn(3, 2, 64)
    step = x.abs().amax(-1, keepdim=True) / STEPS[kind]
    torch.testing.assert_close(unpack(*pack(x, kind), kind), (x / step).round() * step)


def test_small_floats_are_the_nearest_levels():
    x = torch.randn(3, 2, 64)
    step = x.abs().amax(-1, keepdim=True) / 448
    levels = float_levels(8)
    known = levels[~levels.isnan()]
    nearest = known[((x / step)[..., None] - known).abs().argmin(-1)]
    torch.testing.assert_close(unpack(*pack(x, "e4m3"), "e4m3"), nearest * step)


@pytest.mark.parametrize("kind", [*STEPS, "e4m3"])
def test_what_was_rounded_once_is_not_rounded_again(kind):
    once = unpack(*pack(torch.randn(3, 2, 64), kind), kind)
    torch.testing.assert_close(unpack(*pack(once, kind), kind), once, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [*STEPS, "e4m3", None])
def test_only_the_slots_of_new_tokens_change(kind):
    pool, x = empty(kind), torch.randn(2, 2, 64)
    store(x, torch.tensor([3, 1]), pool)
    everything = load(pool, torch.arange(5), torch.float32)
    assert torch.equal(everything[[3, 1]], x if kind is None else unpack(*pack(x, kind), kind))
    untouched = everything[[0, 2, 4]]
    assert torch.equal(untouched, untouched[:1].expand(3, -1, -1))
    assert untouched.isfinite().all()


def test_zeros_stay_zeros():
    for kind in (*STEPS, "e4m3"):
        assert not unpack(*pack(torch.zeros(1, 1, 64), kind), kind).any()


def test_bytes_are_those_of_words_and_scales():
    sizes = {kind: empty(kind).nbytes for kind in (*STEPS, "e4m3", None)}
    assert sizes == {"int8": 10 * 68, "e4m3": 10 * 68, "int4": 10 * 36, None: 10 * 256}


def test_tokens_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="the pool"):
        store(torch.zeros(1, 2, 32), torch.tensor([0]), empty("int8"))
