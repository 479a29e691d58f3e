"""Every kernel as the ahead-of-time compiler wants it: argument types and constants.

`SOURCES` maps an op to a function of (arch, variant, config), the last two plain dicts as they
stand in job files and tables.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from compressor_kernels.dequant_gemm import dequant_gemm_kernel
from compressor_kernels.layout import GROUP_SIZES
from compressor_kernels.specialize import constants
from compressor_kernels.tuning import BLOCK_N, GemmSpec, KernelConfig, heuristic
from compressor_kernels.words import LAYOUTS, Floats, Kind, columns_a_plane


@dataclass(frozen=True, slots=True)
class Source:
    """A jitted function and what it is specialised on.

    types: argument types of all arguments that are not constants. aligned: integer arguments that
    are multiples of 16 (pointers always are). step_bytes: weight bytes (with scales and zero
    points) that one turn of the main loop consumes, 0 where that is not what bounds the kernel.
    """

    fn: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    step_bytes: int = 0


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
    )


def usual_config(arch: str, variant: Variant, rows: int) -> KernelConfig:
    """The launch shape of the rule for a tier of M, without split-K."""
    return replace(heuristic(arch, variant.spec, rows), split_k=1)


SOURCES = {
    "dequant_gemm": dequant_gemm_source,
}
