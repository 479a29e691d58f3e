"""Every kernel in plain PyTorch: the specification that the fast versions are tested against.

A quantized linear stores unsigned codes q, scales s and zero points z; a weight is

    w[o, i] = s[o, g] * (q[o, i] - z[o, g]),    g = i // group_size

with z = 2^(bits-1) for symmetric formats and group_size -1 for one group a row. In a
compressed-tensors checkpoint (`pack-quantized`) the codes of a row are one least-significant-bit
first stream of `bits`-wide fields, cut into 32-bit little-endian words; zero points are packed the
same way, but along the output dimension.

Letters: O out features, I in features, G groups a row, M rows of x (tokens), b bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FIELDS_A_CYCLE = 32  # 32 codes of b bits fill exactly b words, so the bit layout repeats


def num_groups(in_features: int, group_size: int) -> int:
    """Groups a row has; the last one may be short."""
    return 1 if group_size == -1 else -(-in_features // group_size)


def unpack_codes(packed: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """Read unsigned codes uint8 [O, I] from packed int32 [O, ceil(I*bits/32)].

    Raises ValueError when `packed` does not have the shape that (O, I) at `bits` needs.
    """
    rows, columns = shape
    expected = (rows, -(-columns * bits // 32))
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    if tuple(packed.shape) != expected:
        raise ValueError(
            f"packed codes have shape {tuple(packed.shape)}; "
            f"{rows} x {columns} codes of {bits} bits need {expected}"
        )
    cycles = -(-columns // FIELDS_A_CYCLE)
    words = F.pad(packed, (0, cycles * bits - packed.shape[1]))
    words = words.view(rows, cycles, bits).to(torch.int64) & 0xFFFFFFFF
    codes = torch.empty((rows, cycles, FIELDS_A_CYCLE), dtype=torch.uint8, device=packed.device)
    for field in range(FIELDS_A_CYCLE):
        word, shift = divmod(field * bits, 32)
        value = words[:, :, word] >> shift
        if shift + bits > 32:
            value = value | (words[:, :, word + 1] << (32 - shift))
        codes[:, :, field] = (value & ((1 << bits) - 1)).to(torch.uint8)
    return codes.view(rows, -1)[:, :columns].contiguous()


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Write unsigned codes [O, I] as int32 [O, ceil(I*bits/32)]; the inverse of `unpack_codes`."""
    rows, columns = codes.shape
    cycles = -(-columns // FIELDS_A_CYCLE)
    fields = F.pad(codes.to(torch.int64), (0, cycles * FIELDS_A_CYCLE - columns))
    fields = fields.view(rows, cycles, FIELDS_A_CYCLE)
    words = torch.zeros((rows, cycles, bits), dtype=torch.int64, device=codes.device)
    for field in range(FIELDS_A_CYCLE):
        word, shift = divmod(field * bits, 32)
        words[:, :, word] |= fields[:, :, field] << shift
        if shift + bits > 32:
            words[:, :, word + 1] |= fields[:, :, field] >> (32 - shift)
    words = words & 0xFFFFFFFF
    signed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return signed.view(rows, -1)[:, : -(-columns * bits // 32)].contiguous()


def unpack_zero_point(packed: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """Read zero points uint8 [O, G] from int32 [ceil(O*bits/32), G] (packed along the output)."""
    rows, groups = shape
    return unpack_codes(packed.t().contiguous(), bits, (groups, rows)).t().contiguous()


def pack_zero_point(zero_point: Tensor, bits: int) -> Tensor:
    """Write zero points [O, G] as int32 [ceil(O*bits/32), G]."""
    return pack_codes(zero_point.t().contiguous(), bits).t().contiguous()


def expand_groups(values: Tensor, in_features: int, group_size: int) -> Tensor:
    """Repeat one value a group [O, G] over the columns of the group: [O, I]."""
    if group_size == -1:
        return values.expand(values.shape[0], in_features)
    return values.repeat_interleave(group_size, dim=1)[:, :in_features]


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | float, group_size: int) -> Tensor:
    """w = s * (q - z) in float32 (float64 if `scale` is float64): [O, I].

    codes: unsigned [O, I]; scale: [O, G]; zero_point: [O, G], or one number for all groups.
    """
    wide = torch.float64 if scale.dtype == torch.float64 else torch.float32
    columns = codes.shape[1]
    offset: Tensor | float = zero_point
    if isinstance(zero_point, Tensor):
        offset = expand_groups(zero_point.to(wide), columns, group_size)
    return (codes.to(wide) - offset) * expand_groups(scale.to(wide), columns, group_size)


def dequantize_checkpoint(tensors: dict[str, Tensor], bits: int, group_size: int) -> Tensor:
    """Dense float32 [O, I] of a checkpoint layer (`weight_packed`, `weight_scale`, ...)."""
    codes, scale, zero_point = read_checkpoint(tensors, bits, group_size)
    return dequantize(
        codes, scale, float(1 << (bits - 1)) if zero_point is None else zero_point, group_size
    )


def read_checkpoint(
    tensors: dict[str, Tensor], bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes uint8 [O, I], scale [O, G] and zero point uint8 [O, G] (None: symmetric)."""
    rows, columns = (int(value) for value in tensors["weight_shape"].tolist())
    groups = num_groups(columns, group_size)
    codes = unpack_codes(tensors["weight_packed"], bits, (rows, columns))
    scale = tensors["weight_scale"]
    if tuple(scale.shape) != (rows, groups):
        raise ValueError(f"weight_scale has shape {tuple(scale.shape)}, not {(rows, groups)}")
    packed_zero = tensors.get("weight_zero_point")
    if packed_zero is None:
        return codes, scale, None
    return codes, scale, unpack_zero_point(packed_zero, bits, (rows, groups))


def dequant_gemm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x @ w^T (+ bias), accumulated in float32: [M, I] x [O, I] -> [M, O] in x.dtype.

    `weight` is the dequantized matrix; float64 inputs stay float64, which gives the oracle.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide) @ weight.to(wide).t()
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype)


def group_sums(x: Tensor, group_size: int) -> Tensor:
    """Sums of x over each group of columns, float32 [G, M]."""
    rows, columns = x.shape
    size = columns if group_size == -1 else group_size
    padded = F.pad(x.float(), (0, -columns % size))
    return padded.view(rows, -1, size).sum(-1).t().contiguous()


# ------------------------------------------------------------------ floating-point formats

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # code & 7; bit 3 is the sign


def float_levels(bits: int) -> Tensor:
    """The number every code stands for, float32 [2^bits]: e2m1 at 4 bits, e4m3 at 8.

    e4m3 without infinities (OCP FP8): sign, 4 exponent bits of bias 7, 3 mantissa bits; an exponent
    of 0 is subnormal, S.1111.111 is NaN.
    """
    if bits == 4:
        positive = torch.tensor(E2M1)
        return torch.cat([positive, -positive])
    codes = torch.arange(128)
    exponent, mantissa = codes >> 3, (codes & 7).float() / 8
    normal = (1 + mantissa) * torch.exp2(exponent.float() - 7)
    positive = torch.where(exponent == 0, mantissa * 2.0**-6, normal)
    positive[127] = float("nan")
    return torch.cat([positive, -positive])


def unpack_nibbles(packed: Tensor) -> Tensor:
    """4-bit codes uint8 [O, I] from bytes uint8 [O, I/2]; the low nibble comes first."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


def pack_nibbles(codes: Tensor) -> Tensor:
    """The inverse of `unpack_nibbles`; the number of columns is even."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def power_of_two(exponents: Tensor) -> Tensor:
    """E8M0 scales: uint8 e -> float32 2^(e - 127), exact down to the subnormal 2^-127."""
    return torch.ldexp(torch.ones(exponents.shape), exponents.to(torch.int32) - 127)


def float_scales(tensors: dict[str, Tensor], stored: str) -> Tensor:
    """What a level is multiplied with, float32, one value for each group or block."""
    scale = tensors["weight_scale"]
    if stored == "mxfp4-pack-quantized":
        return power_of_two(scale)
    if stored == "nvfp4-pack-quantized":
        return scale.float() / tensors["weight_global_scale"].float()
    return scale.float()


def dequantize_stored(
    tensors: dict[str, Tensor], *, stored: str, group_size: int, block: int = 0
) -> Tensor:
    """Dense float32 [O, I] of a layer that is not `pack-quantized`.

    stored: "int-quantized" and "float-quantized" keep `weight` (int8, e4m3) and a scale for each
    row or block; "nvfp4-pack-quantized" and "mxfp4-pack-quantized" keep two e2m1 codes a byte.
    """
    scale = float_scales(tensors, stored)
    if stored == "int-quantized":
        weight = tensors["weight"].float()
    elif stored == "float-quantized":
        weight = float_levels(8)[tensors["weight"].view(torch.uint8).int()]
    else:
        weight = float_levels(4)[unpack_nibbles(tensors["weight_packed"]).int()]
    if block:
        scale = scale.repeat_interleave(block, dim=0)[: weight.shape[0]]
        group_size = block
    return weight * expand_groups(scale, weight.shape[1], group_size)


# ------------------------------------------------------------------ the other operations


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 or wider."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [M, K] -> q in int8 or e4m3 and scales float32 [M], max|x| at the top of the range.

    The range of int8 is -127.5 to 127.5, rounded to -128 .. 127, as compressed-tensors has it.
    """
    top = 127.5 if dtype == torch.int8 else 448.0
    highest = x.float().abs().amax(-1)
    scale = torch.where(highest > 0, highest / top, torch.ones_like(highest))
    ratio = (x.float() / scale[:, None]).clamp(-top, top)
    rounded = ratio.round().clamp(max=127) if dtype == torch.int8 else ratio
    return rounded.to(dtype), scale


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None = None
) -> Tensor:
    """One query token of one sequence: q [H, E], keys and values [L, K, E] -> [H, E] float64."""
    begin = 0 if window is None else max(0, keys.shape[0] - window)
    repeat = q.shape[0] // keys.shape[1]
    k = keys[begin:].double().repeat_interleave(repeat, dim=1)
    v = values[begin:].double().repeat_interleave(repeat, dim=1)
    weights = (torch.einsum("he,lhe->hl", q.double(), k) * scale).softmax(-1)
    return torch.einsum("hl,lhe->he", weights, v)


def moe_dequant_gemm(x: Tensor, weights: Tensor, chosen: Tensor, routing: Tensor) -> Tensor:
    """y[i] = routing[i] * x[i / top_k] @ weights[chosen[i]]^T: weights [experts, N, K]."""
    rows = x.repeat_interleave(chosen.shape[1], dim=0)
    products = torch.einsum("ik,ink->in", rows.double(), weights.double()[chosen.flatten()])
    return products * routing.double()[:, None]
