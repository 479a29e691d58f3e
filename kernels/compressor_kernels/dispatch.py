"""Which code computes a packed linear on this device, decided once per layer and said aloud.

    plan = plan_linear("cpu", bits=4, group_size=128, symmetric=True, shape=(4096, 4096))
    plan.name, plan.reason            # "native", "AVX2, 0a1b...so: exact float32"
    resident = plan.prepare(tensors)  # checkpoint tensors -> the tensors to keep
    product = plan.bind(resident)     # x [..., I] -> y [..., O] in x.dtype
    y = plan.apply(x, resident)       # the same for a single x

`tensors` holds the compressed-tensors names `weight_packed`, `weight_scale`, `weight_shape` and,
for asymmetric weights, `weight_zero_point`. `resident` is a flat dict of tensors, fit for buffers
of a module; nothing else is kept. To add a way: one entry in `WAYS` and one rule in `choose`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor_kernels import cpu, gpu, native
from compressor_kernels.layout import PlanarWeight
from compressor_kernels.planes import to_planes
from compressor_kernels.reference import dequant_gemm as reference_gemm
from compressor_kernels.reference import (
    dequantize_checkpoint,
    dequantize_stored,
    num_groups,
    pack_codes,
    read_checkpoint,
    unpack_zero_point,
)

if TYPE_CHECKING:
    from compressor_kernels.w4a8 import ByteWeight

Tensors = dict[str, Tensor]
Product = Callable[[Tensor], Tensor]
_INTEGERS = ("pack-quantized", "int-quantized")
_EXACT = {"native-int8": "native", "w8a8": "w8a8-exact", "w4a8": "w4a8-exact"}
# How inputs are rounded and weights stored where both have eight bits and a scale a row.
_BYTES = (("int8", "int-quantized", 0), ("fp8", "float-quantized", 0))
_NIBBLE_GROUPS = (32, 64, 128, -1)  # of int4 weights for eight-bit inputs
_INPUTS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """Format of one linear: w [O, I] at `bits`, one scale per `group_size` columns (-1: per row).

    `dtype` is the dtype of the activations the layer will mostly see; apply() takes any. None means
    float32 on the CPU and a 16-bit type elsewhere. `stored` is the checkpoint's way of storing, by
    compressed-tensors' name, `block` the edge of square blocks with one scale (0: none). With
    `rounds` the C kernels may round activations to eight bits (one scale for 32 columns).
    `activations`: how the format rounds inputs; a plan that `rounds_inputs` does it itself.
    """

    bits: int
    group_size: int
    symmetric: bool
    shape: tuple[int, int]
    dtype: torch.dtype | None = None
    stored: str = "pack-quantized"
    block: int = 0
    rounds: bool = False
    activations: str = "none"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, got {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size must be positive or -1, got {self.group_size}")
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ValueError(f"shape must be (out, in), both positive, got {self.shape}")


@dataclass(frozen=True, slots=True)
class Way:
    """One implementation: tensors of the checkpoint -> those to keep -> the product of x [M, I]."""

    prepare: Callable[[LinearSpec, Tensors], Tensors]
    bind: Callable[[LinearSpec, Tensors], Product]


@dataclass(frozen=True, slots=True)
class LinearPlan:
    """The way one linear is computed: `name` of the way, `reason` it was chosen."""

    name: str
    reason: str
    spec: LinearSpec
    device: torch.device

    def prepare(self, tensors: Tensors) -> Tensors:
        """Tensors to keep on the device, from the tensors of the checkpoint.

        Raises ValueError when their shapes, or the presence of zero points, differ from the spec.
        """
        if self.spec.stored == "int-quantized" and not self.rounds_inputs:
            tensors = _as_packed(tensors)
        if self.spec.stored in _INTEGERS and not self.rounds_inputs:
            check_tensors(self.spec, tensors)
        made = WAYS[self.name].prepare(self.spec, tensors)
        return {name: tensor.to(self.device) for name, tensor in made.items()}

    def bind(self, resident: Tensors, bias: Tensor | None = None) -> Product:
        """The product y = x @ w^T (+ bias): x [..., I] floating -> [..., O] in x.dtype.

        What does not depend on x is prepared here. The tensors stay alive with the product.
        """
        out_features, in_features = self.spec.shape
        product = WAYS[self.name].bind(self.spec, resident)

        def apply(x: Tensor) -> Tensor:
            if x.shape[-1] != in_features:
                raise ValueError(f"x has {x.shape[-1]} features, the weight {in_features}")
            if x.dim() == 2:
                y = product(x)
            else:
                y = product(x.reshape(-1, in_features)).view(*x.shape[:-1], out_features)
            return y if bias is None else y + bias.to(y.dtype)

        return apply

    def apply(self, x: Tensor, resident: Tensors, bias: Tensor | None = None) -> Tensor:
        """`bind` for a single x."""
        return self.bind(resident, bias)(x)

    @property
    def rounds_inputs(self) -> bool:
        """Whether `apply` rounds its inputs as the format says."""
        return self.name in ("w8a8", "w4a8")

    @property
    def exact(self) -> LinearPlan:
        """The plan that computes from the same resident tensors and rounds no inputs."""
        return replace(self, name=_EXACT.get(self.name, self.name))

    def resident_bytes(self, resident: Tensors) -> int:
        """Bytes the resident tensors hold."""
        return sum(tensor.nbytes for tensor in resident.values())


def check_tensors(spec: LinearSpec, tensors: Tensors) -> None:
    """Refuse checkpoint tensors that do not belong to `spec`."""
    shape = tuple(tensors["weight_shape"].tolist())
    if shape != spec.shape:
        raise ValueError(f"weight_shape is {shape}, the plan was made for {spec.shape}")
    if ("weight_zero_point" in tensors) == spec.symmetric:
        raise ValueError(
            f"the plan is {'symmetric' if spec.symmetric else 'asymmetric'}, but weight_zero_point "
            f"is {'present' if spec.symmetric else 'missing'}"
        )


def plan_linear(
    device: torch.device | str,
    bits: int,
    *,
    group_size: int,
    symmetric: bool,
    shape: tuple[int, int],
) -> LinearPlan:
    """Plan for the usual activations of the device; `plan_for` takes a spec that names their dtype.

    On a CPU, float32 activations are computed exactly at every number of rows. Naming bf16 lets
    torch's packed products serve small batches, which is several times faster and rounds as a bf16
    model does.
    """
    return plan_for(device, LinearSpec(bits, group_size, symmetric, shape))


def plan_for(device: torch.device | str, spec: LinearSpec) -> LinearPlan:
    """Choose the way for one linear on one device."""
    where = torch.device(device)
    name, reason = choose(where, spec)
    return LinearPlan(name, reason, spec, where)


def choose(device: torch.device, spec: LinearSpec) -> tuple[str, str]:
    """(name in `WAYS`, why)."""
    if device.type == "cuda" and _multiplies_bytes(device, spec):
        return "w8a8", f"inputs and weights of eight bits ({spec.activations}) on a GPU"
    if device.type == "cuda" and _multiplies_nibbles(device, spec):
        return "w4a8", f"int4 weights and inputs of eight bits ({spec.activations}) on a GPU"
    if device.type == "cuda" and _has_gpu_kernel(spec):
        return "triton", f"{gpu.kind_of(spec.stored, spec.bits)} on a GPU: the dequant_gemm kernel"
    if spec.stored not in _INTEGERS:
        return "dense", f"no kernel for {spec.stored}: dequantized once, a dense product"
    if device.type != "cpu":
        return "planes", f"{spec.bits} bits on {device.type}: no kernel, dequantized at each call"
    # where inputs are rounded, sums in another order than torch's would move some of them to the
    # next level: those layers keep torch's product and give other engines' logits
    packed = spec.stored == "pack-quantized" and spec.activations == "none"
    if packed and native.takes(spec.bits, spec.group_size) and native.library() is not None:
        if spec.rounds:
            return "native-int8", f"{native.reason()}: activations rounded to eight bits"
        return "native", f"{native.reason()}: exact float32"
    capability = torch.backends.cpu.get_cpu_capability()
    if spec.dtype != torch.bfloat16:
        fills_bytes = spec.shape[1] * spec.bits % 8 == 0
        name = "cpu-bytes" if fills_bytes and cpu.unpacks_bytes(spec.bits) else "planes"
        return name, "activations are not bf16: exact float32 dequantization at each call"
    if spec.symmetric and cpu.has_packed_ops():
        if spec.bits == 8 and cpu.int8_op_takes(spec.group_size, spec.shape):
            return "cpu-int8", f"{capability}: torch's int8 product up to {cpu.SMALL_ROWS} rows"
        known = spec.bits == 4 and cpu.int4_op_takes(spec.group_size, spec.shape)
        if known and cpu.int4_order_is_known():
            return "cpu-int4", f"{capability}: torch's int4 product up to {cpu.SMALL_ROWS} rows"
    return "planes", f"no packed product for this format on {capability}: dequantized at each call"


def _has_gpu_kernel(spec: LinearSpec) -> bool:
    known = gpu.takes(spec.stored, spec.bits, group_size=spec.group_size, block=spec.block)
    return known and spec.dtype != torch.float32


def _multiplies_bytes(device: torch.device, spec: LinearSpec) -> bool:
    """e4m3 needs tensor cores that have it; gfx942 has another e4m3."""
    is_known = (spec.activations, spec.stored, spec.block) in _BYTES
    return is_known and (spec.activations == "int8" or gpu.multiplies_e4m3(device))


def _multiplies_nibbles(device: torch.device, spec: LinearSpec) -> bool:
    """int4 weights whose inputs are rounded, on a GPU that the kernel's PTX is for."""
    is_known = (spec.stored, spec.bits) == ("pack-quantized", 4) and spec.activations in _INPUTS
    fits = is_known and spec.group_size in _NIBBLE_GROUPS and torch.version.hip is None
    return fits and (spec.activations == "int8" or gpu.multiplies_e4m3(device))


