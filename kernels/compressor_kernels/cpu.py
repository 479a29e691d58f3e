"""Linears with packed integer weights on the CPU.

Ways, chosen per layer by `dispatch.py` from what the processor can do:

- `native`: C kernels compiled on this machine (`native.py`), any width, groups of whole blocks of
  32 columns. Exact, or with activations rounded to eight bits. Where they cannot be compiled:
- `bit planes`: any width from 2 to 8 bits (`planes.py`). Each call dequantizes a few hundred rows
  at a time, so the temporary stays small and only the packed bytes are resident. Arithmetic is
  exact: s * (q - z) in float32.
- `byte rows`: the same for 2 and 4 bits by FBGEMM's embedding unpack, which turns codes into
  float32 q - 2^(b-1) in one pass (1.6 times faster than planes at one row, and as exact).
- `int4 op`: torch's `_weight_int4pack_mm_for_cpu`, for bf16 activations and few rows.
- `int8 op`: torch's `_weight_int8pack_mm`, the same for one scale a row.

The torch ops round x and y to bf16; with float32 activations they fall into reference loops that
are several times slower than dequantizing (figures: `bench/results/`, command in README.md). So
float32 activations always take the exact way.

Letters: O out features, I in features, G groups a row, M rows of x.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor_kernels import native
from compressor_kernels.planes import from_planes
from compressor_kernels.reference import expand_groups

CHUNK_ELEMENTS = 1 << 19  # dequantized floats alive at once: 2 MiB, fastest here of 2^16 ... 2^22
EXPANDED = 3 << 20  # the same at most for the C kernels, whose products are of one buffer
PAD = 16  # floats behind a row of that buffer, so that rows lie on different lines of the cache
SMALL_ROWS = 32  # the packed ops beat dequantizing up to here (bench/results)
MANY_ROWS = 160  # from here on MKL's product of dequantized rows beats the exact C kernel


def _flag(name: str) -> bool:
    probe: Callable[[], bool] | None = getattr(torch.cpu, name, None)
    return bool(probe()) if probe is not None else False


@cache
def has_fast_bf16() -> bool:
    """Whether bf16 matrix products run on bf16 hardware (AVX-512 BF16 or AMX).

    Without it torch emulates them: 1 GFLOP/s against 87 for float32 on an AVX2 machine.
    """
    return _flag("_is_avx512_bf16_supported") or _flag("_is_amx_tile_supported")


@cache
def has_packed_ops() -> bool:
    """Whether torch's packed int4/int8 products are vectorized on this processor."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _compute_dtype(x: Tensor) -> torch.dtype:
    """bf16 when x is and the device has bf16 products, else float32."""
    fast = x.device.type != "cpu" or has_fast_bf16()
    return x.dtype if x.dtype == torch.bfloat16 and fast else torch.float32


# ------------------------------------------------------------------ C kernels


def native_linear(
    resident: dict[str, Tensor], weight: native.Weight, *, rounds: bool
) -> Callable[[Tensor], Tensor]:
    """The product x [M, I] -> x @ w^T [M, O] of one weight."""
    product = native.Product(weight, resident, rounds=rounds)

    def apply(x: Tensor) -> Tensor:
        count = x.shape[0]
        if rounds or count < SMALL_ROWS or count < _many_rows(x):
            return product(x)
        return _expanded_linear(x, resident, weight)

    return apply


def _many_rows(x: Tensor) -> int:
    return MANY_ROWS if _compute_dtype(x) == torch.float32 else SMALL_ROWS


