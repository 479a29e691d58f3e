"""GPTQ, its statistics and the asymmetric target against slow, obvious versions."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from compressor.algorithms.asymmetric import (
    asymmetric_target,
    correction_strength,
    target_of_drift,
)
from compressor.algorithms.gptq import gptq, hessian_error, inverse_cholesky
from compressor.algorithms.grid import Grid, dequantize, minmax_grid, mse_grid, quantize
from compressor.algorithms.hessian import HessianAccumulator, OutputAccumulator
from compressor.errors import NumericError


def layer(seed: int, rows: int = 16, columns: int = 64, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """Weights [O, I] and correlated inputs [T, I]."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * 0.05
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    return w, torch.randn(tokens, columns, generator=generator) @ (mix + 0.3 * torch.eye(columns))


def second_moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def grid_of(w: Tensor, bits: int = 3, group_size: int = 16) -> Grid:
    return minmax_grid(w, bits=bits, group_size=group_size, symmetric=False)


def rounding_error(w: Tensor, hessian: Tensor, grid: Grid) -> float:
    return hessian_error(dequantize(quantize(w, grid), grid) - w, hessian)


def slow_gptq(w: Tensor, hessian: Tensor, grid: Grid, dampening: float) -> Tensor:
    """Textbook form in fp64: invert H, eliminate one variable at a time (OBQ)."""
    w, h = w.double().clone(), hessian.double().clone()
    h.diagonal().add_(dampening * h.diagonal().mean())
    scale, zero = (part.double() for part in grid.expand(w.shape[1]))
    codes = torch.zeros_like(w)
    left = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    while left:
        inverse, j = torch.linalg.inv(h[left][:, left]), left[0]
        codes[:, j] = ((w[:, j] / scale[:, j]).round() + zero[:, j]).clamp(0, grid.num_levels - 1)
        error = w[:, j] - (codes[:, j] - zero[:, j]) * scale[:, j]
        w[:, left] -= error[:, None] * inverse[0] / inverse[0, 0]
        left = left[1:]
    return codes.to(torch.uint8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_diagonal_hessian_gives_exactly_round_to_nearest(bits: int) -> None:
    w, x = layer(0)
    grid = mse_grid(w, bits=bits, group_size=16, symmetric=bits == 4)
    result = gptq(w, second_moment(x).diagonal().diag(), grid=grid, dampening=0.0)
    assert torch.equal(result.codes, quantize(w, grid))


@pytest.mark.parametrize("seed", range(4))
def test_the_sweep_equals_one_variable_at_a_time_elimination(seed: int) -> None:
    w, x = layer(seed)
    hessian, grid = second_moment(x), grid_of(w)
    codes = gptq(w, hessian, grid=grid, columns_per_block=24).codes
    assert (codes != slow_gptq(w, hessian, grid, 0.01)).float().mean() < 0.002  # rounding ties


def test_the_layer_error_is_never_above_round_to_nearest() -> None:
    for seed in range(20):
        w, x = layer(seed, tokens=100 + 20 * seed)
        hessian, grid = second_moment(x), grid_of(w, bits=2 + seed % 3)
        assert gptq(w, hessian, grid=grid).error < rounding_error(w, hessian, grid)


def test_the_error_is_close_to_the_brute_force_optimum() -> None:
    combinations = torch.tensor(list(itertools.product(range(4), repeat=8)), dtype=torch.uint8)
    ratios, rounded = [], []
    for seed in range(25):
        w, x = layer(seed, rows=1, columns=8, tokens=64)
        hessian, grid = second_moment(x), grid_of(w, bits=2, group_size=-1)
        delta = dequantize(combinations, grid) - w  # one grid row serves all candidate rows
        best = float(((delta @ hessian) * delta).sum(1).min())
        ratios.append(gptq(w, hessian, grid=grid, dampening=0.0).error / best)
        rounded.append(rounding_error(w, hessian, grid) / best)
    assert min(ratios) > 1 - 1e-5
    assert sorted(ratios)[12] < 1.3 < 1.5 < sorted(rounded)[12]


@pytest.mark.parametrize(("block", "panel"), [(1, 512), (7, 512), (128, 512), (16, 16), (16, 40)])
def test_the_sizes_of_blocks_and_panels_do_not_matter(
    block: int, panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, x = layer(3)
    hessian, grid = second_moment(x), grid_of(w)
    reference = gptq(w, hessian, grid=grid, columns_per_block=16)
    monkeypatch.setattr("compressor.algorithms.gptq.PANEL", panel)
    other = gptq(w, hessian, grid=grid, columns_per_block=block)
    assert other.error == pytest.approx(reference.error, rel=1e-3)
    assert (other.codes != reference.codes).float().mean() < 0.002


def test_scaling_the_hessian_by_a_power_of_two_changes_no_code() -> None:
    w, x = layer(4)
    hessian, grid = second_moment(x), grid_of(w)
    codes = [gptq(w, factor * hessian, grid=grid).codes for factor in (1, 1024)]
    assert torch.equal(*codes)


def test_permuting_columns_per_channel_permutes_the_codes() -> None:
    w, x = layer(5)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    hessian, grid = second_moment(x), grid_of(w, group_size=-1)
    plain = gptq(w, hessian, grid=grid)
    moved = gptq(w[:, order], hessian[order][:, order], grid=grid)
    assert moved.error == pytest.approx(plain.error, rel=1e-3)
    assert (moved.codes != plain.codes[:, order]).float().mean() < 0.002


def test_equal_inputs_give_equal_codes() -> None:
    w, x = layer(6)
    runs = [gptq(w, second_moment(x), grid=grid_of(w)).codes for _ in range(2)]
    assert torch.equal(*runs)


def test_fp32_is_as_good_as_fp64() -> None:
    w, x = layer(7, columns=256, tokens=200)
    hessian, grid = second_moment(x.double()), grid_of(w)
    single = gptq(w, hessian.float(), grid=grid).error
    assert single == pytest.approx(gptq(w, hessian, grid=grid).error, rel=1e-2)


def test_dead_columns_keep_their_rounded_weight() -> None:
    w, x = layer(8)
    x[:, [3, 40]] = 0
    grid = grid_of(w)
    result = gptq(w, second_moment(x), grid=grid)
    assert result.num_dead == 2
    assert torch.equal(result.codes[:, [3, 40]], quantize(w, grid)[:, [3, 40]])


def test_without_any_token_gptq_is_round_to_nearest() -> None:
    w, _ = layer(9)
    grid = grid_of(w)
    result = gptq(w, HessianAccumulator(64, with_cross=False).hessian(), grid=grid)
    assert result.num_dead == 64
    assert torch.equal(result.codes, quantize(w, grid))


@pytest.mark.parametrize("dampening", [0.0, 0.01])
def test_fewer_tokens_than_columns_still_finish(dampening: float) -> None:
    w, x = layer(10, tokens=5)
    result = gptq(w, second_moment(x), grid=grid_of(w), dampening=dampening)
    assert result.error < rounding_error(w, second_moment(x), grid_of(w))


def test_an_indefinite_hessian_climbs_the_ladder_and_says_so() -> None:
    hessian = torch.eye(16)
    hessian[0, 1] = hessian[1, 0] = 5.0
    upper, factor = inverse_cholesky(hessian, dampening=0.01)
    assert torch.isfinite(upper).all()
    assert "eigenvalues" in factor.reason
    assert factor.attempts == 6


def test_more_dampening_is_reported_when_it_was_needed() -> None:
    hessian = torch.eye(16)
    hessian[0, 1] = hessian[1, 0] = 1.05
    _, factor = inverse_cholesky(hessian, dampening=0.01)
    assert factor.dampening_used == pytest.approx(0.1)
    assert factor.reason


def test_a_negative_matrix_ends_on_its_diagonal() -> None:
    upper, factor = inverse_cholesky(-torch.eye(4), dampening=0.01)
    assert torch.equal(upper, torch.eye(4))
    assert "diagonal" in factor.reason


def test_the_factor_is_the_inverse_of_the_damped_hessian() -> None:
    hessian = second_moment(layer(11)[1].double())
    upper, factor = inverse_cholesky(hessian, dampening=0.01)
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper.T @ upper @ hessian, torch.eye(64, dtype=torch.float64), atol=1e-9)
    assert (factor.attempts, factor.reason) == (1, "")


def test_a_non_finite_hessian_is_an_error_and_no_ladder() -> None:
    hessian = torch.eye(8)
    hessian[2, 3] = float("nan")
    with pytest.raises(NumericError) as caught:
        inverse_cholesky(hessian, dampening=0.01)
    assert caught.value.code == "NU01"


def test_masked_weights_become_exact_zeros_and_the_rest_repairs_them() -> None:
    w, x = layer(12)
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(0)) > 0.3
    hessian, grid = second_moment(x), grid_of(w, bits=4)
    result = gptq(w, hessian, grid=grid, mask=mask)
    assert (dequantize(result.codes, grid)[~mask] == 0).all()
    assert result.error < hessian_error(dequantize(quantize(w, grid), grid) * mask - w, hessian)


