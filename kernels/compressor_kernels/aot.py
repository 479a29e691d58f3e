"""Compile the kernels ahead of time, for any GPU, without one, and count what came out.

    python -m compressor_kernels.aot --arch sm_90 --arch gfx942 --out budget.json

A GPU kernel that streams weights is as fast as memory only if it issues few enough instructions a
byte. An H200 processor receives 16.5-18.6 bytes a clock, so an int4 tile of 128 x 128 (8 KiB)
takes 440-500 clocks, and with four warps on four schedulers the instructions of one warp a tile
must stay below that. This module compiles a configuration, disassembles it, finds the loop that
holds the matrix instructions and counts: the one speed test that needs no GPU. `ISSUE_LIMIT` is the
budget, `BUDGET` what the test suite holds the tiers to (the counts of Triton 3.9 plus a tenth).

Run it in a process of its own: a wrong inline-assembly constraint aborts the compiler.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compressor_kernels.dequant_gemm import dequant_gemm_kernel
from compressor_kernels.layout import BLOCK_K, BLOCK_N, GROUP_SIZES
from compressor_kernels.tuning import KernelConfig, heuristic

# Instructions of one warp that fit into the time an 8 KiB tile takes to arrive, four warps a tile:
# 8192 bytes / (bandwidth / processors / clock); a CDNA SIMD starts one vector instruction each four
# clocks. A100 2.04 TB/s 108 x 1.41 GHz, H200 4.3 measured 132 x 1.755, B200 8.0 148 x 1.85,
# MI300X 5.3 304 x 2.1.
ISSUE_LIMIT = {"sm_80": 611, "sm_90": 440, "sm_100": 280, "gfx942": 246}

# Rows of x a tile -> most issue slots a tile, symmetric groups of 128.
BUDGET = {
    "sm_80": {8: 240, 16: 280, 32: 370, 64: 700},
    "sm_90": {8: 300, 16: 315, 32: 370, 64: 475},
    "sm_100": {8: 420, 16: 480, 32: 580, 64: 710},
    "gfx942": {16: 220, 32: 340, 64: 500},
}

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
    """One kernel for one architecture: the binary and what was counted in it.

    `loop_instructions` are those of one warp a tile; `issue_slots` those one scheduler has to issue
    when four schedulers share the warps. `spills` counts stack bytes and local-memory instructions
    (AMD: spilled registers); 0 is the only good value.
    """

    arch: str
    config: KernelConfig
    variant: Variant
    binary: bytes
    n_regs: int
    spills: int
    shared_bytes: int
    loop_instructions: int
    matrix_ops: list[str]
    loop_matrix_ops: int

    @property
    def issue_slots(self) -> int:
        """Instructions a scheduler issues per tile."""
        return self.loop_instructions * self.config.num_warps // 4

    def row(self) -> dict[str, Any]:
        """The facts without the binary."""
        facts = {name: getattr(self, name) for name in self.__slots__ if name != "binary"}
        config, variant = asdict(self.config), asdict(self.variant)
        more = {"binary_bytes": len(self.binary), "issue_slots": self.issue_slots}
        return facts | more | {"config": config, "variant": variant}


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
        "PARTIAL": config.split_k > 1,
        "SYM": variant.symmetric,
        "HAS_BIAS": False,
        "EVEN_K": variant.even_k,
        "FP16": variant.dtype == "fp16",
        "ASM": not arch.startswith("gfx"),
        "IT": False,
    }


def compile_for(arch: str, config: KernelConfig, variant: Variant | None = None) -> CompiledKernel:
    """Compile `dequant_gemm_kernel` for `arch`.

    Raises KeyError for an unknown architecture, ValueError for a group size without a kernel.
    """
    variant = Variant() if variant is None else variant
    if variant.group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {variant.group_size}")
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
        "spills": stack + local,
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
        "spills": int(spills.group(1)) if spills else -1,
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


# ------------------------------------------------------------------ command


def tier(arch: str, block_m: int, variant: Variant | None = None) -> dict[str, Any]:
    """A job: the launch shape `tuning.heuristic` uses for a tier of M, without split-K."""
    config = replace(heuristic(arch, (BLOCK_N, BLOCK_K), block_m), split_k=1)
    variant = Variant() if variant is None else variant
    return {"arch": arch, "config": asdict(config), "variant": asdict(variant)}


def default_jobs(archs: list[str]) -> list[dict[str, Any]]:
    """Every tier of M at group 128, and the other groups and zero points at 16 rows."""
    others = [Variant(64), Variant(32), Variant(-1), Variant(128, symmetric=False)]
    jobs = []
    for arch in archs:
        jobs += [tier(arch, block_m) for block_m in BUDGET.get(arch, BUDGET["sm_90"])]
        jobs += [tier(arch, 16, variant) for variant in others]
    return jobs


def run_job(job: dict[str, Any], binaries: Path | None) -> dict[str, Any]:
    """Compile one job and, with a folder, save the binary as `<arch>/<name>`."""
    config, variant = KernelConfig(**job["config"]), Variant(**job["variant"])
    made = compile_for(job["arch"], config, variant)
    if binaries is None:
        return made.row()
    suffix = "hsaco" if made.arch.startswith("gfx") else "cubin"
    path = binaries / made.arch / f"{binary_name(config, variant)}.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(made.binary)
    return made.row() | {"file": f"{made.arch}/{path.name}"}


def binary_name(config: KernelConfig, variant: Variant) -> str:
    """Name that says what the binary is specialised on."""
    group = "row" if variant.group_size == -1 else f"g{variant.group_size}"
    kind = "partial" if config.split_k > 1 else "full"
    tail = "" if variant.even_k else "_anyk"
    zero = "sym" if variant.symmetric else "asym"
    launch = f"m{config.block_m}_w{config.num_warps}_s{config.num_stages}"
    return f"dequant_gemm_{variant.dtype}_{group}_{zero}_{launch}_{kind}{tail}"


def main(arguments: list[str] | None = None) -> None:
    """Compile the jobs and write the facts as JSON."""
    parser = argparse.ArgumentParser(description="compile the kernels without a GPU")
    parser.add_argument("--arch", action="append", choices=sorted(TARGETS), default=[])
    parser.add_argument("--jobs", type=Path, help="JSON list of {arch, config, variant}")
    parser.add_argument("--binaries", type=Path, help="folder for the binaries")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the facts")
    options = parser.parse_args(arguments)
    jobs = default_jobs(options.arch)
    if options.jobs is not None:
        jobs += json.loads(options.jobs.read_text(encoding="utf-8"))
    rows = [run_job(job, options.binaries) for job in jobs]
    report = {"triton": triton.__version__, "issue_limit": ISSUE_LIMIT, "kernels": rows}
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