def _expanded_linear(x: Tensor, resident: dict[str, Tensor], weight: native.Weight) -> Tensor:
    """Many rows by torch's product with `EXPANDED` weights at a time, dequantized in C, in bf16
    where x and the processor have it."""
    compute = _compute_dtype(x)
    out_features, columns = weight.shape
    x_wide = x.to(compute)
    y = torch.empty((x.shape[0], out_features), dtype=compute)
    parts = -(-out_features * columns // EXPANDED)
    step = -(-out_features // parts // 64) * 64  # parts of one size, whole bands
    buffer = torch.empty((columns, step + PAD))
    for start in range(0, out_features, step):
        rows = range(start, min(start + step, out_features))
        dense = native.expanded(weight, resident, rows, buffer).to(compute)
        torch.mm(x_wide, dense, out=y[:, rows.start : rows.stop])
    return y.to(x.dtype)


# ------------------------------------------------------------------ exact, any width


def dequantize_rows(
    resident: dict[str, Tensor], rows: slice, *, bits: int, group_size: int, columns: int
) -> Tensor:
    """Float32 rows [R, I] of a weight in bit planes or byte rows: s * (q - z).

    For planes the subtraction is done in bytes: q - z fits a signed one except for asymmetric 8-bit
    codes, which subtract in float32.
    """
    scale = resident["scale"][rows].float()
    zeros = resident.get("zeros")
    if "rows" in resident:
        weight = unpack_byte_rows(resident["rows"][rows], bits)
        if zeros is not None:
            offset = zeros[rows].float() - (1 << (bits - 1))
            grouped, offset = by_group(weight, offset, group_size)
            grouped.sub_(offset)
        return scale_groups_(weight, scale, group_size)
    codes = from_planes(resident, bits, rows)[:, :columns]
    if zeros is None:
        weight = codes.sub_(1 << (bits - 1)).view(torch.int8).float()
    elif bits < 8:
        offset = expand_groups(zeros[rows], columns, group_size)
        weight = (codes - offset).view(torch.int8).float()
    else:
        weight = codes.float() - expand_groups(zeros[rows], columns, group_size).float()
    return scale_groups_(weight, scale, group_size)


def by_group(weight: Tensor, values: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """[R, I] and one value a group [R, G] as two views that broadcast against each other."""
    rows, columns = weight.shape
    if group_size == -1:
        return weight, values
    if columns % group_size:
        return weight, expand_groups(values, columns, group_size)
    return weight.view(rows, -1, group_size), values[:, :, None]


def scale_groups_(weight: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """Multiply [R, I] by one scale a group [R, G], in place."""
    grouped, factor = by_group(weight, scale, group_size)
    grouped.mul_(factor)
    return weight


def planes_linear(
    x: Tensor,
    resident: dict[str, Tensor],
    *,
    bits: int,
    group_size: int,
    shape: tuple[int, int],
) -> Tensor:
    """y = x @ w^T for x [M, I], dequantizing `CHUNK_ELEMENTS` weights at a time; [M, O].

    Computes in float32 unless x is bf16 and the processor has bf16 products. Scales and weights are
    rounded to the dtype of x, as in a dense model of that dtype, whatever the processor.
    """
    out_features, columns = shape
    compute = _compute_dtype(x)
    x_wide = x.to(compute)
    resident = {**resident, "scale": resident["scale"].to(x.dtype)}
    y = torch.empty((x.shape[0], out_features), dtype=compute, device=x.device)
    step = max(16, CHUNK_ELEMENTS // columns) if x.device.type == "cpu" else out_features
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        weight = dequantize_rows(resident, rows, bits=bits, group_size=group_size, columns=columns)
        y[:, rows] = F.linear(x_wide, weight.to(x.dtype).to(compute))
    return y.to(x.dtype)


# ------------------------------------------------------------------ byte rows for 2 and 4 bits

# FBGEMM's embedding unpack: bytes of codes and a pair (scale, bias) in fp16 -> code * scale + bias.
UNPACK_OPS = {2: "embedding_bag_2bit_unpack", 4: "embedding_bag_4bit_unpack"}


@cache
def unpacks_bytes(bits: int) -> bool:
    """Whether this torch build has the unpacking op for `bits` and it is exact for every code."""
    if bits not in UNPACK_OPS:
        return False
    codes = torch.arange(64, dtype=torch.uint8).remainder(1 << bits).view(2, 32)
    try:
        weight = unpack_byte_rows(pack_byte_rows(codes, bits), bits)
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(weight, codes.float() - (1 << (bits - 1)))


def unpack_byte_rows(rows: Tensor, bits: int) -> Tensor:
    """Float32 q - 2^(bits-1) [R, I] of byte rows [R, I*bits/8 + 4]."""
    op = getattr(torch.ops.quantized, UNPACK_OPS[bits])
    weight: Tensor = op(rows)
    return weight


def pack_byte_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [O, I] as the op wants them, uint8 [O, I*bits/8 + 4].

    A row is the packed stream, then fp16 scale 1 and bias -2^(bits-1). I must fill whole bytes.
    """
    fields = codes.view(codes.shape[0], -1, 8 // bits)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    stream = (fields << shifts).sum(-1, dtype=torch.uint8)
    tail = torch.tensor([1.0, -float(1 << (bits - 1))], dtype=torch.float16).view(torch.uint8)
    return torch.cat([stream, tail.expand(codes.shape[0], 4)], 1)


# ------------------------------------------------------------------ torch's packed products


def int4_op_takes(group_size: int, shape: tuple[int, int]) -> bool:
    """The shapes `_weight_int4pack_mm_for_cpu` has and that need no tail block."""
    return group_size in (32, 64, 128) and shape[0] % 64 == 0 and shape[1] % group_size == 0


def int8_op_takes(group_size: int, shape: tuple[int, int]) -> bool:
    """The shapes `_weight_int8pack_mm` is trusted with: one scale a row, sides of whole vectors.

    With (out, in) = (361, 172) and 3 rows it reads past its input and crashes (torch 2.13, AVX2).
    """
    return group_size == -1 and shape[0] % 64 == 0 and shape[1] % 64 == 0


def pack_int4_op(codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Resident form of a symmetric 4-bit weight for the int4 op.

    `words` uint8 [O, I/2] in the op's own order; `scale` bf16 [I/G, O, 2] holding (s, 0), since the
    op computes (q - 8) * s + z.
    """
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    pairs = torch.stack([scale.t(), torch.zeros_like(scale.t())], -1)
    return {"words": words, "scale": pairs.to(torch.bfloat16).contiguous()}


def unpack_int4_op(words: Tensor) -> Tensor:
    """Codes uint8 [O, I] from the op's order: blocks of B rows (32 on AVX2, 64 on AVX-512), and in
    a block, for each column, B/2 bytes holding rows n (low nibble) and n + B/2 (high nibble).
    """
    out_features, half_columns = words.shape
    columns = 2 * half_columns
    half = 32 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 16
    blocks = words.view(-1, columns, half)
    nibbles = torch.stack([blocks & 15, blocks >> 4], 1)  # [blocks, 2, I, B/2]
    return nibbles.permute(0, 1, 3, 2).reshape(out_features, columns)


@cache
def int4_order_is_known() -> bool:
    """Whether `unpack_int4_op` undoes this torch build's packing (checked on 128 x 64 codes)."""
    codes = (torch.arange(128 * 64, dtype=torch.int32) * 7 // 3 % 16).view(128, 64)
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return torch.equal(unpack_int4_op(words).to(torch.int32), codes)


def int4_op_linear(x: Tensor, resident: dict[str, Tensor], group_size: int) -> Tensor:
    """y = x @ w^T by the int4 op for few rows, else by dequantizing; x [M, I] bf16 -> [M, O]."""
    words, scale = resident["words"], resident["scale"]
    if x.dtype == torch.bfloat16 and x.shape[0] <= SMALL_ROWS:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), words, group_size, scale
        )
        return y
    compute = _compute_dtype(x)
    x_wide, factor = x.to(compute), scale[:, :, 0].t().float()
    y = torch.empty((x.shape[0], words.shape[0]), dtype=compute)
    step = max(64, CHUNK_ELEMENTS // x.shape[1] // 64 * 64)  # whole blocks of the op's order
    for start in range(0, words.shape[0], step):
        rows = slice(start, start + step)
        weight = unpack_int4_op(words[rows]).sub_(8).view(torch.int8).float()
        weight = scale_groups_(weight, factor[rows], group_size)
        y[:, rows] = F.linear(x_wide, weight.to(x.dtype).to(compute))
    return y.to(x.dtype)


def int8_op_linear(x: Tensor, resident: dict[str, Tensor]) -> Tensor:
    """y = (x @ q^T) * s for one scale a row, q int8 [O, I]; by the int8 op for few bf16 rows."""
    words, scale = resident["words"], resident["scale"]
    if x.dtype == torch.bfloat16 and x.shape[0] <= SMALL_ROWS and scale.dtype == torch.bfloat16:
        return torch._weight_int8pack_mm(x.contiguous(), words, scale)
    compute = _compute_dtype(x)
    x_wide, factor = x.to(compute), scale.to(compute)
    y = torch.empty((x.shape[0], words.shape[0]), dtype=compute)
    step = max(16, CHUNK_ELEMENTS // words.shape[1])
    for start in range(0, words.shape[0], step):
        rows = slice(start, start + step)
        y[:, rows] = F.linear(x_wide, words[rows].to(compute))
    return (y * factor).to(x.dtype)
