"""Launch configurations: a table of measured ones, and a rule for the rest.

`configs.json` maps "arch/op/bits/group/NxK/M bucket" to a configuration that a bench run chose
(`bench/bench_dequant_gemm.py`). It is data, not a cache: nothing is tuned while serving, because
tuning at the first call breaks graph capture and makes the first request slow. Where the table is
silent the rule below decides:

- rows a tile: the smallest of 8, 16, 32, 64 that holds M (matrix instructions on AMD need 16);
- split-K: enough blocks for two per processor, at most 16 splits, every split at least one tile;
- warps: 4, one a scheduler; 8 for 64 rows on sm_8x, where 4 would spill registers;
- stages: 4 while a stage is small, 3 for 64 rows, 2 on AMD.

None of it has been measured on a GPU yet.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch

from compressor_kernels.layout import tiles

PROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 142, "sm_90": 132, "sm_100": 148, "gfx942": 304}
M_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
OP = "dequant_gemm"


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """Launch shape: rows of x a tile, K splits, warps, software pipeline stages."""

    block_m: int
    split_k: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name in ("block_m", "split_k", "num_warps", "num_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.block_m & (self.block_m - 1):
            raise ValueError(f"block_m must be a power of two, got {self.block_m}")


def device_arch(device: torch.device) -> str:
    """Name such as sm_90 or gfx942, or cpu for the interpreter."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def m_bucket(rows: int) -> int:
    """The smallest bucket that holds `rows`; the last one holds everything above."""
    return next((bucket for bucket in M_BUCKETS if rows <= bucket), M_BUCKETS[-1])


def table_key(arch: str, group_size: int, shape: tuple[int, int], rows: int) -> str:
    """Key of `configs.json`; an empty tensor counts as one row."""
    return f"{arch}/{OP}/4/{group_size}/{shape[0]}x{shape[1]}/{m_bucket(max(rows, 1))}"


@cache
def table() -> dict[str, dict[str, int]]:
    """The entries of `configs.json`."""
    text = files("compressor_kernels").joinpath("configs.json").read_text(encoding="utf-8")
    entries: dict[str, dict[str, int]] = json.loads(text)["configs"]
    return entries


def choose_config(
    arch: str, shape: tuple[int, int], rows: int, *, group_size: int = 128
) -> KernelConfig:
    """Configuration for a weight (N, K) and `rows` rows of x on `arch`."""
    entry = table().get(table_key(arch, group_size, shape, rows))
    return KernelConfig(**entry) if entry is not None else heuristic(arch, shape, rows)


def heuristic(arch: str, shape: tuple[int, int], rows: int) -> KernelConfig:
    """The rule of the module docstring."""
    is_amd = arch.startswith("gfx")
    smallest = 16 if is_amd else 8
    block_m = next((size for size in (8, 16, 32, 64) if rows <= size), 64)
    block_m = max(block_m, smallest)
    n_tiles, k_tiles = tiles(shape)
    blocks = n_tiles * -(-max(rows, 1) // block_m)
    wanted = -(-2 * PROCESSORS.get(arch, 1) // blocks)
    stages = 2 if is_amd else 3 if block_m == 64 else 4
    warps = 8 if block_m == 64 and arch.startswith("sm_8") else 4
    return KernelConfig(block_m, max(1, min(16, k_tiles, wanted)), warps, stages)