def test_a_mask_that_keeps_everything_changes_nothing() -> None:
    w, x = layer(13)
    hessian, grid = second_moment(x), grid_of(w)
    masked = gptq(w, hessian, grid=grid, mask=torch.ones_like(w, dtype=torch.bool))
    assert torch.equal(masked.codes, gptq(w, hessian, grid=grid).codes)


def test_saturated_codes_are_counted() -> None:
    w, x = layer(14)
    narrow = minmax_grid(w * 0.25, bits=4, group_size=16, symmetric=False)
    hessian = second_moment(x).diagonal().diag()
    result = gptq(w, hessian, grid=narrow, dampening=0.0)
    scale, zero = narrow.expand(64)
    wanted = (w / scale).round() + zero
    assert result.num_saturated == int(((wanted < 0) | (wanted > 15)).sum())


def test_statistics_do_not_depend_on_batching_padding_or_repetition() -> None:
    _, x = layer(15)
    whole, parts, padded = (HessianAccumulator(64, with_cross=False) for _ in range(3))
    whole.add(x)
    for _ in range(2):  # the same calibration set twice
        for part in x.reshape(4, 100, 64):
            parts.add(part)
    mask = torch.arange(500) < 400
    padded.add(torch.cat([x, 9 * torch.ones(100, 64)]), mask=mask)
    assert torch.allclose(whole.hessian(), parts.hessian(), atol=1e-6)
    assert torch.equal(whole.hessian(), padded.hessian())
    assert (parts.num_tokens, padded.num_tokens) == (800, 400)


