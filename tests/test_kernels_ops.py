"""Norm, row quantization, eight-bit products, attention and experts against `reference.py`.

The interpreter runs in one process of its own; it computes in float32 (see `kernels/README.md`).
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import triton

import compressor_kernels
from compressor_kernels import reference
from compressor_kernels.reference import dequantize, num_groups
from compressor_kernels.tuning import GemmSpec, KernelConfig

ROOT = Path(compressor_kernels.__file__).parents[1]
DTYPES = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def distance(y, exact):
    return float((y.cpu().double() - exact).norm() / exact.norm())


def norm_error(device):
    """The norm itself, and sums that are those of its output."""
    from compressor_kernels.norm import rms_norm
    from compressor_kernels.sums import group_sums

    x, weight = torch.randn(3, 300).half(), torch.rand(300)
    spec = GemmSpec("int3", 64, (128, 300))
    y, sums = rms_norm(x.to(device), weight.to(device), eps=1e-6, sums_for=spec)
    exact = reference.rms_norm(x.double(), weight, eps=1e-6)
    again = group_sums(y, "int3", group_size=64, whole=0)
    return max(distance(y, exact), distance(sums, again.double().cpu()))


def quantize_error(device, dtype):
    """Codes equal to the reference's, and their sums, zero behind the last column of a tile."""
    from compressor_kernels.quantize_rows import quantize_rows

    x = torch.cat([torch.randn(4, 300) * 3, torch.zeros(1, 300)])
    q, scale, sums = quantize_rows(x.to(device), DTYPES[dtype], group_size=64)
    expected, factor = reference.quantize_rows(x, DTYPES[dtype])
    assert torch.equal(q.cpu().view(torch.uint8), expected.view(torch.uint8))
    padded = torch.nn.functional.pad(expected.double(), (0, 84)).view(5, 6, 64).sum(-1).t()
    return max(distance(scale, factor.double()), distance(sums, padded))


def w4a8_error(device, dtype, group, asym):
    from compressor_kernels.w4a8 import to_bytes, w4a8

    torch.manual_seed(group)
    size = (130, num_groups(300, group))
    codes = torch.randint(0, 16, (130, 300)).to(torch.uint8)
    scale = (torch.rand(size) * 0.02 + 0.01).bfloat16()
    zero = torch.randint(0, 16, size).to(torch.uint8) if asym else None
    x, bias = torch.randn(5, 300).bfloat16(), torch.randn(130)
    weight = to_bytes(codes, scale, zero, group_size=group, dtype=DTYPES[dtype])
    weight = weight_on(weight, device)
    y = w4a8(x.to(device), weight, bias=bias.to(device), out_dtype=torch.float32)
    q, factor = reference.quantize_rows(x, DTYPES[dtype])
    dense = dequantize(codes, scale.double(), 8.0 if zero is None else zero, group)
    return distance(y, (q.double() * factor.double()[:, None]) @ dense.t() + bias)


def weight_on(weight, device):
    from dataclasses import replace

    names = [
        n for n in ("words", "scales", "zeros", "factor") if getattr(weight, n, None) is not None
    ]
    return replace(weight, **{n: getattr(weight, n).to(device) for n in names})


def w8a8_error(device, dtype):
    from compressor_kernels.w8a8 import w8a8

    weight = torch.randint(-127, 128, (130, 300)).float().to(DTYPES[dtype])
    scale, bias, x = torch.rand(130, 1), torch.randn(130), torch.randn(5, 300)
    y = w8a8(
        x.to(device), weight.to(device), scale.to(device), bias=bias.to(device),
        config=KernelConfig(16, 1, 4, 2),
    )  # fmt: skip
    q, factor = reference.quantize_rows(x, DTYPES[dtype])
    exact = (q.double() * factor.double()[:, None]) @ (weight.double() * scale).t() + bias
    return distance(y, exact)


def stored(kind, x):
    """x [T, heads, E] as the pool holds it, by the definition of the format."""
    if kind is None:
        return x.double()
    top = {"int8": 127.0, "int4": 7.0, "e4m3": 448.0}[kind]
    scale = x.float().abs().amax(-1, keepdim=True) / top
    ratio = x.float() / scale
    ratio = ratio.to(torch.float8_e4m3fn).float() if kind == "e4m3" else ratio.round()
    return ratio.double() * scale.double()


