"""Distillation losses, trainable scales and divergence."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.algorithms.distillation import (
    Divergence,
    Kind,
    attention_relation,
    chunked_sum,
    exported_scale,
    hidden_mse,
    scaled_dequantize,
    token_cross_entropy,
)
from compressor.algorithms.divergence import kl_tokens, top1_agreement
from compressor.algorithms.grid import Grid, dequantize, mse_grid, quantize


def logits(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype) * 2


def slow_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    p, q = (x.double().softmax(-1) for x in (p_logits, q_logits))
    return (p * (p / q).log()).sum(-1)


def slow_distance(kind: str, z: Tensor, t: Tensor, beta: float) -> Tensor:
    q, p = z.softmax(-1), t.softmax(-1)
    m = beta * p + (1 - beta) * q
    distances = {
        "forward_kl": slow_kl(t, z),
        "reverse_kl": slow_kl(z, t),
        "jsd": beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1),
        "total_variation": 1 - torch.minimum(p, q).sum(-1),
    }
    return distances[kind]


KINDS = ["forward_kl", "reverse_kl", "jsd", "total_variation"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_distances_are_their_definitions_and_their_gradients_are_correct(
    kind: Kind, temperature: float
) -> None:
    student, teacher = logits(0, 3, 7).requires_grad_(), logits(1, 3, 7)
    divergence = Divergence(kind, 0.3, temperature)
    slow = slow_distance(kind, student / temperature, teacher / temperature, 0.3)
    assert torch.allclose(divergence.of_logits(student, teacher), temperature**2 * slow)
    assert torch.autograd.gradcheck(lambda z: divergence.of_logits(z, teacher), (student,))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_gradient_is_temperature_times_the_difference_of_probabilities(
    temperature: float,
) -> None:
    student, teacher = logits(0, 1, 7).requires_grad_(), logits(1, 1, 7)
    loss = Divergence(temperature=temperature).of_logits(student, teacher).sum()
    wanted = (student / temperature).softmax(-1) - (teacher / temperature).softmax(-1)
    found = torch.autograd.grad(loss, student)[0]
    assert torch.allclose(found, temperature * wanted.detach(), atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_distances_are_zero_only_for_equal_distributions(kind: Kind) -> None:
    teacher = logits(1, 5, 9)
    assert (Divergence(kind).of_logits(teacher + 3.0, teacher).abs() < 1e-14).all()
    assert (Divergence(kind).of_logits(teacher * 1.1, teacher) > 1e-4).all()


def test_a_mixture_that_is_all_teacher_is_worth_nothing_and_its_slope_is_the_forward_kl() -> None:
    student, teacher = logits(0, 5, 9), logits(1, 5, 9)
    small = Divergence("jsd", 1e-6).of_logits(student, teacher) / 1e-6
    assert torch.allclose(small, slow_kl(teacher, student), rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_forbidden_tokens_stay_finite(kind: Kind) -> None:
    student, teacher = logits(0, 4, 9), logits(1, 4, 9)
    student[:, -2:], teacher[:, -2:] = -torch.inf, -torch.inf  # padded vocabulary rows
    student.requires_grad_()
    loss = Divergence(kind).of_logits(student, teacher)
    assert torch.allclose(loss, Divergence(kind).of_logits(student[:, :-2], teacher[:, :-2]))
    assert torch.isfinite(torch.autograd.grad(loss.sum(), student)[0]).all()


@pytest.mark.parametrize("tokens_per_chunk", [1, 4, 100])
def test_chunks_give_the_sum_and_the_gradients_of_the_whole(tokens_per_chunk: int) -> None:
    heads = [nn.Linear(6, 13, bias=False, dtype=torch.float64) for _ in range(2)]
    unused = nn.Parameter(torch.zeros(3))
    teacher_hidden, gradients = logits(2, 10, 6), []

    def loss_of(part: Tensor, rows: slice) -> Tensor:
        wanted = heads[1](teacher_hidden[rows]).detach()
        return Divergence().of_logits(heads[0](part), wanted).sum()

    shared = [heads[0].weight, unused]
    for size in (tokens_per_chunk, None):
        hidden = logits(4, 10, 6).requires_grad_()
        heads[0].zero_grad()
        whole = slice(0, 10)
        loss = (
            chunked_sum(loss_of, hidden, shared=shared, tokens_per_chunk=size)
            if size
            else loss_of(hidden, whole)
        )
        (3 * loss).backward()
        gradients.append((loss.detach(), hidden.grad, heads[0].weight.grad.clone()))
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-12)
    assert unused.grad is None


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, list | tuple) else [out]:
            self.numbers = max(self.numbers, item.numel() if isinstance(item, Tensor) else 0)
        return out


def test_neither_forwards_nor_backwards_are_all_logits_there_at_once() -> None:
    head, hidden = nn.Linear(4, 50), logits(0, 64, 4, dtype=torch.float32).requires_grad_()

    def loss_of(part: Tensor, rows: slice) -> Tensor:
        return Divergence().of_logits(head(part), head(part.detach() + 1)).sum()

    with Largest() as seen:
        chunked_sum(loss_of, hidden, shared=head.parameters(), tokens_per_chunk=8).backward()
    assert hidden.grad is not None
    assert seen.numbers == 8 * 50


def test_chunks_without_gradients_only_add_up() -> None:
    hidden = logits(0, 9, 4)
    total = chunked_sum(lambda part, _: part.sum(), hidden, shared=[], tokens_per_chunk=2)
    assert torch.allclose(total, hidden.sum())
    assert not total.requires_grad


def test_cross_entropy_is_the_library_one() -> None:
    z, targets = logits(0, 2, 6, 9), torch.arange(12).reshape(2, 6) % 9
    wanted = nn.functional.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="none")
    assert torch.allclose(token_cross_entropy(z, targets).flatten(), wanted)


def test_relations_of_tokens_are_their_definition_and_need_no_equal_widths() -> None:
    student, teacher = logits(0, 2, 5, 8).requires_grad_(), logits(1, 2, 5, 12)
    total = torch.zeros((), dtype=torch.float64)
    for b, r, i in itertools.product(range(2), range(2), range(5)):
        rows = []
        for x, width in ((student, 4), (teacher, 6)):
            part = x[b, : i + 1, r * width : (r + 1) * width]
            rows.append(part[i] @ part.T / width**0.5)
        total = total + slow_kl(rows[1], rows[0])
    loss = attention_relation(student, teacher, heads=2)
    assert torch.allclose(loss, total / 20)
    assert torch.autograd.gradcheck(lambda x: attention_relation(x, teacher, heads=2), (student,))
    assert attention_relation(teacher, teacher, heads=3).abs() < 1e-12


def test_hidden_mse_does_not_depend_on_the_size_of_the_stream() -> None:
    student, teacher = logits(0, 4, 8), logits(1, 4, 8)
    wanted = (student - teacher).square().mean() / teacher.square().mean()
    assert torch.allclose(hidden_mse(student, teacher), wanted)
    assert torch.allclose(hidden_mse(9 * student, 9 * teacher), wanted)
    rows = hidden_mse(torch.stack([student, teacher]), torch.stack([teacher, student]))
    assert torch.allclose(rows, (wanted + hidden_mse(teacher, student)) / 2)


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
