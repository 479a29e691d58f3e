"""Learned rounding: the start is round-to-nearest, the kept state is never worse, exports agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.algorithms.float_grid import fp8_grid, mxfp4_grid
from compressor.algorithms.grid import Grid, dequantize, mse_grid, quantize
from compressor.algorithms.latent_rounding import LatentWeight
from compressor.algorithms.learned_rounding import (
    LearnedWeight,
    Schedule,
    learn,
    metric_factor,
    squared_error,
)
from compressor.errors import NumericError
from compressor_kernels import native


def weight_and_inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    """W [24, 64] and inputs [512, 64] of which eight directions hold nearly everything."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, 64, generator=generator)
    directions = torch.randn(8, 64, generator=generator)
    strong = torch.randn(512, 8, generator=generator) @ directions
    return weight, strong + 0.1 * torch.randn(512, 64, generator=generator)


def grid_of(weight: Tensor, *, symmetric: bool = True, bits: int = 3) -> Grid:
    return mse_grid(
        weight, bits=bits, group_size=16, symmetric=symmetric, scale_dtype=torch.bfloat16
    )


def learned(weight: Tensor, grid: Grid, mask: Tensor | None = None) -> LearnedWeight:
    return LearnedWeight(weight, grid, scale_dtype=torch.bfloat16, mask=mask)


