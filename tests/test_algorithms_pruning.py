"""Masks, re-solving of kept weights, structured pruning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.algorithms.gptq import hessian_error
from compressor.algorithms.masks import (
    alps_mask,
    magnitude,
    n_of_m_mask,
    parse_pattern,
    sparsegpt_mask,
    unstructured_mask,
    wanda,
)
from compressor.algorithms.reconstruct import reconstruct
from compressor.algorithms.structured import (
    block_influence,
    kv_group_importance,
    mlp_channel_importance,
    repair_linear,
    select_channels,
)
from compressor.errors import NumericError, RecipeError


def layer(seed: int = 0, rows: int = 12, columns: int = 32) -> tuple[Tensor, Tensor]:
    """Weights [O, I] and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(500, columns, generator=generator) @ mix
    return w, x.T @ x / 500


def least_squares(w: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """Row by row: solve H[S, S] w' = (H w)[S] in fp64."""
    solved = torch.zeros_like(w, dtype=torch.float64)
    for row, keep in enumerate(mask):
        support = hessian.double()[keep]
        solved[row, keep] = torch.linalg.solve(support[:, keep], support @ w[row].double())
    return solved


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7])
def test_every_row_loses_exactly_its_share_even_among_ties(sparsity: float) -> None:
    scores = torch.randint(0, 3, (7, 30), generator=torch.Generator().manual_seed(0)).float()
    mask = unstructured_mask(scores, sparsity=sparsity)
    assert ((~mask).sum(1) == round(30 * sparsity)).all()


def test_a_layer_mask_counts_over_the_whole_layer() -> None:
    w, _ = layer()
    mask = unstructured_mask(magnitude(w), sparsity=0.5, per="layer")
    assert int(mask.sum()) == w.numel() // 2
    assert w.abs()[mask].min() >= w.abs()[~mask].max()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_a_pattern_keeps_the_n_best_of_every_m(n: int, m: int) -> None:
    scores = magnitude(layer()[0])
    mask = n_of_m_mask(scores, n=n, m=m).reshape(-1, m)
    assert (mask.sum(1) == n).all()
    groups = scores.reshape(-1, m)
    assert (groups.where(mask, 9.0).amin(1) >= groups.where(~mask, 0.0).amax(1)).all()


def test_wanda_prefers_columns_with_strong_inputs() -> None:
    mask = unstructured_mask(wanda(torch.ones(3, 4), torch.tensor([4.0, 1, 3, 2])), sparsity=0.5)
    assert mask.tolist() == [[True, False, True, False]] * 3


@pytest.mark.parametrize("text", ["2-4", "4:4", "0:4", ":", "a:b", "2:4:8", "-1:4"])
def test_a_bad_pattern_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_pattern(text)


def test_a_pattern_that_does_not_tile_the_row_is_refused() -> None:
    with pytest.raises(RecipeError):
        n_of_m_mask(torch.ones(2, 6), n=2, m=4)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5])
def test_a_sparsity_outside_of_its_range_is_refused(sparsity: float) -> None:
    with pytest.raises(RecipeError):
        unstructured_mask(torch.ones(2, 4), sparsity=sparsity)


def test_sparsegpt_with_a_diagonal_hessian_is_wanda_without_repair() -> None:
    w, hessian = layer()
    diagonal = hessian.diagonal()
    mask, swept = sparsegpt_mask(w, diagonal.diag(), pattern="2:4", dampening=0.0)
    assert torch.equal(mask, n_of_m_mask(wanda(w, diagonal), n=2, m=4))
    assert torch.equal(swept, w * mask)


def test_sparsegpt_without_sparsity_is_the_identity() -> None:
    w, hessian = layer()
    mask, swept = sparsegpt_mask(w, hessian, sparsity=0.0)
    assert mask.all()
    assert torch.equal(swept, w)


@pytest.mark.parametrize("block", [5, 16, 128])
def test_sparsegpt_removes_exactly_as_many_as_asked(block: int) -> None:
    w, hessian = layer()
    mask, swept = sparsegpt_mask(w, hessian, sparsity=0.7, columns_per_block=block)
    assert int((~mask).sum()) == int(0.7 * w.numel())
    assert (swept[~mask] == 0).all()


