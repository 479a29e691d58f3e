"""Channel scales that move size from activations into weights, without changing the product.

    W x = (W diag(s)) (diag(s)^-1 x),      s > 0, one number for each input channel

The inverse goes into whatever makes x: the gain of a norm, the rows of a linear. A channel with
large activations then gets larger weights, which the grid rounds with a smaller relative error.

    AWQ          s_j = a_j^r  or  a_j^r / u_j^(1-r),     a_j size of x_j, u_j size of column j;
                 r by search: least tr(dW H dW^T) with dW = Q(W diag(s)) diag(s)^-1 - W
    SmoothQuant  s_j = max|x_j|^alpha / max|w_j|^(1-alpha)

AWQ: arXiv 2306.00978; SmoothQuant: 2211.10438. Every candidate is compared with s = 1, so a search
never returns scales that are worse on the statistics it was given. A symmetric or asymmetric grid
is blind to a common factor, so scales are centred: sqrt(max s * min s) = 1.

# O out, I in
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SMALLEST, LARGEST = 1e-4, 1e4
SEARCH_ROWS = 512  # rows of a weight that a search looks at; the winner is checked on all

RoundTrip = Callable[[Tensor], Tensor]  # weights -> the nearest weights of their grid


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """A weight [O, I] whose columns are scaled, and H [I, I] = sum of x x^T of what it reads."""

    weight: Tensor
    hessian: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Channels:
    """Sizes [C] of channels and of the columns that read them; `spread` takes [C] to columns [I].

    C is I, except where several heads read one channel.
    """

    activation: Tensor
    weight: Tensor
    spread: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Scales [C], the exponent they came from, and the output error with and without them."""

    scales: Tensor
    exponent: float
    with_weights: bool
    error: float
    error_before: float


def awq_scales(activation: Tensor, exponent: float, *, weight: Tensor | None = None) -> Tensor:
    """s = a^r, or a^r / u^(1-r) if the weights' sizes are given; a, u [I] >= 0, centred.

    Exponent 0 without weights is s = 1.
    """
    scales = _positive(activation) ** exponent
    if weight is not None:
        scales = scales / _positive(weight) ** (1 - exponent)
    return centred(scales)


def smoothquant_scales(activation: Tensor, weight: Tensor, *, alpha: float) -> Tensor:
    """s = a^alpha / u^(1-alpha) for absolute maxima a, u [I] of channels and columns.

    A channel or column that is always zero keeps s = 1.
    """
    scales = _positive(activation) ** alpha / _positive(weight) ** (1 - alpha)
    idle = (activation <= 0) | (weight <= 0)
    return torch.where(idle, torch.ones_like(scales), scales).clamp(SMALLEST, LARGEST)


def power_of_two(scales: Tensor) -> Tensor:
    """The nearest powers of two: scaling by them is exact in every binary floating-point dtype."""
    return torch.exp2(torch.round(torch.log2(scales)))


def centred(scales: Tensor) -> Tensor:
    """Scales with sqrt(max * min) = 1, inside [1e-4, 1e4]."""
    middle = (scales.max() * scales.min()).sqrt()
    return (scales / middle).clamp(SMALLEST, LARGEST)


def output_error(readers: Sequence[Reader], scales: Tensor, round_trip: RoundTrip) -> float:
    """sum over readers of tr(dW H dW^T) for scales [I]."""
    total = 0.0
    for reader in readers:
        change = round_trip(reader.weight * scales) / scales - reader.weight
        total += float(((change @ reader.hessian) * change).sum())
    return total


def search_scales(
    readers: Sequence[Reader],
    channels: Channels,
    *,
    round_trip: RoundTrip,
    grid_points: int,
    exact: bool = False,
) -> Choice:
    """The scales with the smallest output error among AWQ's family and s = 1.

    Args:
        readers: the weights that read the scaled channels.
        channels: their sizes (any norm over tokens) and who reads which.
        round_trip: the quantizer, for a part of the rows as well as for all.
        grid_points: exponents tried between 0 and 1.
        exact: allow powers of two only.
    """
    sample = [Reader(_some_rows(r.weight), r.hessian) for r in readers]
    ones = torch.ones_like(channels.activation)
    best = Choice(ones, 0.0, False, output_error(sample, channels.spread(ones), round_trip), 0.0)
    for exponent, with_weights, scales in _candidates(channels, grid_points):
        allowed = power_of_two(scales) if exact else scales
        error = output_error(sample, channels.spread(allowed), round_trip)
        if error < best.error:
            best = Choice(allowed, exponent, with_weights, error, 0.0)
    before = output_error(readers, channels.spread(ones), round_trip)
    after = output_error(readers, channels.spread(best.scales), round_trip)
    if after < before:
        return replace(best, error=after, error_before=before)
    return Choice(ones, 0.0, False, before, before)


def _candidates(channels: Channels, grid_points: int) -> Iterator[tuple[float, bool, Tensor]]:
    """Exponents, whether weights count, and the scales that follow."""
    for step in range(1, grid_points + 1):
        exponent = step / grid_points
        yield exponent, False, awq_scales(channels.activation, exponent)
        if exponent < 1:
            yield exponent, True, awq_scales(channels.activation, exponent, weight=channels.weight)


def _some_rows(weight: Tensor) -> Tensor:
    """At most SEARCH_ROWS rows, evenly spread."""
    step = max(1, len(weight) // SEARCH_ROWS)
    return weight[::step]


def _positive(size: Tensor) -> Tensor:
    """Sizes relative to their mean, never below 1e-4."""
    return (size / size.mean().clamp(min=1e-30)).clamp(min=SMALLEST)
