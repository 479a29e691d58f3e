"""Blocks and attention in C against torch, slowly and obviously."""

import pytest
import torch
import torch.nn.functional as F

from compressor_kernels import native
from compressor_kernels.native_block import Block, Contexts, Decoder, Norms, Resident, attend
from compressor_kernels.reference import dequantize, num_groups, pack_codes

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.reason())
D, INNER, H, G, E = 64, 96, 4, 2, 16
SHAPES = {
    "q": (H * E, D), "k": (G * E, D), "v": (G * E, D), "o": (D, H * E),
    "gate": (INNER, D), "up": (INNER, D), "down": (D, INNER),
}  # fmt: skip


def make_block(bits=4, *, head_norms=False, biased=False):
    torch.manual_seed(0)
    linears, dense = {}, {}
    for name, shape in SHAPES.items():
        codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
        scale = torch.rand(shape[0], num_groups(shape[1], 32)) * 0.05
        weight = native.Weight(bits, 32, shape)
        bias = torch.randn(shape[0]) if biased else None
        tensors = native.lay_out(weight, pack_codes(codes, bits), scale, None)
        linears[name] = Resident(weight, tensors, bias)
        dense[name] = (dequantize(codes, scale, float(1 << (bits - 1)), 32), bias)
    gains = [torch.rand(n) + 0.5 for n in (D, D, E, E)]
    norms = Norms(*gains[:2], *(gains[2:] if head_norms else (None, None)), eps=1e-5)
    return Block(linears, norms, head_size=E), dense, norms


def norm(x, gain, eps=1e-5):
    return x if gain is None else F.rms_norm(x, (x.shape[-1],), gain, eps)


def turned(x, cosine, sine):
    half = x.shape[-1] // 2
    swapped = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cosine[:, None] + swapped * sine[:, None]


def before(dense, norms, x, turns):
    normed = norm(x, norms.before)
    q, k, v = (F.linear(normed, *dense[n]).view(len(x), -1, E) for n in "qkv")
    return turned(norm(q, norms.query), *turns), turned(norm(k, norms.key), *turns), v


def after(dense, norms, x, attended):
    h = x + F.linear(attended, *dense["o"])
    normed = norm(h, norms.after)
    inner = F.silu(F.linear(normed, *dense["gate"])) * F.linear(normed, *dense["up"])
    return h + F.linear(inner, *dense["down"])


def positions(count):
    angle = torch.rand(count, E // 2).repeat(1, 2) * 6
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("options", [{}, {"head_norms": True}, {"biased": True}, {"bits": 3}])
def test_a_block_computes_what_torch_does(count, options):
    block, dense, norms = make_block(**options)
    x, turns = torch.randn(count, D), positions(count)
    wanted = before(dense, norms, x, turns)
    for got, expected in zip(block.before(x, *turns, rounds=False), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    attended = torch.randn(count, H * E)
    y = block.after(x, attended, rounds=False)
    torch.testing.assert_close(y, after(dense, norms, x, attended), rtol=1e-4, atol=1e-4)


def test_rounded_inputs_change_a_block_a_little():
    block, dense, norms = make_block()
    x, attended = torch.randn(3, D), torch.randn(3, H * E)
    y, exact = block.after(x, attended, rounds=True), after(dense, norms, x, attended)
    assert 1e-4 < float((y - exact).norm() / exact.norm()) < 2e-2


def test_blocks_whose_shapes_do_not_fit_are_refused():
    block, _, norms = make_block()
    linears = {**block._keep[0], "down": block._keep[0]["o"]}
    with pytest.raises(ValueError, match="do not fit together"):
        Block(linears, norms, head_size=E)
    with pytest.raises(ValueError, match="do not divide"):
        Block(block._keep[0], norms, head_size=24)


def pool_and_contexts(lengths, slots=40):
    keys, values = torch.randn(slots, G, E), torch.randn(slots, G, E)
    places = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    order = torch.randperm(slots)
    for row, length in enumerate(lengths):
        places[row, :length] = order[:length]
        order = order[length:]
    return (keys, values), Contexts(places, torch.tensor(lengths))


def slow_attention(q, pool, contexts, *, scale, window):
    rows = []
    for t, length in enumerate(contexts.lengths.tolist()):
        seen = contexts.slots[t, max(0, length - (window or length)) : length]
        k, v = (part[seen].repeat_interleave(H // G, 1) for part in pool)
        weights = torch.einsum("he,lhe->hl", q[t], k).mul(scale).softmax(-1)
        rows.append(torch.einsum("hl,lhe->he", weights, v))
    return torch.stack(rows)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("lengths", [[1], [9, 3, 17]])
def test_attention_sees_the_slots_of_its_sequence(lengths, window):
    pool, contexts = pool_and_contexts(lengths)
    q = torch.randn(len(lengths), H, E)
    got = attend(q, pool, contexts, scale=0.3, window=window)
    wanted = slow_attention(q, pool, contexts, scale=0.3, window=window)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [6, 20, 72, 128])
def test_heads_of_any_size_are_attended(size):
    _, contexts = pool_and_contexts([3, 21])
    pool, q = (torch.randn(40, G, size), torch.randn(40, G, size)), torch.randn(2, H, size)
    got = attend(q, pool, contexts, scale=0.3, window=None)
    wanted = slow_attention(q, pool, contexts, scale=0.3, window=None)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_scores_far_apart_do_not_overflow():
    pool, contexts = pool_and_contexts([5])
    q = torch.randn(1, H, E) * 1e4
    got = attend(q, pool, contexts, scale=1.0, window=None)
    wanted = slow_attention(q, pool, contexts, scale=1.0, window=None)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_pools_of_other_dtypes_are_refused():
    pool, contexts = pool_and_contexts([2])
    half = (pool[0].half(), pool[1])
    with pytest.raises(ValueError, match="float32"):
        attend(torch.randn(1, H, E), half, contexts, scale=1.0, window=None)


@pytest.mark.parametrize("rounds", [True, False])
def test_all_blocks_in_one_call_are_the_blocks_one_by_one(rounds):
    block = make_block()[0]
    pool, contexts = pool_and_contexts([6, 11])
    copies = [tuple(t.clone() for t in pool) for _ in range(4)]
    x, turns = torch.randn(2, D), positions(2)
    wanted, last = x.clone(), contexts.slots.gather(1, contexts.lengths[:, None] - 1).flatten()
    for keys, values in copies[:2]:
        q, k, v = block.before(wanted, *turns, rounds=rounds)
        keys[last], values[last] = k, v
        seen = attend(q, (keys, values), contexts, scale=0.3, window=4)
        wanted = block.after(wanted, seen.flatten(1), rounds=rounds)
    decoder = Decoder([block, block], copies[2:], [(0.3, 4), (0.3, 4)])
    assert torch.equal(decoder(x, turns, contexts, rounds=rounds), wanted)
    assert torch.equal(copies[3][0], copies[1][0])