def attention_error(device, kind, dtype, window):
    """Scattered pages, grouped heads, lengths of one token and more than a split."""
    from compressor_kernels.kv_pool import KVPool, Pages
    from compressor_kernels.paged_attention import paged_attention
    from compressor_kernels.store_kv import store_kv

    torch.manual_seed(0)
    number, lengths = getattr(torch, dtype), [1, 70]
    pools = [
        KVPool.empty((160, 2, 64), kind, dtype=number, device=torch.device(device))
        for _ in range(2)
    ]
    blocks, tables, kept = torch.randperm(10).split([1, 9]), torch.zeros(2, 9).int(), []
    for index, length in enumerate(lengths):
        tables[index, : len(blocks[index])] = blocks[index]
        slots = (blocks[index][:, None] * 16 + torch.arange(16)).flatten()[:length]
        kept.append([torch.randn(length, 2, 64).to(number) for _ in pools])
        for x, pool in zip(kept[-1], pools, strict=True):
            store_kv(x.to(device), slots.to(device), pool)
    q = torch.randn(2, 8, 64).to(number)
    pages = Pages(tables.to(device), torch.tensor(lengths).int().to(device), 16)
    y = paged_attention(q.to(device), tuple(pools), pages, scale=0.125, window=window, splits=2)
    exact = [
        reference.paged_attention(
            q[i], *(stored(kind, x) for x in kept[i]), scale=0.125, window=window
        )
        for i in range(2)
    ]
    return distance(y, torch.stack(exact))


def store_error(device, kind):
    """Words and scales of the kernel against those of the specification."""
    from compressor_kernels.kv_pool import KVPool, load, store
    from compressor_kernels.store_kv import store_kv

    x = torch.cat([torch.randn(6, 2, 64) * 3, torch.zeros(1, 2, 64)])
    slots, place = torch.randperm(9)[:7], torch.device(device)
    pools = [KVPool.empty((9, 2, 64), kind, dtype=x.dtype, device=place) for _ in range(2)]
    store_kv(x.to(place), slots.to(place), pools[0])
    store(x.to(place), slots.to(place), pools[1])
    if device == "cpu":  # a GPU divides with an error in the last bit
        assert torch.equal(pools[0].data, pools[1].data)
        assert torch.equal(pools[0].scales, pools[1].scales)
    found, exact = (load(p, slots.to(place), torch.float64).cpu() for p in pools)
    return distance(found, exact)


def served_error(device, kind):
    """The engine's decode attention through the kernel against its own way on a CPU."""
    from compressor.serve.attention import KVCache, PagedBatch, Rule
    from compressor.serve.kv_format import KVFormat, LayerShape
    from compressor_kernels import gpu
    from compressor_kernels.kv_pool import Pages, store

    torch.manual_seed(0)
    kept, here = KVFormat(kind, torch.float16), torch.device("cpu")
    cache = KVCache({0: LayerShape(2, 64, 64)}, 16, block_size=4, kept=kept, device=here)
    for pool in cache.pools[0]:
        store(torch.randn(65, 2, 64).half(), torch.arange(65), pool)
    tables, lengths = torch.randperm(16)[:15].view(3, 5), torch.tensor([1, 20, 13])
    pages, q, rule = Pages(tables.int(), lengths.int(), 4), torch.randn(4, 3, 64), Rule(0.2, 8)
    q = q.half()
    batch = PagedBatch(cache, tables[:, 0], pages, [])
    exact = batch._decode(q.float(), cache.pools[0], rule)
    there = Pages(pages.tables.to(device), pages.lengths.to(device), 4)
    pools = tuple(on(pool, device) for pool in cache.pools[0])
    assert not gpu.attends(q, *cache.pools[0])  # there is no GPU pool here
    rows = q.transpose(0, 1).to(device)
    return distance(gpu.attend(rows, pools, there, scale=0.2, window=8), exact.double())


def on(pool, device):
    from dataclasses import replace

    scales = None if pool.scales is None else pool.scales.to(device)
    return replace(pool, data=pool.data.to(device), scales=scales)


