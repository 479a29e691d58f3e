"""Every kernel as the ahead-of-time compiler wants it: argument types and constants.

`SOURCES` maps an op to a function of (arch, variant, config), the last two plain dicts as they
stand in job files and tables.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from compressor_kernels.dequant_gemm import dequant_gemm_kernel
from compressor_kernels.kv_pool import KV_TOP
from compressor_kernels.layout import GROUP_SIZES
from compressor_kernels.moe_gemm import moe_gemm_kernel
from compressor_kernels.paged_attention import TOKENS, kv_constants, paged_attention_kernel
from compressor_kernels.specialize import constants
from compressor_kernels.store_kv import store_kv_kernel
from compressor_kernels.tuning import BLOCK_N, GemmSpec, KernelConfig, heuristic
from compressor_kernels.w4a8 import E4M3_ASM, INT8_ASM, w4a8_kernel
from compressor_kernels.w8a8 import w8a8_kernel
from compressor_kernels.words import LAYOUTS, Floats, Kind, columns_a_plane


@dataclass(frozen=True, slots=True)
class Source:
    """A jitted function and what it is specialised on.

    types: argument types of all arguments that are not constants. aligned: integer arguments that
    are multiples of 16 (pointers always are). step_bytes: weight bytes (with scales and zero
    points) that one turn of the main loop consumes, 0 where that is not what bounds the kernel.
    step_products: 16-bit multiply-adds of that turn, 0 where they are not counted.
    """

    fn: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    step_bytes: int = 0
    step_products: int = 0


@dataclass(frozen=True, slots=True)
class Variant:
    """What `dequant_gemm` is specialised on, besides its launch shape."""

    kind: Kind = "int4"
    group_size: int = 128
    has_zeros: bool = False
    dtype: Floats = "bf16"
    scale_kind: str = "float"
    even_k: bool = True

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {self.group_size}")

    @property
    def spec(self) -> GemmSpec:
        """The weight of a large layer in this format."""
        shape = (1 << 20, 4096)
        return GemmSpec(self.kind, self.group_size, shape, self.has_zeros, self.scale_kind)

    @property
    def name(self) -> str:
        """Such as int4-g128-asym, or e2m1-g16-e5m3."""
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        parts = [self.kind, group, "asym" * self.has_zeros, "fp16" * (self.dtype == "fp16")]
        parts += ["anyk" * (not self.even_k), self.scale_kind * (self.scale_kind != "float")]
        return "-".join(part for part in parts if part)

    @property
    def step_bytes(self) -> int:
        """Bytes of one tile."""
        layout, pc = LAYOUTS[self.kind], columns_a_plane(self.kind, self.group_size)
        groups = 0 if self.group_size == -1 else self.spec.block_k // self.group_size
        a_group = (2 if self.scale_kind == "float" else 1) + self.has_zeros
        return BLOCK_N * (layout.words * pc * 2 + groups * a_group)


def dequant_gemm_source(arch: str, variant: dict[str, Any], config: dict[str, Any]) -> Source:
    """The product; `config` as `KernelConfig`."""
    what, launch = Variant(**variant), KernelConfig(**config)
    is_nvidia = not arch.startswith("gfx")
    pointer = f"*{what.dtype}"
    types = dict.fromkeys(("X", "S", "Bias", "Residual", "Y"), pointer)
    types["S"] = pointer if what.scale_kind == "float" else "*i32"
    types |= {"Words": "*i16", "XS": "*fp32", "Factor": "*fp32"}
    types["Z"] = "*u8" if what.has_zeros else types["S"]
    if launch.split_k > 1:
        types["Y"] = "*fp32"
    sizes = ("M", "N", "K", "stride_xm", "k_tiles", "tiles_a_split", "sums_stride")
    fixed = constants(what.spec, what.dtype, form=launch.form, asm=is_nvidia) | {
        "BM": launch.block_m,
        "PARTIAL": launch.split_k > 1,
        "HAS_BIAS": False,
        "HAS_RESIDUAL": False,
        "GATED": False,
        "EVEN_K": what.even_k,
        "IT": False,
    }
    return Source(
        dequant_gemm_kernel,
        types | dict.fromkeys(sizes, "i32"),
        fixed,
        ("N", "K", "stride_xm"),
        launch.num_warps,
        launch.num_stages,
        what.step_bytes,
        BLOCK_N * launch.block_m * what.spec.block_k * fixed["R"],
    )


def moe_source(arch: str, variant: dict[str, Any], config: dict[str, Any]) -> Source:
    """The product of experts: what `dequant_gemm` is made of, with other rows."""
    one = dequant_gemm_source(arch, variant, config | {"split_k": 1})
    pointers = {"Places": "*i32", "Experts": "*i32", "Routing": "*fp32"}
    sizes = ("num_tokens", "choices", "top_k", "words_stride", "scales_stride", "factor_stride")
    return replace(
        one,
        fn=moe_gemm_kernel,
        types={n: t for n, t in one.types.items() if n in moe_gemm_kernel.arg_names}
        | pointers
        | dict.fromkeys(sizes, "i32"),
        constants={n: v for n, v in one.constants.items() if n in moe_gemm_kernel.arg_names}
        | {"HAS_ROUTING": False},
        aligned=(*one.aligned, "words_stride", "scales_stride"),
    )


def w4a8_source(arch: str, variant: dict[str, Any], config: dict[str, Any]) -> Source:
    """`variant`: dtype "int8" or "e4m3", group_size, has_zeros. Raises ValueError for AMD."""
    if arch.startswith("gfx"):
        raise ValueError("w4a8 unpacks with PTX; AMD has no kernel of it")
    launch, group = KernelConfig(**config), int(variant["group_size"])
    is_fp8, has_zeros = variant["dtype"] == "e4m3", bool(variant["has_zeros"])
    types = dict.fromkeys(("S", "Bias", "Y"), "*bf16") | dict.fromkeys(("SX", "XS"), "*fp32")
    types |= {"X": "*fp8e4nv" if is_fp8 else "*i8", "Words": "*i16"}
    types |= {"Z": "*u8" if has_zeros else "*bf16"} | dict.fromkeys(
        ("M", "N", "K", "k_tiles"), "i32"
    )
    fixed = {
        "BM": launch.block_m,
        "G": max(group, 0),
        "HAS_ZEROS": has_zeros,
        "HAS_BIAS": False,
        "EVEN_K": True,
        "FP8": is_fp8,
        "ASM": E4M3_ASM if is_fp8 else INT8_ASM,
        "IT": False,
    }
    groups = 0 if group == -1 else 128 // group
    step = BLOCK_N * (64 + groups * (2 + has_zeros))
    shape = (launch.num_warps, launch.num_stages)
    return Source(w4a8_kernel, types, fixed, ("N", "K"), *shape, step)


def w8a8_source(arch: str, variant: dict[str, Any], config: dict[str, Any]) -> Source:
    """`variant`: dtype "int8" or "e4m3"."""
    launch, is_int = KernelConfig(**config), variant["dtype"] == "int8"
    eight = "*i8" if is_int else "*fp8e4nv"
    types = {"X": eight, "W": eight, "SX": "*fp32", "SW": "*fp32", "Bias": "*bf16", "Y": "*bf16"}
    fixed = {"BM": launch.block_m, "BK": 128, "HAS_BIAS": False, "EVEN_K": True, "INT8": is_int}
    return Source(
        w8a8_kernel,
        types | dict.fromkeys(("M", "N", "K"), "i32"),
        fixed | {"IT": False},
        ("N", "K"),
        launch.num_warps,
        launch.num_stages,
        BLOCK_N * 128,
    )


def paged_attention_source(arch: str, variant: dict[str, Any], config: dict[str, Any]) -> Source:
    """`variant`: kind (or "none"), size, group, page, dtype; `config`: num_warps, num_stages.

    A turn reads TOKENS keys and as many values of one head, with their scales.
    """
    kind = None if variant["kind"] == "none" else variant["kind"]
    floats: Floats = variant["dtype"]
    data = f"*{floats}" if kind is None else "*i16"
    types = {"Q": f"*{floats}", "Keys": data, "Values": data}
    types |= dict.fromkeys(("KS", "VS"), data if kind is None else "*fp32")
    types |= dict.fromkeys(("Tables", "Lengths"), "*i32")
    types |= dict.fromkeys(("Out", "Stats"), "*fp32") | {"scale": "fp32"}
    sizes = ("stride_qb", "stride_qh", "stride_table", "kv_heads", "window")
    size, planes = int(variant["size"]), 1 if kind is None else LAYOUTS[kind].num_planes
    fixed = kv_constants(kind, floats, asm=not arch.startswith("gfx")) | {
        "E": size,
        "GROUP": variant["group"],
        "ROWS": max(16, int(variant["group"])),
        "PAGE": variant["page"],
        "T": TOKENS,
        "IT": False,
    }
    token = size // planes * 2 + (0 if kind is None else 4)
    return Source(
        paged_attention_kernel,
        types | dict.fromkeys(sizes, "i32"),
        fixed,
        ("stride_qb", "stride_qh"),
        int(config["num_warps"]),
        int(config["num_stages"]),
        2 * TOKENS * token,
    )


def store_kv_source(arch: str, variant: dict[str, Any], config: dict[str, Any]) -> Source:
    """`variant`: kind, size, dtype; `config`: num_warps."""
    kind: Kind = variant["kind"]
    types = {"X": f"*{variant['dtype']}", "Slots": "*i64", "Pool": "*i16", "Scales": "*fp32"}
    sizes = ("stride_xt", "stride_xh", "heads")
    planes = LAYOUTS[kind].num_planes
    fixed = {"E": variant["size"], "PLANES": planes, "KIND": kind, "TOP": KV_TOP[kind]}
    types |= dict.fromkeys(sizes, "i32")
    return Source(store_kv_kernel, types, fixed, sizes[:2], int(config["num_warps"]), 1)


def usual_config(arch: str, variant: Variant, rows: int) -> KernelConfig:
    """The launch shape of the rule for a tier of M, without split-K."""
    return replace(heuristic(arch, variant.spec, rows), split_k=1)


SOURCES = {
    "dequant_gemm": dequant_gemm_source,
    "moe_dequant_gemm": moe_source,
    "w4a8": w4a8_source,
    "w8a8": w8a8_source,
    "paged_attention": paged_attention_source,
    "store_kv": store_kv_source,
}