def test_the_cross_term_has_the_drift_on_its_left() -> None:
    _, x = layer(16)
    x_tilde = x + 0.1 * layer(17)[1]
    sums = HessianAccumulator(64, with_cross=True)
    sums.add(x_tilde.reshape(4, 100, 64), x.reshape(4, 100, 64))
    assert torch.allclose(sums.cross(), (x - x_tilde).T @ x_tilde / 400, atol=1e-6)
    assert torch.allclose(sums.hessian(), second_moment(x_tilde), atol=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("original", [True, False])
def test_a_bad_activation_is_caught_in_its_batch(poison: float, original: bool) -> None:
    good, bad = torch.ones(10, 4), torch.ones(10, 4)
    bad[3, 2] = poison
    sums = HessianAccumulator(4, with_cross=True)
    sums.add(good, good)
    with pytest.raises(NumericError) as caught:
        sums.add(good if original else bad, bad if original else good)
    assert caught.value.code == "NU01"


def test_without_drift_the_target_is_the_weight() -> None:
    w, x = layer(18)
    target = asymmetric_target(w, second_moment(x), torch.zeros(64, 64), strength=1.0, ridge=0.01)
    assert torch.equal(target, w)


def test_strength_zero_is_no_correction() -> None:
    w, x = layer(18)
    target = asymmetric_target(w, second_moment(x), second_moment(x), strength=0.0, ridge=0.01)
    assert torch.equal(target, w)


def test_the_target_is_the_least_squares_fit_to_the_original_output() -> None:
    w, x = layer(19)
    x_tilde = x + 0.2 * layer(20)[1] + 0.1 * x.roll(1, dims=1)
    sums = HessianAccumulator(64, with_cross=True)
    sums.add(x_tilde, x)
    target = asymmetric_target(w, sums.hessian(), sums.cross(), strength=1.0, ridge=0.0)
    oracle = torch.linalg.lstsq(x_tilde.double(), (x @ w.T).double()).solution.T
    assert torch.allclose(target.double(), oracle, atol=1e-4)
    assert (x_tilde @ target.T - x @ w.T).norm() < 0.9 * ((x_tilde - x) @ w.T).norm()


def test_the_drift_of_a_layer_can_be_had_from_its_original_outputs() -> None:
    w, x = layer(19)
    x_tilde = x + 0.2 * layer(20)[1]
    mask = torch.arange(len(x)) % 3 > 0
    sums, products = HessianAccumulator(64, with_cross=True), OutputAccumulator(len(w), 64)
    for part in torch.arange(len(x)).split(100):
        features = sums.add(x_tilde[part], x[part], mask[part])
        products.add((x @ w.T)[part], features, mask[part])
    drift = products.drift(w, sums.hessian())
    torch.testing.assert_close(drift, w @ sums.cross(), atol=1e-4, rtol=1e-4)
    how = {"strength": 0.5, "ridge": 0.01}
    expected = asymmetric_target(w, sums.hessian(), sums.cross(), **how)
    found = target_of_drift(w, sums.hessian(), drift, **how)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_non_finite_outputs_are_refused() -> None:
    w, x = layer(19)
    with pytest.raises(NumericError) as caught:
        OutputAccumulator(len(w), 64).add((x @ w.T).mul(float("inf")), x.T)
    assert caught.value.code == "NU01"


def test_a_two_layer_net_ends_closer_with_the_asymmetric_target() -> None:
    wins = 0
    for seed in range(20):
        w1, x = layer(seed, rows=64, tokens=1000)
        w2, _ = layer(100 + seed)
        grid1, grid2 = grid_of(w1, bits=2), grid_of(w2, bits=3)
        first = dequantize(gptq(w1, second_moment(x), grid=grid1).codes, grid1)
        hidden, drifted = torch.relu(x @ w1.T), torch.relu(x @ first.T)
        sums = HessianAccumulator(64, with_cross=True)
        sums.add(drifted, hidden)
        target = asymmetric_target(w2, sums.hessian(), sums.cross(), strength=1.0, ridge=0.01)
        outputs = [
            drifted @ dequantize(gptq(t, sums.hessian(), grid=grid2).codes, grid2).T
            for t in (target, w2)
        ]
        corrected, plain = ((output - hidden @ w2.T).norm() for output in outputs)
        wins += int(corrected < plain)
    assert wins >= 18


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(50, (0.0, 0.01)), (300, (1.0, 1.0)), (1000, (0.5, 0.01)), (9000, (1.0, 0.01))],
)
def test_correction_grows_with_the_tokens_per_input(
    tokens: int, expected: tuple[float, float]
) -> None:
    assert correction_strength(tokens, 100) == expected
