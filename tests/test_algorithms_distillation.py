"""Distillation losses, trainable scales and divergence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressor.algorithms.distillation import (
    chunked_forward_kl,
    cross_entropy,
    exported_scale,
    forward_kl,
    hidden_mse,
    scaled_dequantize,
)
from compressor.algorithms.divergence import kl_tokens, top1_agreement
from compressor.algorithms.grid import Grid, dequantize, mse_grid, quantize


def logits(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype) * 2


def slow_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    p, q = (x.double().softmax(-1) for x in (p_logits, q_logits))
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_gradient_of_the_loss_is_correct(temperature: float) -> None:
    student, teacher = logits(0, 3, 7).requires_grad_(), logits(1, 3, 7)
    assert torch.autograd.gradcheck(
        lambda z: forward_kl(z, teacher, temperature=temperature), (student,)
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_gradient_is_temperature_times_the_difference_of_probabilities(
    temperature: float,
) -> None:
    student, teacher = logits(0, 1, 7).requires_grad_(), logits(1, 1, 7)
    forward_kl(student, teacher, temperature=temperature).backward()
    wanted = (student / temperature).softmax(-1) - (teacher / temperature).softmax(-1)
    assert torch.allclose(student.grad, temperature * wanted.detach(), atol=1e-14)


def test_the_loss_is_the_divergence_at_temperature_one() -> None:
    student, teacher = logits(0, 4, 5, 11), logits(1, 4, 5, 11)
    assert torch.allclose(forward_kl(student, teacher), slow_kl(teacher, student).mean())


def test_the_loss_is_zero_only_for_equal_distributions() -> None:
    teacher = logits(1, 5, 9)
    assert forward_kl(teacher + 3.0, teacher).abs() < 1e-14
    assert forward_kl(teacher * 1.1, teacher) > 1e-4


def test_masked_tokens_give_no_loss_and_no_gradient() -> None:
    student, teacher = logits(0, 6, 9).requires_grad_(), logits(1, 6, 9)
    mask = torch.tensor([True, False, True, True, False, True])
    loss = forward_kl(student, teacher, mask=mask)
    loss.backward()
    assert torch.allclose(loss, forward_kl(student[mask], teacher[mask]))
    assert (student.grad[~mask] == 0).all()
    assert forward_kl(student, teacher, mask=torch.zeros(6, dtype=torch.bool)) == 0


def test_forbidden_tokens_stay_finite() -> None:
    student, teacher = logits(0, 4, 9), logits(1, 4, 9)
    student[:, -2:], teacher[:, -2:] = -torch.inf, -torch.inf  # padded vocabulary rows
    student.requires_grad_()
    loss = forward_kl(student, teacher)
    loss.backward()
    assert torch.allclose(loss, forward_kl(student[:, :-2], teacher[:, :-2]))
    assert torch.isfinite(student.grad).all()
    assert torch.allclose(kl_tokens(teacher, student).mean(), loss)


@pytest.mark.parametrize("tokens_per_chunk", [1, 4, 100])
@pytest.mark.parametrize("masked", [True, False])
def test_chunks_give_the_loss_and_the_gradients_of_the_whole(
    tokens_per_chunk: int, masked: bool
) -> None:
    heads = [nn.Linear(6, 13, bias=False, dtype=torch.float64) for _ in range(2)]
    teacher_hidden, mask = logits(2, 2, 5, 6), logits(3, 2, 5) > 0
    gradients = []
    for chunked in (True, False):
        hidden = logits(4, 2, 5, 6).requires_grad_()
        heads[0].zero_grad()
        keep = mask if masked else None
        if chunked:
            loss = chunked_forward_kl(
                hidden, teacher_hidden, *heads, mask=keep, tokens_per_chunk=tokens_per_chunk
            )
        else:
            loss = forward_kl(heads[0](hidden), heads[1](teacher_hidden), mask=keep)
        loss.backward()
        gradients.append((loss.detach(), hidden.grad, heads[0].weight.grad.clone()))
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-12)
    assert heads[1].weight.grad is None


def test_chunks_without_any_token_give_zero() -> None:
    hidden = logits(0, 3, 4).requires_grad_()
    head = nn.Linear(4, 5, dtype=torch.float64)
    loss = chunked_forward_kl(hidden, hidden, head, head, mask=torch.zeros(3, dtype=torch.bool))
    assert loss == 0


def test_cross_entropy_is_the_library_one_over_kept_tokens() -> None:
    z, targets = logits(0, 2, 6, 9), torch.arange(12).reshape(2, 6) % 9
    mask = logits(1, 2, 6) > 0
    wanted = nn.functional.cross_entropy(z[mask], targets[mask])
    assert torch.allclose(cross_entropy(z, targets, mask=mask), wanted)


def test_hidden_mse_does_not_depend_on_the_size_of_the_stream() -> None:
    student, teacher = logits(0, 4, 8), logits(1, 4, 8)
    wanted = (student - teacher).square().mean() / teacher.square().mean()
    assert torch.allclose(hidden_mse(student, teacher), wanted)
    assert torch.allclose(hidden_mse(9 * student, 9 * teacher), wanted)


def quantized_layer() -> tuple[Tensor, Grid]:
    w = logits(0, 6, 32, dtype=torch.float32)
    grid = mse_grid(w, bits=3, group_size=8, symmetric=False)
    return quantize(w, grid), grid


@pytest.mark.parametrize("steps", [0, 5])
def test_trained_scales_export_to_exactly_the_trained_weights(steps: int) -> None:
    codes, grid = quantized_layer()
    log_scale = grid.scale.log().requires_grad_()
    optimizer = torch.optim.Adam([log_scale], lr=2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        scaled_dequantize(codes, grid.zero_point, log_scale, 8).square().sum().backward()
        optimizer.step()
    exported = Grid(exported_scale(log_scale), grid.zero_point, 3, 8, False)
    trained = scaled_dequantize(codes, grid.zero_point, log_scale, 8)
    assert torch.equal(trained, dequantize(codes, exported))
    assert torch.equal(exported.scale.bfloat16().float(), exported.scale)


def test_scales_pass_through_their_logarithm_unchanged() -> None:
    codes, grid = quantized_layer()
    assert torch.equal(exported_scale(grid.scale.log()), grid.scale)
    weights = scaled_dequantize(codes, grid.zero_point, grid.scale.log(), 8)
    assert torch.equal(weights, dequantize(codes, grid))


def test_the_gradient_of_a_log_scale_is_the_weight_itself() -> None:
    codes, grid = quantized_layer()
    log_scale = grid.scale.log().requires_grad_()
    weights = scaled_dequantize(codes, grid.zero_point, log_scale, 8)
    weights.sum().backward()
    assert torch.allclose(log_scale.grad, weights.detach().reshape(6, 4, 8).sum(-1), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_token_divergence_matches_the_definition(dtype: torch.dtype) -> None:
    p, q = (logits(seed, 3, 50, 101).to(dtype) for seed in (0, 1))
    result = kl_tokens(p, q)
    assert result.shape == (3, 50)
    assert torch.allclose(result.double(), slow_kl(p, q), atol=1e-5)


def test_small_divergences_keep_their_digits_in_fp32() -> None:
    p = logits(0, 2000, 300, dtype=torch.float32)
    q = p + 0.01 * logits(1, 2000, 300, dtype=torch.float32)
    exact = slow_kl(p, q)
    assert float(kl_tokens(p, q).mean()) == pytest.approx(float(exact.mean()), rel=1e-3)
    assert kl_tokens(p, p).abs().max() == 0


def test_chunks_of_the_divergence_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = logits(0, 20, 30), logits(1, 20, 30)
    whole = kl_tokens(p, q)
    monkeypatch.setattr("compressor.algorithms.divergence.CHUNK_ELEMENTS", 70)
    assert torch.equal(kl_tokens(p, q), whole)


def test_agreement_compares_the_most_likely_tokens() -> None:
    p = torch.tensor([[1.0, 2, 0], [3, 1, 0]])
    assert top1_agreement(p, p.flip(0)).tolist() == [False, False]
    assert top1_agreement(p, 5 * p).tolist() == [True, True]
