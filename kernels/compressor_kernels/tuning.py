"""Launch configurations: a table of measured ones, and a rule for the rest.

`configs.json` maps "arch/op/kind/group/NxK/M bucket" to a configuration that `compress tune` or a
bench run measured; a table of this machine (`user_table_path`) goes before it. It is data, not a
cache: nothing is tuned while serving, because tuning at the first call breaks graph capture and
makes the first request slow. Where the tables are silent the rule below decides:

- rows a tile: the smallest of 8, 16, 32, 64, 128 that holds M (matrix instructions on AMD need 16);
- form: `group`; `element` where two accumulators would spill (compiled: from 17, 33 or 65 rows on,
  by format) and for groups of 16; `raw`, which takes a launch more for its sums, where `group`
  would issue more than memory allows: on sm_100 with two warps (but int8, and 8 rows of symmetric
  int4), on sm_90 int2 and int3 of 17 to 32 rows; `dense` (dequantize, then cuBLAS) from 1024 rows
  on. AMD has no bf16 arithmetic: `raw` for integers, `dense` from 65 rows on;
- split-K: enough blocks for two per processor (four of two warps), at most 16 splits, every split
  at least one tile;
- warps: 4, one a scheduler; 8 where the compiled kernel would spill with 4; 2 for few rows (up to
  8, 16 or 32, by format) on sm_90 and sm_100: with 4 those take their newer matrix instructions,
  and bringing operands to where these want them costs more than the older ones do;
- stages: 4 while a stage is small, 3 from 64 rows on, 2 on AMD, fewer if shared memory says so.

None of it has been measured on a GPU yet.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from compressor_kernels.words import LAYOUTS, Kind, columns_a_plane

BLOCK_N = 128
PROCESSORS = {
    "sm_80": 108, "sm_86": 84, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_120": 170,
    "gfx942": 304, "gfx950": 256,
}  # fmt: skip
SHARED_BYTES = {
    "sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10,
    "gfx950": 160 << 10,
}  # fmt: skip
M_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
FORMS = ("group", "raw", "element", "dense")
DENSE_ROWS = 1024


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """Launch shape: rows of x a tile, K splits, warps, pipeline stages, form of the product."""

    block_m: int
    split_k: int
    num_warps: int
    num_stages: int
    form: str = "group"

    def __post_init__(self) -> None:
        for name in ("block_m", "split_k", "num_warps", "num_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.block_m & (self.block_m - 1):
            raise ValueError(f"block_m must be a power of two, got {self.block_m}")
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {FORMS}, got {self.form!r}")


@dataclass(frozen=True, slots=True)
class GemmSpec:
    """What a configuration depends on besides the machine and M: the weight, and the op."""

    kind: Kind
    group_size: int
    shape: tuple[int, int]
    has_zeros: bool = False
    scale_kind: str = "float"
    op: str = "dequant_gemm"

    @property
    def block_k(self) -> int:
        """Columns of a tile."""
        return columns_a_plane(self.kind, self.group_size) * LAYOUTS[self.kind].num_planes


def device_arch(device: torch.device) -> str:
    """Name such as sm_90 or gfx942, or cpu for the interpreter."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def tiles(shape: tuple[int, int], block_k: int) -> tuple[int, int]:
    """Tiles along N and K."""
    return -(-shape[0] // BLOCK_N), -(-shape[1] // block_k)


def m_bucket(rows: int) -> int:
    """The smallest bucket that holds `rows`; the last one holds everything above."""
    return next((bucket for bucket in M_BUCKETS if rows <= bucket), M_BUCKETS[-1])


def table_key(arch: str, spec: GemmSpec, rows: int) -> str:
    """Key of `configs.json`; an empty tensor counts as one row."""
    n, k = spec.shape
    zero = "a" if spec.has_zeros else ""
    place = f"{spec.group_size}{zero}/{n}x{k}"
    return f"{arch}/{spec.op}/{spec.kind}/{place}/{m_bucket(max(rows, 1))}"


def user_table_path() -> Path:
    """The table that `compress tune` writes on this machine."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "compressor" / "kernel_configs.json"


@cache
def table() -> dict[str, dict[str, Any]]:
    """The entries of `configs.json`, and over them those of the user's table."""
    shipped = files("compressor_kernels").joinpath("configs.json").read_text(encoding="utf-8")
    entries: dict[str, dict[str, Any]] = json.loads(shipped)["configs"]
    own = user_table_path()
    if own.is_file():
        entries |= json.loads(own.read_text(encoding="utf-8"))["configs"]
    return entries


def choose_config(arch: str, spec: GemmSpec, rows: int) -> KernelConfig:
    """Configuration for a weight and `rows` rows of x on `arch`."""
    entry = table().get(table_key(arch, spec, rows))
    return heuristic(arch, spec, rows) if entry is None else KernelConfig(**entry["config"])


def heuristic(arch: str, spec: GemmSpec, rows: int) -> KernelConfig:
    """The rule of the module docstring."""
    is_amd = arch.startswith("gfx")
    block_m = next((size for size in (8, 16, 32, 64) if rows <= size), 128)
    block_m = max(block_m, 16 if is_amd else 8)
    n_tiles, k_tiles = tiles(spec.shape, spec.block_k)
    blocks = n_tiles * -(-max(rows, 1) // block_m)
    warps = _warps(arch, spec, block_m)
    wanted = -(-(4 if warps == 2 else 2) * PROCESSORS.get(arch, 1) // blocks)
    split_k = max(1, min(16, k_tiles, wanted))
    stages = 2 if is_amd else 3 if block_m >= 64 else 4
    step = LAYOUTS[spec.kind].bits * 16 * spec.block_k + 2 * spec.block_k * block_m
    fitting = max(1, min(stages, SHARED_BYTES.get(arch, 99 << 10) // step))
    return KernelConfig(block_m, split_k, warps, fitting, usual_form(arch, spec, rows))


def _pair_rows(arch: str, spec: GemmSpec) -> int:
    """Rows of a tile up to which two warps on the older matrix instructions issue less."""
    if arch == "sm_90":
        return {"int3": 8, "e2m1": 32}.get(spec.kind, 16)
    if arch != "sm_100":
        return 0
    if spec.group_size == -1:
        return 32 if spec.kind == "int4" else 0
    if spec.kind == "e2m1" or (spec.kind == "int4" and spec.group_size >= 64):
        return 32
    return 8 if spec.kind == "int3" else 16


def _warps(arch: str, spec: GemmSpec, block_m: int) -> int:
    """4; 8 where the accumulators of 4 would not fit into registers; 2 where that issues less."""
    if block_m <= _pair_rows(arch, spec):
        return 2
    if block_m == 128 or (arch == "sm_100" and spec.kind == "int3"):
        return 8
    wide = ("e2m1", "int3") if arch.startswith("sm_12") else ("e2m1",)
    limit = 32 if spec.kind in wide else 64
    return 8 if arch.startswith(("sm_8", "sm_12")) and block_m >= limit else 4


def usual_form(arch: str, spec: GemmSpec, rows: int) -> str:
    """`group` unless the docstring says otherwise."""
    if arch.startswith("gfx"):
        few = "raw" if spec.kind.startswith("int") else "group"
        return few if rows <= 64 else "dense"
    if rows >= DENSE_ROWS and arch != "cpu":
        return "dense"
    if _needs_raw(arch, spec, rows):
        return "raw"
    return "element" if rows > _most_group_rows(arch, spec) else "group"


def _needs_raw(arch: str, spec: GemmSpec, rows: int) -> bool:
    """Whether `raw` fits into the time of the bytes and `group` does not."""
    has_many = spec.kind in ("int2", "int3")  # numbers a word
    if arch == "sm_90":
        return has_many and spec.group_size == 128 and 16 < rows <= 32
    may_need = has_many or (spec.kind == "int4" and (spec.has_zeros or rows > 8))
    pairs = arch == "sm_100" and spec.group_size != 16 and rows <= _pair_rows(arch, spec)
    return pairs and may_need


def _most_group_rows(arch: str, spec: GemmSpec) -> int:
    """Rows up to which a second accumulator for the group fits into the registers."""
    if spec.group_size == -1:
        return 64
    if spec.group_size == 16:
        return 0
    if (spec.kind, spec.group_size) == ("int4", 128) and arch not in ("sm_100", "sm_120"):
        return 64
    return 16 if spec.kind in ("int3", "e2m1") or arch == "sm_100" else 32