# ------------------------------------------------------------------ the ways


def _unbound(apply: Callable[[LinearSpec, Tensor, Tensors], Tensor]) -> Callable[..., Product]:
    """A way that prepares nothing for its products."""
    return lambda spec, resident: lambda x: apply(spec, x, resident)


def _prepare_planes(spec: LinearSpec, tensors: Tensors) -> Tensors:
    codes, scale, zeros = read_checkpoint(tensors, spec.bits, spec.group_size)
    resident = to_planes(codes, spec.bits) | {"scale": scale.contiguous()}
    return resident if zeros is None else resident | {"zeros": zeros}


def _apply_planes(spec: LinearSpec, x: Tensor, resident: Tensors) -> Tensor:
    return cpu.planes_linear(
        x, resident, bits=spec.bits, group_size=spec.group_size, shape=spec.shape
    )


def _prepare_bytes(spec: LinearSpec, tensors: Tensors) -> Tensors:
    codes, scale, zeros = read_checkpoint(tensors, spec.bits, spec.group_size)
    resident = {"rows": cpu.pack_byte_rows(codes, spec.bits), "scale": scale.contiguous()}
    return resident if zeros is None else resident | {"zeros": zeros}


def _prepare_triton(spec: LinearSpec, tensors: Tensors) -> Tensors:
    return gpu.prepare(
        tensors, stored=spec.stored, bits=spec.bits, group_size=spec.group_size, block=spec.block
    )


