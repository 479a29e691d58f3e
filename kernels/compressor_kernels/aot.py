"""Compile the kernels ahead of time, for any GPU, without one, and count what came out.

    python -m compressor_kernels.aot --arch sm_90 --arch gfx942 --out budget.json

A GPU kernel that streams weights is as fast as memory only if it issues few enough instructions a
byte. An H200 processor receives 16.5-18.6 bytes a clock, so an int4 tile of 128 x 128 (8 KiB) takes
440-500 clocks, and with four warps on four schedulers the instructions of one warp per tile must stay
below that. This module compiles a configuration, disassembles it, finds the loop that holds the
matrix instructions and counts: the one speed test that needs no GPU. `BUDGET` is what the test suite
holds each tier to.

Run it in a process of its own: a wrong inline-assembly constraint aborts the compiler.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compressor_kernels.dequant_gemm import KernelConfig, dequant_gemm_kernel

ISSUE_LIMIT = 440  # warp instructions per 128 x 128 int4 tile that an H200 can issue while it loads

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MATRIX_OPS = r"HMMA|HGMMA|UTC\w*MMA|v_mfma\w*"
POINTERS = ("X", "Words", "S", "Z", "XS", "Bias", "Y")
INTEGERS = ("M", "N", "K", "stride_xm", "k_tiles", "tiles_a_split")


@dataclass(frozen=True, slots=True)
class Variant:
    """What a compiled kernel is specialised on, besides its launch shape."""

    group_size: int = 128
    symmetric: bool = True
    dtype: str = "bf16"
    even_k: bool = True


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """One kernel for one architecture: the binary and what was counted in it."""

    arch: str
    config: KernelConfig
    variant: Variant
    binary: bytes
    n_regs: int
    spill_bytes: int
    shared_bytes: int
    loop_instructions: int
    matrix_ops: list[str]
    loop_matrix_ops: int

    def row(self) -> dict[str, Any]:
        """The facts without the binary."""
        facts = {name: getattr(self, name) for name in self.__slots__ if name != "binary"}
        config, variant = asdict(self.config), asdict(self.variant)
        return facts | {"config": config, "variant": variant, "binary_bytes": len(self.binary)}


def signature(variant: Variant, split_k: int) -> dict[str, str]:
    """Triton argument types of `dequant_gemm_kernel`; the rest are constants."""
    types = dict.fromkeys(POINTERS, f"*{variant.dtype}")
    types |= {"Words": "*i16", "XS": "*fp32"}
    types["Z"] = types["S"] if variant.symmetric else "*u8"
    if split_k > 1:
        types["Y"] = "*fp32"
    return types | dict.fromkeys(INTEGERS, "i32")


def constants(arch: str, config: KernelConfig, variant: Variant) -> dict[str, Any]:
    """Compile-time arguments, as the host function would pass them."""
    return {
        "BM": config.block_m,
        "G": max(variant.group_size, 0),
        "SPLIT_K": config.split_k,
        "SYM": variant.symmetric,
        "HAS_BIAS": False,
        "EVEN_K": variant.even_k,
        "FP16": variant.dtype == "fp16",
        "ASM": not arch.startswith("gfx"),
        "IT": False,
    }


def compile_for(arch: str, config: KernelConfig, variant: Variant | None = None) -> CompiledKernel:
    """Compile `dequant_gemm_kernel` for `arch`; raises KeyError for an unknown one."""
    variant = Variant() if variant is None else variant
    types = signature(variant, config.split_k)
    names = dequant_gemm_kernel.arg_names
    aligned = [(i,) for i, n in enumerate(names) if n in (*POINTERS, "N", "K", "stride_xm")]
    source = ASTSource(
        fn=dequant_gemm_kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=constants(arch, config, variant),
        attrs={index: [["tt.divisibility", 16]] for index in aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    made = triton.compile(source, target=TARGETS[arch], options=options)
    if arch.startswith("gfx"):
        facts = read_amdgcn(made.asm["amdgcn"])
        binary = made.asm["hsaco"]
    else:
        facts = read_sass(made.asm["cubin"])
        binary = made.asm["cubin"]
    return CompiledKernel(
        arch=arch,
        config=config,
        variant=variant,
        binary=binary,
        shared_bytes=made.metadata.shared,
        **facts,
    )


# ------------------------------------------------------------------ reading machine code


def _disassemble(cubin: bytes, *flags: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_sass(cubin: bytes) -> dict[str, Any]:
    """Registers, stack bytes (spills) and main-loop counts of an NVIDIA binary."""
    usage = _disassemble(cubin, "-res-usage")
    listing = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", _disassemble(cubin, "-sass"))
    code = [(int(address, 16), text.strip()) for address, text in listing]
    loops = []
    for address, text in code:
        jump = re.search(r"\bBRA(?:\.\S+)?\s.*?0x([0-9a-f]+)", text)
        if jump and int(jump.group(1), 16) < address:
            loops.append([t for a, t in code if int(jump.group(1), 16) <= a <= address])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    registers, stack = (int(value) for value in found.groups()) if found else (-1, -1)
    local = sum("LDL" in text or "STL" in text for _, text in code)
    return {
        "n_regs": registers,
        "spill_bytes": stack + local,
        **_count(loops, [t for _, t in code]),
    }


def read_amdgcn(assembly: str) -> dict[str, Any]:
    """The same from AMD assembly text."""
    lines = [line.split(";")[0].strip() for line in assembly.splitlines()]
    lines = [line for line in lines if line]
    labels = {line[:-1]: index for index, line in enumerate(lines) if line.endswith(":")}
    loops = []
    for index, line in enumerate(lines):
        jump = re.match(r"s_c?branch\S*\s+(\S+)", line)
        start = labels.get(jump.group(1), index) if jump else index
        if start < index:
            body = [text for text in lines[start : index + 1] if not text.endswith(":")]
            loops.append([text for text in body if not text.startswith(".")])
    registers = re.search(r"\.vgpr_count:\s*(\d+)", assembly)
    spills = re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)
    return {
        "n_regs": int(registers.group(1)) if registers else -1,
        "spill_bytes": 4 * int(spills.group(1)) if spills else -1,
        **_count(loops, lines),
    }


def _count(loops: list[list[str]], code: list[str]) -> dict[str, Any]:
    """Counts of the shortest loop that holds every matrix instruction any loop holds."""
    ops = [[op for text in loop for op in re.findall(MATRIX_OPS, text)] for loop in loops]
    most = max((len(found) for found in ops), default=0)
    main = min(
        (len(loop) for loop, found in zip(loops, ops, strict=True) if len(found) == most), default=0
    )
    names = {op for text in code for op in re.findall(MATRIX_OPS, text)}
    return {
        "loop_instructions": main if most else 0,
        "matrix_ops": sorted(names),
        "loop_matrix_ops": most,
    }
