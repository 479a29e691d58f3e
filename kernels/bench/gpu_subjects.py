"""What the GPU bench runs: shapes, weights, and the calls that are timed against each other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from compressor_kernels.dequant_gemm import dequant_gemm
from compressor_kernels.graph_time import copies
from compressor_kernels.tune import random_weights
from compressor_kernels.tuning import GemmSpec
from compressor_kernels.w4a8 import to_bytes, w4a8
from compressor_kernels.w8a8 import w8a8

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is: the real thing, or small enough for the interpreter."""

    device: str
    models: dict[str, dict[str, tuple[int, int]]]
    rows: tuple[int, ...]
    decode: tuple[int, int, int]  # hidden size, intermediate size, layers
    heads: tuple[int, int, int]  # query heads, key-value heads, head size
    contexts: tuple[int, ...]
    batches: tuple[int, ...]


FULL = Scale(
    device="cuda",
    models={
        "8B": {
            "qkv": (6144, 4096),
            "o": (4096, 4096),
            "gate_up": (28672, 4096),
            "down": (4096, 14336),
        },
        "70B": {
            "qkv": (10240, 8192),
            "o": (8192, 8192),
            "gate_up": (57344, 8192),
            "down": (8192, 28672),
        },
    },
    rows=(1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096),
    decode=(4096, 14336, 32),
    heads=(32, 8, 128),
    contexts=(4096, 16384, 65536, 131072),
    batches=(1, 8, 32),
)
TINY = Scale(
    device="cpu",
    models={"tiny": {"o": (128, 128)}},
    rows=(1, 17),
    decode=(128, 128, 1),
    heads=(4, 2, 64),
    contexts=(70,),
    batches=(2,),
)


def rotated(shape: tuple[int, int], scale: Scale) -> int:
    """Copies of a bf16 weight to rotate over; two in the dry run."""
    return copies(shape[0] * shape[1] * 2) if scale.device == "cuda" else 2


def packed_calls(spec: GemmSpec, x: Tensor, scale: Scale) -> tuple[list[Call], int]:
    """Our product on rotated copies, and the bytes of one weight."""
    weights = random_weights(spec, x.device)
    weights = weights if scale.device == "cuda" else weights[:2]
    return [partial(dequant_gemm, x, weight) for weight in weights], weights[0].nbytes


def dense_calls(shape: tuple[int, int], x: Tensor, scale: Scale) -> list[Call]:
    """bf16 torch.mm."""
    count = rotated(shape, scale)
    weights = [torch.randn(shape, device=x.device, dtype=x.dtype) for _ in range(count)]
    return [partial(torch.mm, x, weight.t()) for weight in weights]


def w4a8_calls(shape: tuple[int, int], x: Tensor, scale: Scale) -> list[Call]:
    """int4 weights with e4m3 activations where the GPU has them, else int8."""
    codes = torch.randint(0, 16, shape, device=x.device, dtype=torch.uint8)
    factor = torch.rand(shape[0], shape[1] // 128, device=x.device).bfloat16()
    dtype = torch.float8_e4m3fn if _has_fp8(x.device) else torch.int8
    weight = to_bytes(codes, factor, None, group_size=128, dtype=dtype)
    count = copies(weight.words.nbytes) if scale.device == "cuda" else 2
    rest = [replace(weight, words=weight.words.clone()) for _ in range(count - 1)]
    return [partial(w4a8, x, one) for one in [weight, *rest]]


def w8a8_calls(shape: tuple[int, int], x: Tensor, scale: Scale) -> list[Call]:
    """e4m3 or int8 on both sides."""
    dtype = torch.float8_e4m3fn if _has_fp8(x.device) else torch.int8
    factor = torch.rand(shape[0], device=x.device)
    count = copies(shape[0] * shape[1]) if scale.device == "cuda" else 2
    weights = [torch.randint(-99, 99, shape, device=x.device).to(torch.int8) for _ in range(count)]
    return [partial(w8a8, x, weight.to(dtype), factor) for weight in weights]


def _has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def int4_op_calls(shape: tuple[int, int], x: Tensor, scale: Scale) -> list[Call] | None:
    """torch's own int4 product (tinygemm), where this build has it."""
    if scale.device != "cuda":
        return None
    codes = torch.randint(0, 16, shape, device=x.device, dtype=torch.uint8)
    packed = ((codes[:, ::2] << 4) | codes[:, 1::2]).contiguous()
    words = torch.ops.aten._convert_weight_to_int4pack(packed, 8)
    pairs = torch.rand(shape[1] // 128, shape[0], 2, device=x.device).bfloat16()
    product = torch.ops.aten._weight_int4pack_mm
    count = copies(packed.nbytes)
    return [partial(product, x, words.clone(), 128, pairs) for _ in range(count)]


def install_wheels(folder: Path, target: Path) -> list[str]:
    """Put the wheels of a folder on the path, without their dependencies; names of the files."""
    wheels = sorted(folder.glob("*.whl"))
    if wheels:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        names = [str(wheel) for wheel in wheels]
        subprocess.run([*command, "--target", str(target), *names], check=True)
        sys.path.append(str(target))
    return [wheel.name for wheel in wheels]


def gemlite_calls(shape: tuple[int, int], x: Tensor, scale: Scale) -> list[Call] | None:
    """GemLite's linear in fp16, if it can be imported."""
    try:
        from gemlite.core import DType, GemLiteLinear
    except ImportError:
        return None
    out_features, columns = shape
    codes = torch.randint(0, 16, shape, device=x.device, dtype=torch.uint8)
    factor = torch.rand(out_features * columns // 128, 1, device=x.device).half()
    zeros = torch.full_like(factor, 8.0)
    layers = []
    for _ in range(copies(out_features * columns // 2)):
        layer = GemLiteLinear(
            4, group_size=128, in_features=columns, out_features=out_features,
            input_dtype=DType.FP16, output_dtype=DType.FP16,
        )  # fmt: skip
        layer.pack(codes, factor, zeros, None)
        layers.append(layer)
    half = x.half()
    return [partial(layer, half) for layer in layers]


PEERS: dict[str, Callable[[tuple[int, int], Tensor, Scale], list[Call] | None]] = {
    "torch int4": int4_op_calls,
    "gemlite": gemlite_calls,
}
