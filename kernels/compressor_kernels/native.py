"""The C kernels: compiled at first use by the system's compiler, loaded with ctypes.

`native/*.c` becomes one shared library in the user's cache, named by a digest of the sources, the
flags, the compiler's version and the processor's features; nothing is compiled twice, and a cache
shared by different machines is safe. The library is compiled under a name of its own and renamed,
so processes may race. Where anything is missing, `library()` is None, `reason()` says why, and
torch's operations compute instead. `COMPRESSOR_NATIVE=0` switches it off; `CC` names a compiler.

The library takes part in torch's OpenMP pool: both need the shared object called libgomp, and the
loader maps it once. `torch.set_num_threads` therefore holds for both.

Letters: O out features, I in features, G groups a row, M rows of x.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor_kernels.reference import dequantize, pack_codes

SOURCES = Path(__file__).parent / "native"
SWITCH = "COMPRESSOR_NATIVE"
BLOCK = 32  # columns that share the scale of rounded activations
SCALE_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
COMPILE_SECONDS = 300
log = logging.getLogger(__name__)

POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class WeightStruct(ctypes.Structure):
    """`Weight` of linear.h; it points into tensors that must outlive it."""

    _fields_ = (
        *((name, POINTER) for name in ("stream", "scale", "zeros", "bias")),
        *((name, LONG) for name in ("rows", "columns", "blocks", "group_blocks")),
        *((name, INT) for name in ("bits", "scale_kind")),
    )


_SIGNATURES = {
    "linear": [POINTER, POINTER, LONG, POINTER, POINTER, INT],
    "expand": [POINTER, LONG, LONG, LONG, POINTER],
    "pack": [POINTER, POINTER, LONG, LONG, LONG, INT],
    "block_in": [POINTER, POINTER, LONG, *[POINTER] * 6, INT],
    "block_out": [POINTER, POINTER, POINTER, LONG, POINTER, POINTER, INT],
    "round_columns": [POINTER],
    "group_errors": [POINTER],
    "group_scales": [POINTER],
    "learned_values": [POINTER],
    "learned_gradients": [POINTER],
    "attend_rows": [POINTER],
    "attend": [*[POINTER] * 8, ctypes.c_float],
    "decode": [POINTER, LONG, POINTER, LONG, *[POINTER] * 4, LONG, POINTER, INT],
}


@dataclass(frozen=True, slots=True)
class Built:
    """The library, or why there is none."""

    library: ctypes.CDLL | None
    reason: str


def library() -> ctypes.CDLL | None:
    """The loaded kernels; None when this machine has none."""
    return built().library


def reason() -> str:
    """One line about what `library()` is."""
    return built().reason


@cache
def built() -> Built:
    """Compile if needed, load, and check one product against the reference."""
    if os.environ.get(SWITCH, "1") == "0":
        return Built(None, f"switched off by {SWITCH}=0")
    try:
        file = compiled()
        found = _declare(ctypes.CDLL(str(file)))
    except (OSError, ValueError, subprocess.SubprocessError, AttributeError) as error:
        log.warning("no C kernels, torch computes instead: %s", error)
        return Built(None, f"not available: {error}")
    if not _is_right(found):
        log.warning("the C kernels in %s are wrong on this machine and are not used", file)
        return Built(None, f"{file.name} gives wrong products here")
    return Built(found, f"{found.isa().decode()}, {file.name}")


def compiled() -> Path:
    """The shared library of these sources for this machine, compiled if it is not in the cache.

    Raises OSError without a compiler or a private cache folder, ValueError with the compiler's
    complaint, subprocess.TimeoutExpired.
    """
    compiler = _compiler()
    folder = cache_folder()
    file = folder / f"{digest(compiler)}.so"
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / file.name
            _compile(compiler, made)
            made.replace(file)
    return file


def cache_folder() -> Path:
    """Where libraries are kept, ours alone; OSError when others could put files there."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "compressor" / "native"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    stat = folder.stat()
    if hasattr(os, "getuid") and (stat.st_uid != os.getuid() or stat.st_mode & 0o022):
        raise PermissionError(f"{folder} can be written by others: run chmod 700 on it")
    return folder