def planar_of(spec: LinearSpec, resident: Tensors) -> PlanarWeight:
    """The weight that the way "triton" keeps, as its kernels take it."""
    kind = gpu.kind_of(spec.stored, spec.bits)
    assert kind is not None
    group_size = spec.block or spec.group_size
    return gpu.planar(resident, kind, shape=spec.shape, group_size=group_size)


def _bind_triton(spec: LinearSpec, resident: Tensors) -> Product:
    weight = planar_of(spec, resident)
    return lambda x: gpu.apply(x, weight)


def _prepare_w8a8(spec: LinearSpec, tensors: Tensors) -> Tensors:
    return {"weight": tensors["weight"], "scale": tensors["weight_scale"].float()}


def _apply_w8a8(spec: LinearSpec, x: Tensor, resident: Tensors) -> Tensor:
    from compressor_kernels.w8a8 import w8a8  # triton exists only on Linux

    return w8a8(x, resident["weight"], resident["scale"])


def _apply_w8a8_exact(spec: LinearSpec, x: Tensor, resident: Tensors) -> Tensor:
    dense = resident["weight"].float() * resident["scale"]
    return torch.nn.functional.linear(x, dense.to(x.dtype))


def _prepare_w4a8(spec: LinearSpec, tensors: Tensors) -> Tensors:
    from compressor_kernels import w4a8

    parts = read_checkpoint(tensors, spec.bits, spec.group_size)
    dtype = _INPUTS[spec.activations]
    return w4a8.to_bytes(*parts, group_size=spec.group_size, dtype=dtype).tensors


def _byte_weight(spec: LinearSpec, resident: Tensors) -> ByteWeight:
    from compressor_kernels.w4a8 import ByteWeight

    dtype = _INPUTS[spec.activations]
    return ByteWeight(**resident, shape=spec.shape, group_size=spec.group_size, dtype=dtype)


