"""Grids: range, rounding, search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.algorithms.grid import Grid, dequantize, minmax_grid, mse_grid, quantize
from compressor.errors import NumericError, RecipeError

SHAPES = [(bits, size, sym) for bits in (2, 3, 4, 8) for size in (16, -1) for sym in (True, False)]
CASES = pytest.mark.parametrize(("bits", "group_size", "symmetric"), SHAPES)


def heavy_weights(rows: int = 12, columns: int = 64, seed: int = 0) -> Tensor:
    """Gaussian weights with a few large ones, so that clipping pays."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    return 0.02 * w * (1 + 3 * (torch.rand(rows, columns, generator=generator) > 0.97))


def group_errors(w: Tensor, grid: Grid, importance: Tensor | None = None) -> Tensor:
    difference = (dequantize(quantize(w, grid), grid) - w).square()
    weighted = difference if importance is None else difference * importance
    return weighted.reshape(len(w), grid.scale.shape[1], -1).sum(-1)


@CASES
def test_a_searched_grid_is_never_worse_than_minmax_in_any_group(
    bits: int, group_size: int, symmetric: bool
) -> None:
    w = heavy_weights()
    plain = minmax_grid(w, bits=bits, group_size=group_size, symmetric=symmetric)
    found = mse_grid(w, bits=bits, group_size=group_size, symmetric=symmetric)
    assert (group_errors(w, found) <= group_errors(w, plain)).all()
    assert group_errors(w, found).sum() < group_errors(w, plain).sum()


@CASES
def test_quantizing_twice_changes_nothing_and_zero_stays_zero(
    bits: int, group_size: int, symmetric: bool
) -> None:
    w = heavy_weights()
    w[:, ::7] = 0
    grid = mse_grid(w, bits=bits, group_size=group_size, symmetric=symmetric)
    codes = quantize(w, grid)
    assert torch.equal(quantize(dequantize(codes, grid), grid), codes)
    assert dequantize(codes, grid)[:, ::7].abs().max() == 0
    assert int(codes.max()) < grid.num_levels


@CASES
def test_minmax_errs_by_at_most_half_a_step(bits: int, group_size: int, symmetric: bool) -> None:
    w = heavy_weights()
    grid = minmax_grid(
        w, bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=torch.float32
    )
    scale, _ = grid.expand(w.shape[1])
    error = (dequantize(quantize(w, grid), grid) - w).abs() / scale
    limit = 0.5 if symmetric else 1.0  # rounding the zero point may cost another half step
    assert error.max() <= limit + 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_survive_their_storage_dtype(dtype: torch.dtype) -> None:
    grid = mse_grid(heavy_weights(), bits=4, group_size=16, symmetric=False, scale_dtype=dtype)
    assert torch.equal(grid.scale.to(dtype).float(), grid.scale)
    assert grid.scale.dtype == torch.float32


def test_the_zero_point_of_a_symmetric_grid_is_the_middle_code() -> None:
    grid = mse_grid(heavy_weights(), bits=4, group_size=16, symmetric=True)
    assert (grid.zero_point == 8).all()
    assert grid.zero_point.dtype == torch.int32


def test_a_symmetric_search_finds_the_full_range_convention() -> None:
    w = torch.arange(-8.0, 8.0)[None] * 0.5  # exactly the 16 levels of a 4-bit grid with scale 0.5
    grid = mse_grid(w, bits=4, group_size=-1, symmetric=True)
    assert grid.scale.item() == 0.5
    assert group_errors(w, grid).item() == 0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-30, 1e30])
def test_degenerate_groups_get_a_normal_positive_scale(symmetric: bool, value: float) -> None:
    w = torch.full((2, 32), value)
    for make in (minmax_grid, mse_grid):
        grid = make(w, bits=4, group_size=16, symmetric=symmetric)
        assert (grid.scale >= torch.finfo(torch.bfloat16).tiny).all()
        assert torch.isfinite(dequantize(quantize(w, grid), grid)).all()


def test_an_all_zero_group_gets_scale_one() -> None:
    grid = mse_grid(torch.zeros(1, 16), bits=4, group_size=16, symmetric=False)
    assert grid.scale.item() == 1


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_asymmetric_grid_of_one_sign_still_contains_zero(sign: float) -> None:
    w = sign * (1 + torch.rand(4, 16, generator=torch.Generator().manual_seed(1)))
    grid = mse_grid(w, bits=3, group_size=16, symmetric=False)
    assert ((grid.zero_point >= 0) & (grid.zero_point < 8)).all()


def test_importance_moves_the_error_to_unimportant_columns() -> None:
    w = heavy_weights()
    importance = torch.ones(64)
    importance[::4] = 100.0
    weighted = mse_grid(w, bits=3, group_size=16, symmetric=False, importance=importance)
    plain = mse_grid(w, bits=3, group_size=16, symmetric=False)
    errors = [group_errors(w, grid, importance).sum() for grid in (weighted, plain)]
    assert errors[0] < errors[1]


def test_scaling_the_weights_by_a_power_of_two_scales_the_grid() -> None:
    w = heavy_weights()
    one, four = (mse_grid(x, bits=4, group_size=16, symmetric=False) for x in (w, 4 * w))
    assert torch.equal(4 * one.scale, four.scale)
    assert torch.equal(quantize(w, one), quantize(4 * w, four))


def test_expand_repeats_each_group_over_its_columns() -> None:
    grid = minmax_grid(heavy_weights(3, 32), bits=4, group_size=16, symmetric=False)
    scale, zero = grid.expand(32)
    assert scale.shape == zero.shape == (3, 32)
    assert torch.equal(scale[:, 17], grid.scale[:, 1])


def test_groups_that_do_not_tile_the_columns_are_refused() -> None:
    with pytest.raises(RecipeError) as caught:
        minmax_grid(torch.ones(2, 40), bits=4, group_size=16, symmetric=True)
    assert caught.value.code == "CK29"


def test_non_finite_weights_are_refused() -> None:
    w = heavy_weights()
    w[3, 5] = float("nan")
    with pytest.raises(NumericError) as caught:
        mse_grid(w, bits=4, group_size=16, symmetric=True)
    assert caught.value.code == "NU01"