def digest(compiler: list[str]) -> str:
    """Names what goes into a library: sources, command, compiler version, processor."""
    version = subprocess.run(
        [compiler[0], "--version"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    parts = [*compiler, version, processor()]
    parts += [f.name + f.read_text(encoding="utf-8") for f in sorted(SOURCES.iterdir())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@cache
def processor() -> str:
    """What tells processors with different instructions apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    known = ("vendor_id", "model name", "flags", "Features", "CPU part")
    told = sorted({line for line in lines if line.startswith(known)})
    return "\n".join([platform.machine(), platform.processor(), *told])


def _compiler() -> list[str]:
    """The command up to the files; OSError when there is no compiler."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        found = shutil.which(name) if name else None
        if found:
            tune = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
            return [found, "-std=gnu11", "-O3", tune, "-Wno-psabi", "-shared", "-fPIC"]
    raise FileNotFoundError("no C compiler (cc, gcc or clang) in PATH")


def _compile(compiler: list[str], out: Path) -> None:
    """Compile with OpenMP, else without threads."""
    files = sorted(str(f) for f in SOURCES.glob("*.c"))
    for extra in (["-fopenmp"], []):
        command = [*compiler, *extra, *files, "-o", str(out), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        if done.returncode == 0:
            return
    raise ValueError(f"{' '.join(command)}: {done.stderr.strip()[:400]}")


def _declare(found: ctypes.CDLL) -> ctypes.CDLL:
    found.isa.restype = ctypes.c_char_p
    for name, arguments in _SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, None
    return found


def _is_right(found: ctypes.CDLL) -> bool:
    """Whether this build computes small 4-bit products as the reference does."""
    codes = (torch.arange(40 * 96) * 7 // 3 % 16).view(40, 96).to(torch.uint8)
    scale = torch.linspace(0.01, 0.02, 40 * 3).view(40, 3)
    x = torch.linspace(-1, 1, 9 * 96).view(9, 96)
    weight = Weight(4, 32, (40, 96))
    resident = _lay_out(found, weight, pack_codes(codes, 4), scale)
    exact = x @ dequantize(codes, scale, 8.0, 32).t()
    for rounds in (False, True):
        product = Product(weight, resident, rounds=rounds, found=found)
        for rows in (1, 9):  # one row has a way of its own
            if not (product(x[:rows]) - exact[:rows]).norm() < 0.01 * exact[:rows].norm():
                return False
    return True


# ------------------------------------------------------------------ linears

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Weight:
    """What the kernels must know of a weight: bits, columns a scale (-1: all), (O, I)."""

    bits: int
    group_size: int
    shape: tuple[int, int]

    @property
    def blocks(self) -> int:
        return -(-self.shape[1] // BLOCK)


def takes(bits: int, group_size: int) -> bool:
    """Whether a scale belongs to whole blocks."""
    return 2 <= bits <= 8 and (group_size == -1 or group_size % BLOCK == 0)


def lay_out(weight: Weight, packed: Tensor, scale: Tensor, zeros: Tensor | None) -> Tensors:
    """The resident form of a checkpoint's weight: `stream`, `scale` and, if asymmetric, `zeros`.

    packed: int32 [O, words]; scale: [O, G]; zeros: uint8 [O, G] or None. The bytes are those of
    the checkpoint, with O padded to whole bands and I to whole blocks.
    """
    return _lay_out(needed(), weight, packed, scale, zeros)


class Product:
    """y = x @ w^T: x [M, I] -> [M, O], in float32 inside; the dtype of x comes back.

    Made once for a weight: naming its tensors to C takes longer than reading a small one.
    """

    def __init__(
        self, weight: Weight, resident: Tensors, *, rounds: bool, found: ctypes.CDLL | None = None
    ) -> None:
        """Point C at the weight.

        Args:
            weight: bits, groups, shape.
            resident: from `lay_out`; kept alive.
            rounds: x is rounded to eight bits in blocks of 32 columns (a scale each), else exact.
            found: the library, if it is not this machine's.
        """
        self._resident, self._rows, self._rounds = resident, weight.shape[0], rounds
        self._weight = ctypes.byref(weight_struct(weight, resident))
        self._work_bytes = work_bytes(weight, 1, rounds=rounds)
        library = found or needed()
        self._linear, self._spare = library.linear, library.spare_bytes()

    def __call__(self, x: Tensor) -> Tensor:
        """One product; callers may be in several threads."""
        is_ready = x.dtype is torch.float32 and x.is_contiguous()
        wide = x if is_ready else x.float().contiguous()
        count = wide.shape[0]
        y = torch.empty((count, self._rows))
        nbytes, place = count * self._work_bytes, None
        if nbytes > self._spare:  # few rows take scratch of C's own
            work = torch.empty(nbytes, dtype=torch.uint8)
            place = work.data_ptr()
        self._linear(self._weight, wide.data_ptr(), count, y.data_ptr(), place, self._rounds)
        return y if is_ready else y.to(x.dtype)


def expanded(weight: Weight, resident: Tensors, rows: range, out: Tensor) -> Tensor:
    """Float32 w^T [I, R] of R rows, from a multiple of 64 on, written into `out`.

    `out` [I, W] is float32 and contiguous and holds whole bands of rows. W should be no power of
    two, or its rows fall on the same lines of the cache.
    """
    found = needed()
    lanes: int = found.lanes()
    bands = -(-len(rows) // lanes)
    struct, first = weight_struct(weight, resident), rows.start // lanes
    found.expand(ctypes.byref(struct), first, bands, out.shape[1], out.data_ptr())
    return out[:, : len(rows)]


def weight_struct(weight: Weight, resident: Tensors, bias: Tensor | None = None) -> WeightStruct:
    """The C view of a resident weight; `bias` is float32 [O] and contiguous."""
    zeros = resident.get("zeros")
    group_blocks = weight.blocks if weight.group_size == -1 else weight.group_size // BLOCK
    return WeightStruct(
        resident["stream"].data_ptr(), resident["scale"].data_ptr(),
        None if zeros is None else zeros.data_ptr(), None if bias is None else bias.data_ptr(),
        *weight.shape, weight.blocks, group_blocks, weight.bits,
        SCALE_KINDS[resident["scale"].dtype],
    )  # fmt: skip


def work_bytes(weight: Weight, count: int, *, rounds: bool) -> int:
    """Scratch that a product with `count` rows needs."""
    return count * weight.blocks * (40 if rounds else 132)


def needed() -> ctypes.CDLL:
    found = library()
    if found is None:
        raise RuntimeError(f"the C kernels are {reason()}")
    return found


def _lay_out(
    found: ctypes.CDLL, weight: Weight, packed: Tensor, scale: Tensor, zeros: Tensor | None = None
) -> Tensors:
    lanes: int = found.lanes()
    out_features, columns = weight.shape
    bands, packed = -(-out_features // lanes), packed.contiguous()
    stream = torch.empty(bands * weight.blocks * weight.bits * lanes * 4, dtype=torch.uint8)
    found.pack(
        packed.data_ptr(), stream.data_ptr(), packed.shape[1], out_features, columns, weight.bits
    )
    scale = scale if scale.dtype in SCALE_KINDS else scale.float()
    resident = {"stream": stream, "scale": _by_band(scale, lanes)}
    return resident if zeros is None else resident | {"zeros": _by_band(zeros, lanes)}


def _by_band(values: Tensor, lanes: int) -> Tensor:
    """[O, G] -> [bands, G, lanes]; rows of padding get 0."""
    padded = F.pad(values, (0, 0, 0, -values.shape[0] % lanes))
    return padded.view(-1, lanes, values.shape[1]).transpose(1, 2).contiguous()
