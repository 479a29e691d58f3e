"""Orthogonal changes of basis that spread an outlier channel over all channels.

A linear layer y = W x does not care in which basis x is written, as long as W knows:

    W x = (W R) (R^T x),      R R^T = I

With R close to a Hadamard matrix, one channel of size a becomes I channels of size a / sqrt(I):
weights and activations lose their outliers, and their grids get finer (QuaRot, arXiv 2404.00456;
QuIP#, 2402.04396). Row vectors are used throughout: activations x become x R.

    readers of the rotated stream    W <- W diag(g) R          g is the gain of the norm before them
    writers into it                  W <- R^T W,  b <- b R

An RMS norm without gain commutes with every R. A norm that subtracts the mean commutes with those R
that leave the vector of ones alone; `make_rotation(keep_mean=True)` gives one of them.

The fast transform of Sylvester's Hadamard matrix needs I log2(I) additions. A size that is no power
of two is split into its largest power of two and an odd rest, which a random orthogonal matrix
mixes: R = diag(signs) (Q (x) H).

# O out, I in, b power of two, m odd rest (I = m b)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["hadamard", "random"]
SMALLEST_POWER = 4  # below it Hadamard blocks spread nothing: a random matrix takes over
ROWS_AT_ONCE_ELEMENTS = 1 << 24  # fp64 numbers turned at once: 128 MiB


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """An orthogonal R [I, I]: signs, Hadamard blocks and their mixture, or a dense matrix.

    size: I.
    signs: [I] of -1 and 1, fp64; None if R is dense.
    mixture: [m, m] orthogonal fp64 between Hadamard blocks; None for one block.
    dense: [I, I] orthogonal fp64; None if R is made of Hadamard blocks.
    """

    size: int
    signs: Tensor | None = None
    mixture: Tensor | None = None
    dense: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """x R for x [..., I], computed in fp64 and given back in the dtype of x."""
        rows = x.reshape(-1, self.size)
        step = max(1, ROWS_AT_ONCE_ELEMENTS // self.size)
        parts = [self._turn(part.double()).to(x.dtype) for part in torch.split(rows, step)]
        return torch.cat(parts).reshape(x.shape)

    def matrix(self) -> Tensor:
        """R itself, fp64 [I, I]."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))

    def _turn(self, rows: Tensor) -> Tensor:
        if self.dense is not None:
            return rows @ self.dense.to(rows.device)
        assert self.signs is not None, "a rotation is either dense or made of Hadamard blocks"
        signed = rows * self.signs.to(rows.device)
        if self.mixture is None:
            return hadamard_transform(signed)
        blocks = signed.view(len(rows), len(self.mixture), -1)
        mixed = torch.einsum("tmb,mn->tnb", blocks, self.mixture.to(rows.device))
        return hadamard_transform(mixed).reshape(rows.shape)


def hadamard_transform(x: Tensor) -> Tensor:
    """x H / sqrt(b) along the last dimension [..., b], b a power of two; its own inverse.

    Raises ValueError for other sizes.
    """
    size = x.shape[-1]
    if size & (size - 1) or not size:
        raise ValueError(f"{size} is not a power of two")
    out, half = x.reshape(-1, size), 1
    while half < size:
        pairs = out.view(-1, size // (2 * half), 2, half)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        out = torch.stack((low + high, low - high), dim=2).reshape(-1, size)
        half *= 2
    return (out / math.sqrt(size)).reshape(x.shape)


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix fp64 [I, I], uniform over all of them (QR of Gaussian numbers)."""
    gaussian = torch.randn(size, size, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(gaussian)
    signed: Tensor = q * r.diagonal().sign()
    return signed


def make_rotation(size: int, kind: Kind, *, seed: int, keep_mean: bool = False) -> Rotation:
    """The rotation of I channels that a seed stands for.

    Args:
        size: I.
        kind: "hadamard" (random signs and fast) or "random" (uniform, dense).
        seed: the same seed gives the same rotation.
        keep_mean: leave the vector of ones alone (always dense and random).
    """
    generator = torch.Generator().manual_seed(seed)
    if keep_mean:
        return Rotation(size, dense=_around_ones(size, generator))
    power = size & -size
    if kind == "random" or power < SMALLEST_POWER:
        return Rotation(size, dense=random_orthogonal(size, generator))
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    odd = size // power
    mixture = random_orthogonal(odd, generator) if odd > 1 else None
    return Rotation(size, signs, mixture)


def _around_ones(size: int, generator: torch.Generator) -> Tensor:
    """U diag(1, Q) U: reflection U swaps ones / sqrt(I) and the first axis, Q turns the rest."""
    axis = torch.full((size,), -1 / math.sqrt(size), dtype=torch.float64)
    axis[0] += 1
    eye = torch.eye(size, dtype=torch.float64)
    reflection = eye - 2 * torch.outer(axis, axis) / axis.square().sum()
    inner = eye.clone()
    inner[1:, 1:] = random_orthogonal(size - 1, generator)
    return reflection @ inner @ reflection
