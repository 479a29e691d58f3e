"""Channel scales: identities, exactness, and a search that is never worse than no scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.algorithms.grid import dequantize, minmax_grid, quantize
from compressor.algorithms.scaling import (
    Channels,
    Reader,
    awq_scales,
    output_error,
    power_of_two,
    search_scales,
    smoothquant_scales,
)


def round_trip(weight: Tensor) -> Tensor:
    grid = minmax_grid(weight, bits=4, group_size=32, symmetric=True)
    return dequantize(quantize(weight, grid), grid)


def layer(seed: int, *, outlier: float = 1.0) -> tuple[Reader, Channels, Tensor]:
    """A weight, its inputs' H and sizes; channel 3 is `outlier` times as large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 64, generator=generator)
    x[:, 3] *= outlier
    weight = torch.randn(48, 64, generator=generator)
    weight[:, 3] /= outlier
    channels = Channels(x.abs().mean(0), weight.abs().mean(0), lambda s: s)
    return Reader(weight, x.T @ x / len(x)), channels, x


def test_exponent_zero_is_no_scaling() -> None:
    torch.testing.assert_close(awq_scales(torch.rand(9) + 0.1, 0.0), torch.ones(9))


def test_scales_are_centred_and_grow_with_the_channel() -> None:
    scales = awq_scales(torch.tensor([1.0, 4.0, 16.0]), 0.5)
    torch.testing.assert_close(scales, torch.tensor([0.5, 1.0, 2.0]))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothquant_matches_its_formula_up_to_the_units(alpha: float) -> None:
    a, w = torch.rand(16) + 0.5, torch.rand(16) + 0.5
    plain = a**alpha / w ** (1 - alpha)
    ratio = smoothquant_scales(a, w, alpha=alpha) / plain
    torch.testing.assert_close(ratio, ratio[0].expand(16))


def test_smoothquant_leaves_idle_channels_alone() -> None:
    scales = smoothquant_scales(
        torch.tensor([0.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 2.0]), alpha=0.5
    )
    assert scales[:2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_powers_of_two_scale_16_bit_numbers_exactly(dtype: torch.dtype) -> None:
    scales = power_of_two(torch.rand(64) * 30 + 0.01)
    weight = torch.randn(8, 64).to(dtype)
    scaled = (weight.float() * scales).to(dtype)
    assert torch.equal(scaled.float() / scales, weight.float())


def test_the_output_error_is_the_mean_squared_error_of_the_outputs() -> None:
    reader, _, x = layer(0)
    scales = torch.rand(64) + 0.5
    wrong = x @ (round_trip(reader.weight * scales) / scales - reader.weight).T
    expected = float(wrong.square().sum() / len(x))
    assert output_error([reader], scales, round_trip) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_search_is_never_worse_than_no_scaling(seed: int, exact: bool) -> None:
    reader, channels, _ = layer(seed)
    found = search_scales([reader], channels, round_trip=round_trip, grid_points=8, exact=exact)
    assert found.error <= found.error_before
    assert found.error == pytest.approx(output_error([reader], found.scales, round_trip))
    assert not exact or torch.equal(found.scales, power_of_two(found.scales))


def test_a_search_repairs_an_outlier_channel() -> None:
    reader, channels, _ = layer(1, outlier=50.0)
    found = search_scales([reader], channels, round_trip=round_trip, grid_points=20)
    assert found.error < 0.5 * found.error_before
    assert int(found.scales.argmax()) == 3


def test_scales_are_shared_by_the_columns_that_read_one_channel() -> None:
    reader, whole, _ = layer(2, outlier=8.0)

    def spread(s: Tensor) -> Tensor:
        return s.repeat(2)

    halves = Channels(
        whole.activation.view(2, 32).amax(0), whole.weight.view(2, 32).amax(0), spread
    )
    found = search_scales([reader], halves, round_trip=round_trip, grid_points=8)
    assert found.scales.shape == (32,)
    assert found.error == pytest.approx(output_error([reader], spread(found.scales), round_trip))