def experts_error(device, kind, group, symmetric):
    """Experts with no, one and many choices."""
    import test_kernels_dequant_gemm as products

    from compressor_kernels.moe_gemm import moe_dequant_gemm, sort_tokens, stack_experts

    torch.manual_seed(0)
    made = [
        products.random_planar(
            (72, 172), kind=kind, group=group, symmetric=symmetric, dtype=torch.float16
        )
        for _ in range(5)
    ]
    x, routing = torch.randn(7, 172).half(), torch.rand(14)
    chosen = torch.tensor([[0, 1], [1, 2], [1, 0], [4, 1], [1, 2], [0, 1], [1, 0]])
    tokens = sort_tokens(chosen.to(device), 5, block_m=16)
    weight = weight_on(stack_experts([weight for weight, _ in made]), device)
    y = moe_dequant_gemm(x.to(device), weight, tokens, shape=(5, 72, 2), routing=routing.to(device))
    dense = torch.stack([matrix for _, matrix in made])
    return distance(y, reference.moe_dequant_gemm(x, dense, chosen, routing))


def split_experts(linear):
    """Five experts whose linears `linear(out, in)` makes."""
    from compressor.modeling.experts import Expert, SplitExperts

    experts = SplitExperts(Expert(96, 72, torch.nn.functional.silu) for _ in range(5))
    for expert in experts:
        for name, child in list(expert.named_children()):
            setattr(expert, name, linear(child.out_features, child.in_features))
    return experts


def packed_linear(packed, device, way=None):
    """A layer computed in a named way on the device; without a name, as a CPU does."""
    from compressor.modeling.packed_linear import PackedLinear
    from compressor_kernels import dispatch

    place = torch.device("cpu" if way is None else device)
    number = torch.float32 if way is None else torch.float16
    chosen = dispatch.choose
    dispatch.choose = chosen if way is None else lambda *_: (way, "here")
    try:
        return PackedLinear(packed, None, device=place, dtype=number)
    finally:
        dispatch.choose = chosen


def eight_bit_error(device, scheme):
    """A layer whose inputs are rounded: eight-bit products against rounding and a dense product."""
    from compressor.artifact.formats import LayerFormat
    from compressor.artifact.packing import pack_weight
    from compressor.modeling.packed_linear import unrounded_inputs
    from compressor.recipe import SCHEMES

    torch.manual_seed(0)
    fmt = LayerFormat.of(SCHEMES[scheme], "float32")
    codes = torch.randint(0, min(126, 1 << fmt.bits), (72, 384)).byte()
    size = (72, fmt.num_groups(384))
    packed = pack_weight(codes, torch.rand(size), torch.full(size, 1 << (fmt.bits - 1)), fmt)
    ours, plain = packed_linear(packed, device, f"w{fmt.bits}a8"), packed_linear(packed, device)
    x = torch.randn(5, 384) * torch.logspace(-1, 1, 384)
    found = distance(ours(x.to(device)), plain(x).double())
    model = torch.nn.ModuleList([ours, plain])
    with unrounded_inputs(model):
        exact = distance(ours(x.to(device)), plain(x).double())
    unrounded = ours.plan.exact.apply(x.to(device), ours._resident())
    assert distance(unrounded, plain(x).double()) > 1e-3  # or nothing was rounded above
    return max(found, exact)


def layer_error(device, group, symmetric):
    """A layer of experts in one launch a matrix against expert after expert on a CPU."""
    from compressor.artifact.formats import LayerFormat
    from compressor.artifact.packing import pack_weight
    from compressor.serve.packed_experts import PackedExperts

    def linear(rows, columns, seeds=None, way=None):
        torch.manual_seed(next(seeds))
        size = (rows, num_groups(columns, group))
        codes, scale = torch.randint(0, 16, (rows, columns)).byte(), torch.rand(size) * 0.02
        zeros = torch.full(size, 8) if symmetric else torch.randint(0, 16, size)
        packed = pack_weight(codes, scale, zeros, LayerFormat(4, group, symmetric, "float32"))
        return packed_linear(packed, device, way)

    plain = split_experts(partial(linear, seeds=iter(range(99))))
    packed = PackedExperts(split_experts(partial(linear, seeds=iter(range(99)), way="triton")))
    torch.manual_seed(0)
    x, weights = torch.randn(7, 96).half(), torch.rand(7, 2)
    chosen = torch.tensor([[0, 1], [1, 2], [1, 0], [4, 1], [1, 2], [0, 1], [1, 0]])
    exact = plain(x.float(), chosen, weights)
    return distance(packed(x.to(device), chosen.to(device), weights.to(device)), exact.double())


