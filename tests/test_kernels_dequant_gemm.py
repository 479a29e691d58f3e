"""The Triton kernel against a float64 oracle, in Triton's interpreter (a process of its own)."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton

import compressor_kernels
from compressor_kernels.layout import MOST_E8M0, planar_float, to_planar
from compressor_kernels.reference import dequant_gemm as reference_gemm
from compressor_kernels.reference import dequantize, dequantize_stored, num_groups, pack_nibbles
from compressor_kernels.tuning import GemmSpec, choose_config, heuristic, m_bucket, table_key
from compressor_kernels.words import LAYOUTS

ROOT = Path(compressor_kernels.__file__).parents[1]
SHAPES = [(1, 128, 128), (5, 72, 300), (17, 40, 172), (3, 130, 272)]
# rounding of float32 sums; times the offset over the code range where it is subtracted at the end;
# of scaled weights to 16 bits (none in the interpreter, whose numbers are float32)
TOLERANCE = {"group": 5e-7, "raw": 1e-4, "element": 5e-7}

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def integer_cases():
    """Each integer kind with every group size; zero points, form, split and dtype in turn."""
    cases = []
    for number, bits in enumerate((4, 2, 3, 8)):
        for index, group in enumerate((16, 32, 64, 128, -1)):
            turn = number + index
            cases += [
                {
                    "shape": SHAPES[(turn + asym) % 4],
                    "kind": f"int{bits}",
                    "group": group,
                    "symmetric": not asym,
                    "form": ("group", "raw", "element")[(turn + asym) % 3],
                    "split": (1, 2, 4)[(index + asym) % 3],
                    "dtype": ("bfloat16", "float16")[(number + asym) % 2],
                }
                for asym in ((0, 1) if bits == 4 else (turn % 2,))
            ]
    return cases


def float_cases():
    """e4m3 by rows and blocks, NVFP4, MXFP4, in both forms and dtypes."""
    formats = [("e4m3", -1), ("e4m3", 128), ("e2m1", 16), ("e2m1", 32)]
    return [
        {
            "shape": SHAPES[(index + bit) % 4],
            "kind": kind,
            "group": group,
            "symmetric": True,
            "form": form,
            "split": 1 + bit,
            "dtype": dtype,
        }
        for index, (kind, group) in enumerate(formats)
        for bit, form in enumerate(("group", "element"))
        for dtype in ("bfloat16", "float16")
    ]


def many_groups():
    """More groups than are corrected at once, in the first split and in all; with zero points."""
    known = {"shape": (3, 40, 1100), "kind": "int4", "group": 32, "symmetric": False}
    return [{**known, "form": "raw", "split": n, "dtype": "bfloat16"} for n in (1, 2)]


CASES = integer_cases() + float_cases() + many_groups()

PROGRAM = """
import json, sys
import test_kernels_dequant_gemm as here
print(json.dumps(here.everything("cpu", json.loads(sys.argv[1]))))
"""


def random_planar(shape, *, kind, group, symmetric, dtype):
    """A planar weight and its exact dense matrix in float64."""
    bits, (out_features, columns) = LAYOUTS[kind].bits, shape
    size = (out_features, num_groups(columns, group))
    codes = torch.randint(0, 1 << bits, shape).to(torch.uint8)
    scale = (torch.rand(size) * 0.02 + 0.01).to(dtype)
    if kind.startswith("int"):
        zero = None if symmetric else torch.randint(0, 1 << bits, size).to(torch.uint8)
        offset = float(1 << (bits - 1)) if zero is None else zero
        return to_planar(codes, scale, zero, group, kind), dequantize(
            codes, scale.double(), offset, group
        )
    codes = torch.where((codes & 127) == 127, codes - 1, codes)
    if kind == "e4m3":
        stored, tensors = "float-quantized", {"weight": codes.view(torch.float8_e4m3fn)}
    elif group == 16:
        stored, scale = "nvfp4-pack-quantized", (scale * 4000).to(torch.float8_e4m3fn)
        tensors = {"weight_packed": pack_nibbles(codes), "weight_global_scale": torch.ones(1) * 512}
    else:
        stored, scale = "mxfp4-pack-quantized", torch.randint(115, 131, size).to(torch.uint8)
        tensors = {"weight_packed": pack_nibbles(codes)}
    tensors["weight_scale"] = scale
    weight = planar_float(tensors, stored=stored, group_size=group)
    return weight, dequantize_stored(tensors, stored=stored, group_size=group).double()


def relative_error(device, *, shape, kind, group, symmetric, form, split, dtype):
    """Error of one kernel run against float64 with exactly the same codes and scales."""
    from compressor_kernels.dequant_gemm import Fusion, dequant_gemm
    from compressor_kernels.tuning import KernelConfig

    rows, out_features, columns = shape
    columns += columns % 2  # two 4-bit codes a byte
    torch.manual_seed(rows * columns + group)
    number = getattr(torch, dtype)
    weight, dense = random_planar(
        (out_features, columns), kind=kind, group=group, symmetric=symmetric, dtype=number
    )
    x = torch.randn(rows, columns).to(number)
    bias = torch.randn(out_features) if split > 1 or group == 32 else None
    exact = reference_gemm(x.double(), dense, bias)
    y = dequant_gemm(
        x.to(device),
        moved(weight, device),
        fusion=Fusion(bias=_to(bias, device)),
        config=KernelConfig(16, split, 4, 2, form),
        out_dtype=torch.float32,
    )
    return float((y.cpu().double() - exact).norm() / exact.norm())


def moved(weight, device):
    tensors = {n: _to(getattr(weight, n), device) for n in ("words", "scales", "zeros", "factor")}
    return replace(weight, **tensors)


def everything(device, cases):
    """Errors of all cases, and of the things that are not a matter of format."""
    others = {
        "epilogue": epilogue_error(device),
        "dense": dense_error(device),
        "sums": given_sums_error(device),
        "far": max(far_scales_error(device, power) for power in (70, MOST_E8M0)),
    }
    return {"cases": [relative_error(device, **case) for case in cases], **others}


def epilogue_error(device):
    """silu(gate) * up + residual with a bias, in one step and over splits."""
    from compressor_kernels.dequant_gemm import Fusion, dequant_gemm
    from compressor_kernels.tuning import KernelConfig

    torch.manual_seed(0)
    weight, dense = random_planar(
        (256, 256), kind="int4", group=64, symmetric=True, dtype=torch.bfloat16
    )
    x, bias, residual = torch.randn(5, 256).bfloat16(), torch.randn(256), torch.randn(5, 128)
    both = (x.double() @ dense.t() + bias).view(5, 2, 2, 64)
    exact = (torch.nn.functional.silu(both[:, :, 0]) * both[:, :, 1]).flatten(1) + residual
    fusion = Fusion(bias.to(device), residual.to(device), gated=True)
    errors = []
    for split in (1, 2):
        config = KernelConfig(16, split, 4, 2)
        y = dequant_gemm(
            x.to(device),
            moved(weight, device),
            fusion=fusion,
            config=config,
            out_dtype=torch.float32,
        )
        errors.append(float((y.cpu() - exact).norm() / exact.norm()))
    return max(errors)


def dense_error(device):
    """The dense weight, for an asymmetric and two float formats."""
    from compressor_kernels.dequantize import dequantize_planar

    errors = []
    for kind, group in (("int3", 32), ("int8", 128), ("e4m3", -1), ("e2m1", 16), ("e2m1", 32)):
        weight, dense = random_planar(
            (130, 300), kind=kind, group=group, symmetric=kind == "int8", dtype=torch.bfloat16
        )
        made = dequantize_planar(moved(weight, device), torch.float32).cpu().double()
        errors.append(float((made - dense).norm() / dense.norm()))
    return max(errors)


def far_scales_error(device, power):
    """MXFP4 whose scales are all 2^(power - 127), each weight scaled in 16 bits."""
    from compressor_kernels.dequant_gemm import dequant_gemm
    from compressor_kernels.tuning import KernelConfig

    codes, x = torch.randint(0, 16, (128, 128)).to(torch.uint8), torch.randn(3, 128).bfloat16()
    tensors = {"weight_packed": pack_nibbles(codes)}
    tensors["weight_scale"] = torch.full((128, 4), power, dtype=torch.uint8)
    stored = {"stored": "mxfp4-pack-quantized", "group_size": 32}
    weight = moved(planar_float(tensors, **stored), device)
    y = dequant_gemm(
        x.to(device), weight, config=KernelConfig(16, 1, 4, 2, "element"), out_dtype=torch.float32
    )
    exact = x.double() @ dequantize_stored(tensors, **stored).double().t()
    return float((y.cpu().double() - exact).norm() / exact.norm())


def given_sums_error(device):
    """Sums from elsewhere are used: an int2 product in raw form, with zero points."""
    from compressor_kernels.dequant_gemm import Fusion, dequant_gemm
    from compressor_kernels.sums import group_sums
    from compressor_kernels.tuning import KernelConfig

    torch.manual_seed(0)
    weight, dense = random_planar(
        (130, 512), kind="int2", group=64, symmetric=False, dtype=torch.bfloat16
    )
    x = torch.randn(5, 512).bfloat16()
    exact = x.double() @ dense.t()
    sums = group_sums(x.to(device), "int2", group_size=64, whole=0)
    y = dequant_gemm(
        x.to(device),
        moved(weight, device),
        fusion=Fusion(sums=sums),
        config=KernelConfig(16, 1, 4, 2),
        out_dtype=torch.float32,
    )
    wrong = dequant_gemm(
        x.to(device),
        moved(weight, device),
        fusion=Fusion(sums=sums * 0),
        config=KernelConfig(16, 1, 4, 2),
        out_dtype=torch.float32,
    )
    assert not torch.equal(y, wrong)
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
    assert interpreted_errors["cases"][index] < TOLERANCE[CASES[index]["form"]]


@pytest.mark.parametrize("what", ["epilogue", "dense"])
def test_epilogues_and_the_dense_weight_agree_with_the_oracle(interpreted_errors, what):
    assert interpreted_errors[what] < 1e-6


def test_sums_that_a_kernel_before_made_are_used(interpreted_errors):
    assert interpreted_errors["sums"] < TOLERANCE["raw"]


def test_powers_of_two_far_from_one_lose_nothing(interpreted_errors):
    assert interpreted_errors["far"] < TOLERANCE["element"]


def test_scales_beyond_the_range_of_the_kernels_are_refused():
    codes = pack_nibbles(torch.zeros(128, 128, dtype=torch.uint8))
    tensors = {"weight_packed": codes, "weight_scale": torch.full((128, 4), 193).to(torch.uint8)}
    with pytest.raises(ValueError, match="above 2\\^65"):
        planar_float(tensors, stored="mxfp4-pack-quantized", group_size=32)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(list(case.values())))
def test_the_compiled_kernel_agrees_with_the_oracle(case):
    assert relative_error("cuda", **case) < (5e-3 if case["form"] == "element" else 1e-4)


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


def spec(kind="int4", group_size=128, shape=(4096, 4096)):
    return GemmSpec(kind, group_size, shape)


def test_the_rule_fills_the_processors_and_never_leaves_a_split_without_work():
    small = heuristic("sm_90", spec(shape=(8192, 4096)), 1)
    assert small.block_m == 8
    assert small.split_k * 64 * small.num_warps >= 8 * 132
    assert heuristic("sm_90", spec(shape=(256, 128)), 1).split_k == 1
    assert heuristic("gfx942", spec(), 1).block_m == 16


def test_few_rows_take_two_warps_where_four_would_issue_more():
    def warps(arch, rows, kind="int4", group=128):
        return heuristic(arch, spec(kind, group), rows).num_warps

    assert [warps("sm_90", rows) for rows in (1, 16, 17)] == [2, 2, 4]
    assert [warps("sm_90", rows, "int3") for rows in (8, 9)] == [2, 4]  # more would spill
    assert [warps("sm_90", rows, "e2m1", 32) for rows in (32, 33)] == [2, 4]
    assert [warps("sm_100", rows) for rows in (32, 33)] == [2, 4]
    assert [warps("sm_100", 1, kind, -1) for kind in ("int4", "int8")] == [2, 4]
    assert warps("sm_80", 1) == 4


def test_the_rule_scales_once_a_group_where_registers_allow_it():
    assert heuristic("sm_90", spec(), 64).form == "group"
    assert heuristic("sm_90", spec(group_size=64), 64).form == "element"
    assert heuristic("sm_90", spec("e2m1", 16), 1).form == "element"
    assert heuristic("sm_90", spec(), 4096).form == "dense"
    assert heuristic("gfx942", spec(), 1).form == "raw"


def test_the_rule_pays_for_sums_of_x_only_where_centring_every_weight_would_not_fit():
    def forms(arch, kind="int4", group=128):
        return [heuristic(arch, spec(kind, group), rows).form for rows in (8, 16, 32, 64)]

    assert forms("sm_100") == ["group", "raw", "raw", "element"]
    assert forms("sm_100", "int8", 128)[:2] == ["group", "group"]
    assert forms("sm_100", "int2", 128)[0] == "raw"
    assert forms("sm_90", "int2") == ["group", "group", "raw", "element"]
    assert forms("sm_90") == ["group"] * 4


def test_the_table_has_a_bucket_for_every_number_of_rows():
    assert [m_bucket(rows) for rows in (1, 3, 16, 17, 5000)] == [1, 4, 16, 32, 1024]
    assert table_key("sm_90", spec("int3", 64), 0) == "sm_90/dequant_gemm/int3/64/4096x4096/1"
    assert choose_config("sm_90", spec(), 9).block_m == 16