def output_error(rounded: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    return ((rounded - weight) @ x.t()).square().mean()


@pytest.mark.skipif(native.library() is None, reason=native.reason())
@pytest.mark.parametrize("symmetric", [True, False])
def test_torch_and_c_round_and_learn_alike(
    symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = weight_and_inputs()
    found = []
    for in_c in (True, False):
        with monkeypatch.context() as patch:
            if not in_c:
                patch.setattr(native, "library", lambda: None)
            pupil = learned(weight, grid_of(weight, symmetric=symmetric))
            with torch.no_grad():
                pupil.offset.copy_(torch.linspace(-1, 1, weight.numel()).view_as(pupil.offset))
                pupil.factor.mul_(1.1)
            assert pupil.is_plain() == in_c
            value = pupil.value()
            gradients = torch.autograd.grad(
                output_error(value, weight, x), [pupil.offset, pupil.factor]
            )
        found.append((value.detach(), *gradients))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_the_held_out_loss_is_asked_in_the_second_half_and_at_the_end() -> None:
    schedule = Schedule(steps=50, rate=0.1, factor_rate=0.1, judge_every=10)
    assert [n for n in range(1, 51) if schedule.judges(n)] == [30, 40, 50]
    assert [n for n in range(1, 6) if Schedule(5, 0.1, 0.1).judges(n)] == [5]


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_start_is_round_to_nearest(symmetric: bool) -> None:
    weight, _ = weight_and_inputs()
    grid = grid_of(weight, symmetric=symmetric)
    codes, same = learned(weight, grid).rounded()
    assert torch.equal(codes, quantize(weight, grid))
    assert torch.equal(same.scale, grid.scale)


@pytest.mark.parametrize(
    "make", [lambda w: fp8_grid(w, kind="mse"), lambda w: mxfp4_grid(w, kind="mse")]
)
def test_small_floats_start_at_round_to_nearest_too(make: object) -> None:
    weight, _ = weight_and_inputs()
    grid = make(weight)  # type: ignore[operator]
    start = LearnedWeight(weight, grid, scale_dtype=torch.bfloat16)
    assert torch.equal(start.rounded()[0], quantize(weight, grid))
    assert not start.factor.requires_grad


def test_the_trained_value_is_bit_for_bit_what_is_exported() -> None:
    weight, x = weight_and_inputs()
    pupil = learned(weight, grid_of(weight))
    learn(
        [pupil],
        lambda step: output_error(pupil.value(), weight, x),
        lambda: float(output_error(pupil.value().detach(), weight, x)),
        Schedule(20, 0.02, 0.005, judge_every=5),
    )
    codes, grid = pupil.rounded()
    assert torch.equal(pupil.value(), dequantize(codes, grid))
    assert torch.equal(grid.scale, grid.scale.bfloat16().float())


def test_learning_beats_round_to_nearest_on_correlated_inputs() -> None:
    weight, x = weight_and_inputs()
    pupil = learned(weight, grid_of(weight))
    found = learn(
        [pupil],
        lambda step: output_error(pupil.value(), weight, x[:384]),
        lambda: float(output_error(pupil.value().detach(), weight, x[384:])),
        Schedule(100, 0.02, 0.005, judge_every=20),
    )
    assert found.best_step > 0
    assert found.after < 0.7 * found.before


def test_the_start_is_kept_when_every_step_harms_on_held_out_data() -> None:
    weight, x = weight_and_inputs()
    pupil = learned(weight, grid_of(weight))
    found = learn(
        [pupil],
        lambda step: -output_error(pupil.value(), weight, x),
        lambda: float(output_error(pupil.value().detach(), weight, x)),
        Schedule(10, 0.1, 0.01, judge_every=2),
    )
    assert (found.best_step, found.after) == (0, found.before)
    assert torch.equal(pupil.rounded()[0], quantize(weight, pupil.grid))


def test_a_rate_of_zero_changes_nothing() -> None:
    weight, x = weight_and_inputs()
    pupil = learned(weight, grid_of(weight))
    before = pupil.value().detach().clone()
    schedule = Schedule(3, 0.0, 0.0, judge_every=1)
    loss = lambda step: output_error(pupil.value(), weight, x)  # noqa: E731
    learn([pupil], loss, lambda: float(loss(0).detach()), schedule)
    assert torch.equal(pupil.value(), before)


def test_pruned_weights_stay_exactly_zero() -> None:
    weight, x = weight_and_inputs()
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) > 0.5
    pupil = learned(weight, grid_of(weight * mask), mask)
    learn(
        [pupil],
        lambda step: output_error(pupil.value(), weight, x),
        lambda: float(output_error(pupil.value().detach(), weight, x)),
        Schedule(30, 0.05, 0.01),
    )
    codes, grid = pupil.rounded()
    assert (dequantize(codes, grid)[~mask] == 0).all()


def test_clipped_weights_pass_no_gradient_to_their_offset() -> None:
    weight = torch.tensor([[0.1, 100.0, -0.2, 0.3]])
    grid = Grid(torch.tensor([[0.1]]), torch.tensor([[4]], dtype=torch.int32), 3, -1, True)
    pupil = LearnedWeight(weight, grid, scale_dtype=torch.float32)
    pupil.value().sum().backward()
    assert pupil.offset.grad is not None
    assert pupil.offset.grad.flatten().tolist() == pytest.approx([0.1, 0.0, 0.1, 0.1])


def by_autograd(pupil: LearnedWeight) -> Tensor:
    """w^ with straight-through rounding spelt out in single differentiable steps."""
    scale = pupil.scale().unsqueeze(-1)
    if isinstance(pupil, LatentWeight):
        steps = pupil.offset if pupil.distance is None else pupil.offset * pupil.distance
        at = pupil.groups + steps
    else:
        at = pupil.groups / scale + pupil.offset
    at = at if pupil.kept is None else at * pupil.kept
    _, levels, clipped = pupil.grid.nearest(at.detach(), pupil.grid.zero_point.unsqueeze(-1))
    passed = torch.where(clipped, at.detach(), at)
    return ((levels + passed - passed.detach()) * scale).flatten(1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["integers", "floats"])
@pytest.mark.parametrize("latent", [False, True])
def test_gradients_are_those_of_straight_through_rounding(
    kind: str, *, latent: bool, masked: bool
) -> None:
    weight, _ = weight_and_inputs()
    mask = torch.rand(24, 64, generator=torch.Generator().manual_seed(1)) > 0.4 if masked else None
    integers = kind == "integers"
    grid = grid_of(weight, symmetric=False) if integers else mxfp4_grid(weight, kind="mse")
    if latent:
        codes = quantize(weight if mask is None else weight * mask, grid)
        pupil: LearnedWeight = LatentWeight(
            codes, grid, scale_dtype=torch.float32, near=weight, mask=mask
        )
    else:
        pupil = LearnedWeight(weight, grid, scale_dtype=torch.float32, mask=mask)
    with torch.no_grad():
        pupil.offset += 0.3 * torch.randn(pupil.offset.shape, generator=torch.Generator())
        pupil.factor *= 1.1
    wanted = [p for p in (pupil.offset, pupil.factor) if p.requires_grad]
    probe = torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad((pupil.value() * probe).sum(), wanted)
    slow = torch.autograd.grad((by_autograd(pupil) * probe).sum(), wanted)
    assert torch.allclose(pupil.value(), by_autograd(pupil), atol=1e-6)
    for one, other in zip(ours, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    weight, _ = weight_and_inputs()
    pupil = learned(weight, grid_of(weight))
    with pytest.raises(NumericError, match="learned rounding"):
        learn(
            [pupil],
            lambda step: pupil.value().sum() * float("nan"),
            lambda: 1.0,
            Schedule(2, 0.1, 0.1),
        )


def test_the_metric_is_the_mixture_of_a_power_of_fisher_and_identity() -> None:
    gradients = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    fisher = gradients.t() @ gradients / 200
    for power, raised in ((1.0, fisher), (2.0, fisher @ fisher)):
        factor = metric_factor(fisher, power=power, identity_share=0.25)
        wanted = 0.75 * raised / raised.diagonal().mean() + 0.25 * torch.eye(8)
        assert torch.allclose(factor @ factor.t(), wanted, atol=1e-5)
    assert torch.equal(metric_factor(torch.zeros(8, 8)), torch.eye(8))


def test_the_squared_error_is_the_quadratic_form_of_the_metric() -> None:
    error = torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    factor = metric_factor(torch.diag(torch.arange(1.0, 9.0)))
    form = (error @ (factor @ factor.t()) * error).sum(-1).mean() / 8
    assert torch.allclose(squared_error(error, factor), form, rtol=1e-5)


def test_trimming_leaves_exactly_the_largest_errors_out() -> None:
    error = torch.ones(10, 10)
    error[3, 4] = 1000.0
    assert float(squared_error(error, torch.eye(10), trimmed=0.01)) == 1.0
    assert float(squared_error(error, torch.eye(10))) > 1000


def test_the_metric_predicts_the_divergence_of_small_errors() -> None:
    """KL ~ 1/2 e^T F e for softmax outputs, with F = diag(p) - p p^T the exact Fisher matrix."""
    logits = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    p = logits.softmax(0)
    fisher = torch.diag(p) - torch.outer(p, p)
    error = 1e-3 * torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    kl = (p * (logits.log_softmax(0) - (logits + error).log_softmax(0))).sum()
    assert float(0.5 * error @ fisher @ error) == pytest.approx(float(kl), rel=1e-2)
