"""The Triton kernel against a float64 oracle, in Triton's interpreter (a process of its own)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

import compressor_kernels
from compressor_kernels.layout import to_planar
from compressor_kernels.reference import dequant_gemm as reference_gemm
from compressor_kernels.reference import dequantize, num_groups
from compressor_kernels.tuning import choose_config, heuristic, m_bucket, table_key

ROOT = Path(compressor_kernels.__file__).parents[1]
SHAPES = [(1, 128, 128), (5, 200, 300), (17, 72, 172), (3, 130, 512)]
# rounding of float32 sums times the magic offset over the code range, with K <= 512 terms
TOLERANCE = {"bfloat16": 5e-6, "float16": 1e-4}

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CASES = [
    {
        "shape": SHAPES[(index + split) % len(SHAPES)],
        "group": group,
        "symmetric": symmetric,
        "split": split,
        "dtype": ("bfloat16", "float16")[(index + symmetric) % 2],
    }
    for index, group in enumerate((32, 64, 128, -1))
    for symmetric in (True, False)
    for split in (1, 4)
]

PROGRAM = """
import json, sys
import test_kernels_dequant_gemm as here
print(json.dumps([here.relative_error("cpu", **case) for case in json.loads(sys.argv[1])]))
"""


def relative_error(device, *, shape, group, symmetric, split, dtype):
    """Error of one kernel run against float64 with exactly the same codes and scales."""
    from compressor_kernels.dequant_gemm import dequant_gemm
    from compressor_kernels.tuning import KernelConfig

    rows, out_features, columns = shape
    torch.manual_seed(rows * columns + group)
    kind = getattr(torch, dtype)
    groups = num_groups(columns, group)
    codes = torch.randint(0, 16, (out_features, columns)).to(torch.uint8)
    scale = (torch.rand(out_features, groups) * 0.02 + 0.01).to(kind)
    zero = None if symmetric else torch.randint(0, 16, (out_features, groups)).to(torch.uint8)
    x = torch.randn(rows, columns).to(kind)
    bias = torch.randn(out_features) if split > 1 or group == 32 else None
    dense = dequantize(codes, scale.double(), 8.0 if zero is None else zero, group)
    exact = reference_gemm(x.double(), dense, bias)
    weight = to_planar(codes.to(device), scale.to(device), _to(zero, device), group)
    y = dequant_gemm(
        x.to(device),
        weight,
        bias=_to(bias, device),
        config=KernelConfig(16, split, 4, 2),
        out_dtype=torch.float32,
    )
    return float((y.cpu().double() - exact).norm() / exact.norm())


def _to(tensor, device):
    return None if tensor is None else tensor.to(device)


@pytest.fixture(scope="module")
def interpreted_errors():
    if triton.__version__ < "3.7":
        pytest.skip("the interpreter of Triton 3.6 breaks with numpy 2.4")
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": paths,
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(CASES)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: str(list(CASES[i].values())))
def test_the_interpreted_kernel_agrees_with_the_oracle(interpreted_errors, index):
    assert interpreted_errors[index] < TOLERANCE[CASES[index]["dtype"]]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(list(case.values())))
def test_the_compiled_kernel_agrees_with_the_oracle(case):
    assert relative_error("cuda", **case) < 1e-4


@pytest.mark.gpu
@needs_gpu
def test_split_k_gives_the_same_bits_every_time():
    from compressor_kernels.dequant_gemm import dequant_gemm
    from compressor_kernels.tuning import KernelConfig

    codes = torch.randint(0, 16, (256, 2048)).to(torch.uint8).cuda()
    weight = to_planar(codes, torch.rand(256, 16).bfloat16().cuda(), None, 128)
    x = torch.randn(7, 2048).bfloat16().cuda()
    results = [dequant_gemm(x, weight, config=KernelConfig(8, 8, 4, 4)) for _ in range(10)]
    assert all(torch.equal(y, results[0]) for y in results)


def test_operands_that_do_not_fit_are_refused():
    from compressor_kernels.dequant_gemm import dequant_gemm
    from compressor_kernels.tuning import KernelConfig

    weight = to_planar(torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 1), None, 64)
    with pytest.raises(ValueError, match="x must be"):
        dequant_gemm(torch.zeros(2, 63, dtype=torch.bfloat16), weight)
    with pytest.raises(TypeError, match="bfloat16 or float16"):
        dequant_gemm(torch.zeros(2, 64), weight)
    with pytest.raises(ValueError, match="block_m must be a power of two"):
        KernelConfig(12, 1, 4, 4)


def test_the_rule_fills_the_processors_and_never_leaves_a_split_without_work():
    small = heuristic("sm_90", (4096, 4096), 1)
    assert small.block_m == 8
    assert small.split_k * 32 >= 2 * 132
    assert heuristic("sm_90", (256, 128), 1).split_k == 1
    assert heuristic("gfx942", (4096, 4096), 1).block_m == 16


def test_the_table_has_a_bucket_for_every_number_of_rows():
    assert [m_bucket(rows) for rows in (1, 3, 16, 17, 5000)] == [1, 4, 16, 32, 1024]
    assert table_key("sm_90", 128, (4096, 512), 0).endswith("4096x512/1")
    assert choose_config("sm_90", (4096, 4096), 9).block_m == 16
