"""Compile the kernels ahead of time, for any GPU, without one, and count what came out.

    python -m compressor_kernels.aot --arch sm_90 --arch gfx942 --out budget.json --table table.md

A GPU kernel that streams weights is as fast as memory only if it issues few enough instructions a
byte. An H200 processor receives 16.5-18.6 bytes a clock, so an int4 tile of 128 x 128 (8 KiB)
takes 440-500 clocks, and with four warps on four schedulers the instructions of one warp a tile
must stay below that. This module compiles a configuration, disassembles it, finds the loop that
holds the matrix instructions and counts: the one speed test that needs no GPU. `ISSUE_LIMIT` is the
budget for 8 KiB of weights; `budget.py` holds the formats and tiers it is applied to. Many rows
keep the tensor cores busy for longer than the bytes take to arrive: then that time is the limit.

Run it in a process of its own: a wrong inline-assembly constraint aborts the compiler.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compressor_kernels.machine_code import CodeFacts, read_amdgcn, read_sass
from compressor_kernels.sources import SOURCES, Source

# Instructions of one warp that fit into the time 8 KiB of weights take to arrive, four warps:
# 8192 bytes / (bandwidth / processors / clock); a CDNA SIMD starts one vector instruction each four
# clocks. A100 2.04 TB/s 108 x 1.41 GHz, H200 4.3 measured 132 x 1.755, B200 8.0 148 x 1.85,
# RTX PRO 6000 (sm_120) 1.79 188 x 2.4, MI300X 5.3 304 x 2.1, MI355X 8.0 256 x 2.4.
ISSUE_LIMIT = {
    "sm_80": 611,
    "sm_90": 440,
    "sm_100": 280,
    "sm_120": 2065,
    "gfx942": 246,
    "gfx950": 157,
}
# 16-bit multiply-adds a processor's tensor cores do in a clock, without sparsity.
MATRIX_RATE = {
    "sm_80": 1024,
    "sm_90": 2048,
    "sm_100": 4096,
    "sm_120": 512,
    "gfx942": 1024,
    "gfx950": 2048,
}
# The rate of `mma.sync` where newer instructions have the one above: 128 x 128 x 16 take 200 clocks
# on an H100; sm_100 is taken to be the same.
OLDER_RATE = {"sm_90": 1311, "sm_100": 1311}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}


@dataclass(frozen=True, slots=True)
class Job:
    """One kernel for one architecture; `variant` and `config` as the op's source wants them."""

    arch: str
    variant: dict[str, Any]
    config: dict[str, Any]
    op: str = "dequant_gemm"

    @property
    def name(self) -> str:
        """A file name that says what the binary is specialised on."""
        words = [self.op]
        for key, value in sorted((self.variant | self.config).items()):
            if value is True:
                words.append(key)
            elif value is not False:
                words.append(f"{value}" if isinstance(value, str) else f"{key}{value}")
        return "_".join(words).replace("-", "m")


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """The binary of a job and what was counted in it."""

    job: Job
    binary: bytes
    shared_bytes: int
    code: CodeFacts
    issue_slots: int
    matrix_clocks: int
    issue_limit: int
    limited_by: str

    def row(self) -> dict[str, Any]:
        """The facts without the binary. Slots are those a scheduler issues per turn of the loop,
        matrix clocks those that the loop's own matrix instructions take (not counted: 0), the limit
        what fits into the time its weights take to arrive (0: not bound by weights), or its
        products take on the tensor cores; `limited_by` is "bytes" or "products"."""
        numbers = {"issue_slots": self.issue_slots, "issue_limit": self.issue_limit}
        numbers["matrix_clocks"] = self.matrix_clocks
        sizes = {"binary_bytes": len(self.binary), "shared_bytes": self.shared_bytes}
        limit = {"limited_by": self.limited_by}
        return asdict(self.job) | asdict(self.code) | numbers | limit | sizes


def compile_job(job: Job) -> CompiledKernel:
    """Compile one kernel. Raises KeyError for an unknown architecture or op."""
    source = SOURCES[job.op](job.arch, job.variant, job.config)
    target = TARGETS[job.arch]
    options = {"num_warps": source.num_warps, "num_stages": source.num_stages}
    made = triton.compile(_ast(source), target=target, options=options)
    is_amd = job.arch.startswith("gfx")
    binary = made.asm["hsaco" if is_amd else "cubin"]
    code = read_amdgcn(made.asm["amdgcn"]) if is_amd else read_sass(binary)
    limit, reason = max(_limits(job.arch, source))
    return CompiledKernel(
        job=job,
        binary=binary,
        shared_bytes=made.metadata.shared,
        code=code,
        issue_slots=code.loop_instructions * source.num_warps // 4,
        matrix_clocks=_matrix_clocks(job.arch, source, code),
        issue_limit=limit,
        limited_by=reason,
    )


def _matrix_clocks(arch: str, source: Source, code: CodeFacts) -> int:
    """Clocks of a turn's products on `mma.sync`; 0 where the kernel has faster instructions."""
    is_older = "HMMA" in code.matrix_ops and arch in OLDER_RATE
    return source.step_products // OLDER_RATE[arch] if is_older else 0


def _limits(arch: str, source: Source) -> list[tuple[int, str]]:
    """Slots in the time of a turn's bytes and in that of its products; on AMD of four clocks."""
    clocks = source.step_products // MATRIX_RATE.get(arch, 1 << 30)
    products = clocks // 4 if arch.startswith("gfx") else clocks
    weights = ISSUE_LIMIT.get(arch, 0) * source.step_bytes // 8192
    return [(weights, "bytes"), (products, "products")]


def _ast(source: Source) -> ASTSource:
    names = source.fn.arg_names
    aligned = [
        (index,)
        for index, name in enumerate(names)
        if source.types.get(name, "").startswith("*") or name in source.aligned
    ]
    return ASTSource(
        fn=source.fn,
        signature={name: source.types.get(name, "constexpr") for name in names},
        constexprs=source.constants,
        attrs={index: [["tt.divisibility", 16]] for index in aligned},
    )


def run_job(job: Job, binaries: Path | None) -> dict[str, Any]:
    """Compile one job and, with a folder, save the binary as `<arch>/<name>`."""
    made = compile_job(job)
    if binaries is None:
        return made.row()
    suffix = "hsaco" if job.arch.startswith("gfx") else "cubin"
    path = binaries / job.arch / f"{job.name}.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(made.binary)
    return made.row() | {"file": f"{job.arch}/{path.name}"}


def write_report(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """The facts as JSON, a kernel a line."""
    head = json.dumps({"triton": triton.__version__, "issue_limit": ISSUE_LIMIT})
    lines = ",\n".join(json.dumps(row) for row in rows)
    out.write_text(f'{head[:-1]}, "kernels": [\n{lines}\n]}}\n', encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Compile the jobs of a file and write the facts."""
    parser = argparse.ArgumentParser(description="compile kernels without a GPU")
    parser.add_argument("--jobs", type=Path, required=True, help="JSON list of jobs")
    parser.add_argument("--binaries", type=Path, help="folder for the binaries")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the facts")
    options = parser.parse_args(arguments)
    jobs = [Job(**fields) for fields in json.loads(options.jobs.read_text(encoding="utf-8"))]
    write_report([run_job(job, options.binaries) for job in jobs], options.out)


if __name__ == "__main__":
    main()