def _bind_w4a8(spec: LinearSpec, resident: Tensors) -> Product:
    from compressor_kernels.w4a8 import w4a8

    return partial(w4a8, weight=_byte_weight(spec, resident))


def _apply_w4a8_exact(spec: LinearSpec, x: Tensor, resident: Tensors) -> Tensor:
    return torch.nn.functional.linear(x, _byte_weight(spec, resident).dense().to(x.dtype))


def _prepare_int4(spec: LinearSpec, tensors: Tensors) -> Tensors:
    codes, scale, _ = read_checkpoint(tensors, spec.bits, spec.group_size)
    return cpu.pack_int4_op(codes, scale)


def _apply_int4(spec: LinearSpec, x: Tensor, resident: Tensors) -> Tensor:
    return cpu.int4_op_linear(x, resident, spec.group_size)


def _prepare_int8(spec: LinearSpec, tensors: Tensors) -> Tensors:
    codes, scale, _ = read_checkpoint(tensors, spec.bits, spec.group_size)
    words = (codes - 128).view(torch.int8)  # modulo 256: the signed code
    return {"words": words, "scale": scale[:, 0].to(torch.bfloat16)}


def _apply_int8(spec: LinearSpec, x: Tensor, resident: Tensors) -> Tensor:
    return cpu.int8_op_linear(x, resident)


def _native_weight(spec: LinearSpec) -> native.Weight:
    return native.Weight(spec.bits, spec.group_size, spec.shape)


def _prepare_native(spec: LinearSpec, tensors: Tensors) -> Tensors:
    zeros, groups = None, num_groups(spec.shape[1], spec.group_size)
    if not spec.symmetric:
        zeros = unpack_zero_point(tensors["weight_zero_point"], spec.bits, (spec.shape[0], groups))
    return native.lay_out(
        _native_weight(spec), tensors["weight_packed"], tensors["weight_scale"], zeros
    )


def _bind_native(spec: LinearSpec, resident: Tensors) -> Product:
    return cpu.native_linear(resident, _native_weight(spec), rounds=False)


def _bind_native_int8(spec: LinearSpec, resident: Tensors) -> Product:
    return cpu.native_linear(resident, _native_weight(spec), rounds=True)


def _prepare_reference(spec: LinearSpec, tensors: Tensors) -> Tensors:
    return dict(tensors)


def _apply_reference(spec: LinearSpec, x: Tensor, resident: Tensors) -> Tensor:
    return reference_gemm(x, dequantize_checkpoint(resident, spec.bits, spec.group_size))


def _as_packed(tensors: Tensors) -> Tensors:
    """int8 weights as `pack-quantized` ones, which are the same numbers."""
    codes = tensors["weight"].view(torch.uint8) + 128
    shape = torch.tensor(codes.shape, dtype=torch.int64)
    packed = {"weight_packed": pack_codes(codes, 8), "weight_shape": shape}
    return packed | {"weight_scale": tensors["weight_scale"]}


def _prepare_dense(spec: LinearSpec, tensors: Tensors) -> Tensors:
    weight = dequantize_stored(
        tensors, stored=spec.stored, group_size=spec.group_size, block=spec.block
    )
    return {"dense": weight.to(spec.dtype or torch.float32)}


def _apply_dense(spec: LinearSpec, x: Tensor, resident: Tensors) -> Tensor:
    return torch.nn.functional.linear(x, resident["dense"].to(x.dtype))


WAYS: dict[str, Way] = {
    "triton": Way(_prepare_triton, _bind_triton),
    "w8a8": Way(_prepare_w8a8, _unbound(_apply_w8a8)),
    "w8a8-exact": Way(_prepare_w8a8, _unbound(_apply_w8a8_exact)),
    "w4a8": Way(_prepare_w4a8, _bind_w4a8),
    "w4a8-exact": Way(_prepare_w4a8, _unbound(_apply_w4a8_exact)),
    "native": Way(_prepare_native, _bind_native),
    "native-int8": Way(_prepare_native, _bind_native_int8),
    "planes": Way(_prepare_planes, _unbound(_apply_planes)),
    "cpu-bytes": Way(_prepare_bytes, _unbound(_apply_planes)),
    "cpu-int4": Way(_prepare_int4, _unbound(_apply_int4)),
    "cpu-int8": Way(_prepare_int8, _unbound(_apply_int8)),
    "dense": Way(_prepare_dense, _unbound(_apply_dense)),
    "reference": Way(_prepare_reference, _unbound(_apply_reference)),
}
