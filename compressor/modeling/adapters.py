"""Adapters of low rank: a dense linear that learns few numbers (LoRA, arXiv 2106.09685).

    W' = W + keep * (alpha / R) B A        A [R, I] random, B [O, R] zero: it starts at W

Factors are trained, W is not; W' is what the layer computes with, rounded to the stored dtype and
with pruned weights at zero. So it is merged at every step, and what is stored is an ordinary
weight. Rounding passes gradients straight through.

Legend: O out, I in, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.algorithms import products
from compressor.modeling.linears import StoredLinear


@dataclass(frozen=True, slots=True)
class Adapter:
    """Size of an adapter: its rank, what its product is multiplied with, and where A comes from."""

    rank: int
    factor: float
    generator: torch.Generator


Adapters = Callable[[int, str], Adapter | None]  # of a linear: position of its block, name


class AdaptedLinear(nn.Module):
    """A dense linear with an adapter; the only parameter that learns is `factors` [R, I + O]."""

    weight: Tensor
    keep: Tensor | None

    def __init__(self, linear: StoredLinear, adapter: Adapter, *, masked: bool) -> None:
        super().__init__()
        weight = linear.dense().clone()
        self.register_buffer("weight", weight)
        self.register_buffer("keep", weight != 0 if masked else None)
        a = torch.rand(adapter.rank, weight.shape[1], generator=adapter.generator)
        b = torch.zeros(adapter.rank, weight.shape[0])
        factors = torch.cat([(2 * a - 1) / weight.shape[1] ** 0.5, b], dim=1)
        self.factors = nn.Parameter(factors, requires_grad=False)
        bias = None if linear.bias is None else linear.bias.float().clone()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.factor, self.dtype = adapter.factor, linear.stored.dtype

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return products.linear(x, self.merged(), self.bias)

    def merged(self) -> Tensor:
        """The weight fp32 [O, I] as it would be stored, differentiable in the factors."""
        inputs = self.weight.shape[1]
        change = self.factors[:, inputs:].mT @ self.factors[:, :inputs] * self.factor
        exact: Tensor = self.weight + (change if self.keep is None else change * self.keep)
        if self.dtype == torch.float32:
            return exact
        known = exact.detach()
        rounded: Tensor = exact + (known.to(self.dtype).to(known.dtype) - known)
        return rounded

    def exported_weight(self) -> Tensor:
        """The same without a graph."""
        return self.merged().detach()