def test_sparsegpt_patterns_do_not_depend_on_the_block_size() -> None:
    w, hessian = layer()
    masks, swept = zip(
        *(sparsegpt_mask(w, hessian, pattern="2:4", columns_per_block=b) for b in (4, 10, 128)),
        strict=True,
    )
    assert all((mask.reshape(-1, 4).sum(1) == 2).all() for mask in masks)
    assert torch.equal(masks[0], masks[1])
    assert torch.allclose(swept[0], swept[2], atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_sparsegpt_beats_wanda_and_exact_least_squares_beats_both(seed: int) -> None:
    w, hessian = layer(seed, columns=192)
    wanda_mask = unstructured_mask(wanda(w, hessian.diagonal()), sparsity=0.5)
    mask, swept = sparsegpt_mask(w, hessian, sparsity=0.5)
    solved = reconstruct(w, hessian, mask, start=swept)
    errors = [hessian_error(weights - w, hessian) for weights in (w * wanda_mask, swept, solved)]
    assert errors[0] > errors[1] > errors[2]


def test_sparsegpt_removes_dead_columns_first() -> None:
    w, hessian = layer()
    hessian[5], hessian[:, 5] = 0, 0
    mask, swept = sparsegpt_mask(w, hessian, pattern="2:4")
    assert not mask[:, 5].any()
    assert torch.isfinite(swept).all()
    assert torch.equal(sparsegpt_mask(w, hessian, sparsity=0.0)[1], w)


def half(scores: Tensor) -> Tensor:
    return unstructured_mask(scores, sparsity=0.5)


@pytest.mark.parametrize("seed", range(5))
def test_an_alps_mask_is_better_than_one_of_sparsegpt_once_both_are_repaired(seed: int) -> None:
    w, hessian = layer(seed, columns=192)
    masks = (alps_mask(w, hessian, choose=half), sparsegpt_mask(w, hessian, sparsity=0.5))
    solved = [reconstruct(w, hessian, mask, start=start) for mask, start in masks]
    alps, swept = (hessian_error(weights - w, hessian) for weights in solved)
    assert alps < 0.95 * swept


def test_alps_weights_are_zero_off_the_mask_and_nearly_solved_on_it() -> None:
    w, hessian = layer(columns=192)
    mask, weights = alps_mask(w, hessian, choose=half)
    assert ((~mask).sum(1) == 96).all()
    assert (weights[~mask] == 0).all()
    errors = [
        hessian_error(x - w, hessian) for x in (weights, w * mask, reconstruct(w, hessian, mask))
    ]
    assert errors[2] < errors[0] < errors[2] + 0.2 * (errors[1] - errors[2])


def test_alps_does_not_depend_on_the_units_of_the_inputs() -> None:
    w, hessian = layer()
    units = torch.logspace(-2, 2, 32)
    mask, weights = alps_mask(w, hessian, choose=half)
    other, rescaled = alps_mask(w / units, hessian * units[:, None] * units, choose=half)
    assert torch.equal(mask, other)
    torch.testing.assert_close(rescaled * units, weights, rtol=1e-3, atol=1e-4)


def test_alps_removes_dead_columns_first_and_changes_nothing_where_all_is_kept() -> None:
    w, hessian = layer()
    hessian[5], hessian[:, 5] = 0, 0
    mask, weights = alps_mask(w, hessian, choose=half)
    assert not mask[:, 5].any()
    assert torch.isfinite(weights).all()
    whole, same = alps_mask(w, hessian, choose=lambda scores: torch.ones_like(scores).bool())
    assert whole.all()
    torch.testing.assert_close(same, w)


def test_reconstruction_equals_dense_least_squares() -> None:
    w, hessian = layer()
    mask = unstructured_mask(magnitude(w), sparsity=0.5)
    solved = reconstruct(w.double(), hessian.double(), mask, iterations=60, tolerance=1e-12)
    assert torch.allclose(solved, least_squares(w, hessian, mask), atol=1e-6)


def test_twenty_iterations_in_fp32_reach_the_exact_error() -> None:
    w, hessian = layer()
    mask = unstructured_mask(magnitude(w), sparsity=0.5)
    exact = hessian_error(least_squares(w, hessian, mask) - w, hessian)
    assert hessian_error(reconstruct(w, hessian, mask) - w, hessian) <= exact * (1 + 1e-3)


@pytest.mark.parametrize("iterations", [0, 1, 3, 50])
def test_no_row_ends_worse_than_it_started(iterations: int) -> None:
    w, hessian = layer()
    mask, swept = sparsegpt_mask(w, hessian, sparsity=0.6)
    solved = reconstruct(w, hessian, mask, start=swept, iterations=iterations)
    errors = [((d @ hessian) * d).sum(1) for d in (solved - w, swept - w)]
    assert (errors[0] <= errors[1]).all()
    assert (solved[~mask] == 0).all()


def test_reconstruction_keeps_weights_of_dead_columns_and_full_masks() -> None:
    w, hessian = layer()
    hessian[5], hessian[:, 5] = 0, 0
    mask = unstructured_mask(magnitude(w), sparsity=0.5)
    mask[:, 5] = True
    assert torch.equal(reconstruct(w, hessian, mask)[:, 5], w[:, 5])
    assert torch.equal(reconstruct(w, hessian, torch.ones_like(mask)), w)


def test_reconstruction_refuses_non_finite_input() -> None:
    w, hessian = layer()
    hessian[1, 2] = float("inf")
    with pytest.raises(NumericError):
        reconstruct(w, hessian, w > 0)


def test_silent_and_unread_channels_matter_least() -> None:
    energy, weight = torch.ones(6), torch.ones(4, 6)
    energy[2], weight[:, 4] = 0, 0
    kept = select_channels(mlp_channel_importance(energy, weight), 4)
    assert kept.tolist() == [0, 1, 3, 5]


def test_head_importance_is_summed_over_the_group_that_shares_keys() -> None:
    energy = torch.tensor([1.0, 1, 0, 0, 2, 2, 2, 2])  # 4 query heads of width 2, 2 KV heads
    assert torch.allclose(kv_group_importance(energy, num_kv_heads=2) ** 2, torch.tensor([2.0, 8]))
    weight = torch.ones(3, 8)
    weight[:, 4:] = 0
    assert kv_group_importance(energy, num_kv_heads=2, o_weight=weight)[1] == 0


def test_block_influence_is_zero_for_a_scaled_copy_and_two_for_its_opposite() -> None:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    assert block_influence(x, 3 * x) == pytest.approx(0, abs=1e-6)
    assert block_influence(x, -x) == pytest.approx(2, abs=1e-6)


def test_the_number_of_channels_is_rounded_up_to_the_alignment() -> None:
    importance = torch.arange(10.0)
    assert select_channels(importance, 5, multiple_of=4).tolist() == list(range(2, 10))
    assert len(select_channels(importance, 9, multiple_of=4)) == 10
    with pytest.raises(ValueError, match="cannot keep"):
        select_channels(importance, 11)


def test_repair_changes_nothing_when_removed_channels_have_zero_weight() -> None:
    w, hessian = layer()
    kept = torch.arange(20)
    w[:, 20:] = 0
    assert torch.equal(repair_linear(w, kept, hessian), w[:, kept])


def test_repair_is_the_least_squares_fit_to_the_dense_output() -> None:
    w, hessian = layer()
    kept = select_channels(torch.randn(32, generator=torch.Generator().manual_seed(1)), 20)
    repaired = torch.zeros_like(w)
    repaired[:, kept] = repair_linear(w, kept, hessian, ridge=0.0)
    mask = torch.zeros_like(w, dtype=torch.bool)
    mask[:, kept] = True
    assert torch.allclose(repaired.double(), least_squares(w, hessian, mask), atol=1e-4)
    assert hessian_error(repaired - w, hessian) < hessian_error(w * mask - w, hessian)
