"""What a compiled kernel consists of: registers, spills, and the instructions of its main loop.

The main loop is the shortest loop that holds every matrix instruction any loop holds. Products in
float32 (tf32 on NVIDIA) do not count: they correct the result after the loop, or hold no weights.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

MATRIX_OPS = r"HMMA|HGMMA|IMMA|IGMMA|QMMA|QGMMA|OMMA|UTC\w*MMA|v_mfma\w*"
IN_FLOAT32 = r"MMA\S*\.TF32|v_mfma_f32_\d+x\d+x\d+_?x?f32"
ASYNC_16 = r"LDGSTS\S*\.128|UBLKCP|UTMALDG|(?:buffer|global)_load_dwordx4"


@dataclass(frozen=True, slots=True)
class CodeFacts:
    """`spills` counts stack bytes and local-memory instructions (AMD: spilled registers); 0 is the
    only good value. `wide_loads` are 16-byte loads, on NVIDIA asynchronous ones."""

    n_regs: int
    spills: int
    loop_instructions: int
    matrix_ops: list[str]
    loop_matrix_ops: int
    wide_loads: int


def _disassemble(cubin: bytes, *flags: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_sass(cubin: bytes) -> CodeFacts:
    """Facts of an NVIDIA binary."""
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
    return _facts(registers, stack + local, loops, [t for _, t in code])


def read_amdgcn(assembly: str) -> CodeFacts:
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
    return _facts(
        int(registers.group(1)) if registers else -1,
        int(spills.group(1)) if spills else -1,
        loops,
        lines,
    )


def _facts(registers: int, spills: int, loops: list[list[str]], code: list[str]) -> CodeFacts:
    ops = [_matrix_ops(loop) for loop in loops]
    most = max((len(found) for found in ops), default=0)
    main = min(
        (len(loop) for loop, found in zip(loops, ops, strict=True) if len(found) == most), default=0
    )
    return CodeFacts(
        n_regs=registers,
        spills=spills,
        loop_instructions=main if most else 0,
        matrix_ops=sorted(set(_matrix_ops(code))),
        loop_matrix_ops=most,
        wide_loads=sum(bool(re.search(ASYNC_16, text)) for text in code),
    )


def _matrix_ops(code: list[str]) -> list[str]:
    counted = [text for text in code if not re.search(IN_FLOAT32, text)]
    return [op for text in counted for op in re.findall(MATRIX_OPS, text)]
