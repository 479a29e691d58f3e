"""Whatever the plan chooses, the answer is that of the reference."""

import pytest
import torch

from compressor_kernels import cpu, dispatch, native
from compressor_kernels.dispatch import LinearSpec, plan_for, plan_linear
from compressor_kernels.reference import (
    dequantize_checkpoint,
    num_groups,
    pack_codes,
    pack_zero_point,
)

SHAPES = [(361, 172), (64, 352), (128, 256)]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def checkpoint(spec):
    out_features, columns = spec.shape
    groups = num_groups(columns, spec.group_size)
    codes = torch.randint(0, 1 << spec.bits, spec.shape, dtype=torch.uint8)
    tensors = {
        "weight_packed": pack_codes(codes, spec.bits),
        "weight_scale": (torch.rand(out_features, groups) * 0.02 + 0.01).bfloat16(),
        "weight_shape": torch.tensor(spec.shape),
    }
    if not spec.symmetric:
        zero = torch.randint(0, 1 << spec.bits, (out_features, groups), dtype=torch.uint8)
        tensors["weight_zero_point"] = pack_zero_point(zero, spec.bits)
    return tensors


def relative_error(spec, x_dtype, rows):
    plan, tensors = plan_for("cpu", spec), checkpoint(spec)
    x = torch.randn(rows, spec.shape[1]).to(x_dtype)
    dense = dequantize_checkpoint(tensors, spec.bits, spec.group_size).double()
    y = plan.apply(x, plan.prepare(tensors))
    assert y.dtype == x_dtype
    exact = x.double() @ dense.t()
    return float((y.double() - exact).norm() / exact.norm())


@pytest.fixture
def torch_only(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)


@pytest.mark.usefixtures("torch_only")
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_cpu_way_without_a_compiler_agrees_with_the_reference(
    bits, group_size, symmetric, dtype
):
    for shape in SHAPES:
        spec = LinearSpec(bits, group_size, symmetric, shape, dtype)
        for rows in (1, 40):
            assert relative_error(spec, dtype, rows) < ROUNDING[dtype], (shape, rows)


@pytest.mark.usefixtures("torch_only")
def test_a_plan_made_for_bf16_still_computes_float32_activations_exactly():
    for bits, group in ((4, 64), (8, -1)):
        spec = LinearSpec(bits, group, True, (128, 256), torch.bfloat16)
        assert relative_error(spec, torch.float32, 3) < 2e-6


@pytest.mark.usefixtures("torch_only")
def test_the_plan_says_what_it_chose_and_why():
    plan = plan_linear("cpu", 4, group_size=128, symmetric=True, shape=(256, 256))
    assert plan.name in ("cpu-bytes", "planes")
    assert "float32" in plan.reason


def test_every_way_can_be_chosen_by_name_and_every_choice_exists():
    for bits in range(2, 9):
        for dtype in (None, torch.bfloat16):
            assert plan_for("cpu", LinearSpec(bits, -1, True, (64, 64), dtype)).name in (
                dispatch.WAYS
            )
    gpu = plan_linear("cuda", 4, group_size=128, symmetric=True, shape=(256, 256))
    assert gpu.name == "triton"
    assert plan_linear("cuda", 5, group_size=128, symmetric=True, shape=(8, 8)).name == "planes"


def test_eight_bit_inputs_and_weights_meet_in_eight_bit_products(monkeypatch):
    def way(activations, stored, block=0):
        spec = LinearSpec(
            8, -1, True, (64, 64), torch.bfloat16, stored, block, activations=activations
        )
        return plan_for("cuda", spec).name

    monkeypatch.setattr(dispatch.gpu, "multiplies_e4m3", lambda _: True)
    assert way("int8", "int-quantized") == way("fp8", "float-quantized") == "w8a8"
    assert way("none", "float-quantized") == way("fp8_group", "float-quantized", 128) == "triton"
    monkeypatch.setattr(dispatch.gpu, "multiplies_e4m3", lambda _: False)
    assert (way("int8", "int-quantized"), way("fp8", "float-quantized")) == ("w8a8", "triton")


def test_int4_weights_meet_inputs_of_eight_bits(monkeypatch):
    def way(activations, group=128, bits=4):
        spec = LinearSpec(bits, group, True, (64, 256), torch.bfloat16, activations=activations)
        return plan_for("cuda", spec).name

    monkeypatch.setattr(dispatch.gpu, "multiplies_e4m3", lambda _: True)
    assert way("int8") == way("fp8") == way("fp8", -1) == "w4a8"
    assert way("none") == way("int8", 16) == way("int8", bits=3) == "triton"
    monkeypatch.setattr(dispatch.gpu, "multiplies_e4m3", lambda _: False)
    assert (way("int8"), way("fp8")) == ("w4a8", "triton")
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert way("int8") == "triton"  # and the layer rounds its inputs in torch


def test_the_resident_bytes_are_the_packed_bytes_and_the_scales():
    spec = LinearSpec(3, 128, True, (64, 256))
    plan, tensors = plan_for("cpu", spec), checkpoint(spec)
    packed = tensors["weight_packed"].nbytes + tensors["weight_scale"].nbytes
    assert plan.resident_bytes(plan.prepare(tensors)) == packed


def test_leading_dimensions_and_the_bias_are_kept():
    spec = LinearSpec(4, 32, False, (24, 64))
    plan, tensors = plan_for("cpu", spec), checkpoint(spec)
    x, bias = torch.randn(2, 3, 64), torch.randn(24)
    dense = dequantize_checkpoint(tensors, 4, 32)
    y = plan.apply(x, plan.prepare(tensors), bias)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, dense, bias))


def test_no_rows_give_no_rows():
    spec = LinearSpec(4, 32, True, (24, 64))
    plan = plan_for("cpu", spec)
    assert plan.apply(torch.randn(0, 64), plan.prepare(checkpoint(spec))).shape == (0, 24)


def test_tensors_of_another_layer_are_refused():
    plan = plan_linear("cpu", 4, group_size=32, symmetric=True, shape=(24, 64))
    with pytest.raises(ValueError, match="weight_shape is"):
        plan.prepare(checkpoint(LinearSpec(4, 32, True, (24, 96))))
    with pytest.raises(ValueError, match="weight_zero_point is present"):
        plan.prepare(checkpoint(LinearSpec(4, 32, False, (24, 64))))


@pytest.mark.parametrize("change", [{"bits": 9}, {"group_size": 0}, {"shape": (0, 8)}])
def test_a_format_that_does_not_exist_is_refused(change):
    fields = {"bits": 4, "group_size": 32, "symmetric": True, "shape": (8, 8)} | change
    with pytest.raises(ValueError, match="must be"):
        LinearSpec(**fields)


@pytest.mark.skipif(not cpu.has_packed_ops(), reason="torch has no packed products here")
def test_the_order_of_torch_s_int4_words_is_known():
    assert cpu.int4_order_is_known()