# what is run, and how far from the oracle it may be (outputs in fp16 or bf16 round)
CASES = [
    (norm_error, (), 1e-3),
    *[(quantize_error, (dtype,), 1e-6) for dtype in DTYPES],
    *[(w4a8_error, (d, g, a), 1e-6) for d in DTYPES for g, a in ((32, 0), (64, 1), (-1, 1))],
    *[(w8a8_error, (dtype,), 1e-6) for dtype in DTYPES],
    *[(attention_error, (k, "float16", None), 2e-3) for k in (None, "int8", "int4", "e4m3")],
    (attention_error, ("int8", "bfloat16", 40), 6e-3),
    *[(store_error, (kind,), 1e-6) for kind in ("int8", "int4", "e4m3")],
    *[(served_error, (kind,), 2e-3) for kind in (None, "int8", "int4", "e4m3")],
    (experts_error, ("int4", 64, True), 1e-3),
    (experts_error, ("e2m1", 16, True), 1e-3),
    (experts_error, ("int8", -1, False), 1e-3),
    *[(eight_bit_error, (s,), 1e-6) for s in ("W8A8", "FP8_DYNAMIC", "W4A8", "W4AFP8")],
    (layer_error, (32, True), 2e-3),
    (layer_error, (-1, False), 2e-3),
]  # fmt: skip
NAMES = [f"{case[0].__name__.removesuffix('_error')}-{case[1]}" for case in CASES]
PROGRAM = """
import json
import test_kernels_ops as here
print(json.dumps([check("cpu", *arguments) for check, arguments, _ in here.CASES]))
"""


@pytest.fixture(scope="module")
def interpreted():
    if triton.__version__ < "3.7":
        pytest.skip("the interpreter of Triton 3.6 breaks with numpy 2.4")
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    top = Path(__file__).parents[1]
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent), str(top), str(top / "eval")])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **threads, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("index", range(len(CASES)), ids=NAMES)
def test_the_interpreted_kernel_agrees_with_the_reference(interpreted, index):
    assert interpreted[index] < CASES[index][2]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("check", "arguments", "limit"), CASES, ids=NAMES)
def test_the_compiled_kernel_agrees_with_the_reference(check, arguments, limit):
    assert check("cuda", *arguments) < 10 * limit


def test_choices_are_sorted_by_expert_in_whole_tiles():
    from compressor_kernels.moe_gemm import sort_tokens

    tokens = sort_tokens(torch.tensor([[2, 0], [2, 0], [2, 1]]), 4, block_m=2)
    assert tokens.places.view(-1, 2).tolist()[:4] == [[1, 3], [5, 6], [0, 2], [4, 6]]
    assert tokens.experts.tolist() == [0, 1, 2, 2, -1]


def test_the_number_of_tiles_does_not_depend_on_the_choices():
    from compressor_kernels.moe_gemm import sort_tokens

    one = sort_tokens(torch.zeros(5, 2).long(), 4, block_m=8)
    spread = sort_tokens(torch.arange(10).view(5, 2) % 4, 4, block_m=8)
    assert one.experts.shape == spread.experts.shape
    assert one.experts.tolist()[0] == 0


def test_operands_that_do_not_fit_are_refused():
    from compressor_kernels.kv_pool import KVPool
    from compressor_kernels.norm import rms_norm
    from compressor_kernels.w4a8 import to_bytes
    from compressor_kernels.w8a8 import w8a8

    with pytest.raises(ValueError, match="group_size must be"):
        to_bytes(torch.zeros(2, 64).byte(), torch.ones(2, 4), None, group_size=16, dtype=torch.int8)
    with pytest.raises(ValueError, match="x must be"):
        w8a8(torch.zeros(2, 5), torch.zeros(3, 4).to(torch.int8), torch.ones(3))
    with pytest.raises(ValueError, match="multiples of 64"):
        KVPool.empty((4, 1, 80), "int4", dtype=torch.float16, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="sums need groups"):
        rms_norm(
            torch.zeros(2, 64).half(),
            torch.ones(64),
            eps=0.1,
            sums_for=GemmSpec("int4", -1, (8, 64)),
        )
