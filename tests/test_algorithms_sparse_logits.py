"""Top-k and sampled targets: bounds, means, and what is on disk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.algorithms.distillation import Divergence, Kind
from compressor.algorithms.sparse_logits import (
    Sampled,
    TopK,
    bytes_per_token,
    decode,
    encode,
    sample,
    token_losses,
    top_k,
)

KL = Divergence()


def logits(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * 2


def slow_top_k(z: Tensor, t: Tensor, count: int) -> Tensor:
    """KL of one token over the `count` likeliest outcomes of the teacher and the sum of others."""
    q, p = z.softmax(-1), t.softmax(-1)
    kept = p.argsort(descending=True)[:count]
    merged = [torch.cat([x[kept], 1 - x[kept].sum(0, keepdim=True)]) for x in (p, q)]
    return (merged[0] * (merged[0] / merged[1]).log()).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_is_a_divergence_over_merged_outcomes(temperature: float) -> None:
    z, t, divergence = logits(0, 6, 11), logits(1, 6, 11), Divergence(temperature=temperature)
    slow = torch.stack(
        [slow_top_k(a / temperature, b / temperature, 4) for a, b in zip(z, t, strict=True)]
    )
    found = token_losses(z, top_k(t, 4, divergence), divergence)
    assert torch.allclose(found, temperature**2 * slow)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "total_variation"])
def test_merging_outcomes_never_raises_a_distance(kind: Kind) -> None:
    z, t, divergence = logits(0, 40, 11), logits(1, 40, 11), Divergence(kind)
    known = [token_losses(z, top_k(t, count, divergence), divergence) for count in range(1, 11)]
    full = divergence.of_logits(z, t)
    for fewer, more in zip(known, [*known[1:], full], strict=True):
        assert (fewer <= more + 1e-12).all()
    assert torch.allclose(known[-1], full)


def test_the_gradient_of_top_k_is_correct_even_where_nothing_is_left() -> None:
    z, t = logits(0, 3, 9).requires_grad_(), logits(1, 3, 9)
    target = top_k(t, 3, KL)
    assert torch.autograd.gradcheck(lambda x: token_losses(x, target, KL), (z,))
    sure = torch.zeros(1, 9)
    sure[0, 2] = 80.0  # the rest has a mass of 1e-34
    sure.requires_grad_()
    loss = token_losses(sure, top_k(sure.detach(), 1, KL), KL).sum()
    assert torch.autograd.grad(loss, sure)[0].abs().max() < 1e-6


def test_samples_give_the_divergence_and_its_gradient_on_average() -> None:
    z, t = logits(0, 1, 8).requires_grad_(), logits(1, 1, 8)
    generator = torch.Generator().manual_seed(0)
    drawn = sample(t, 40_000, KL, generator)
    losses = [token_losses(z, drawn, KL).sum(), KL.of_logits(z, t).sum()]
    found, wanted = (torch.autograd.grad(loss, z)[0] for loss in losses)
    assert abs(losses[0].item() - losses[1].item()) < 0.05
    assert (found - wanted).abs().max() < 0.01


@pytest.mark.parametrize("vocabulary", [40, 65_536, 70_000])
@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_what_is_on_disk_has_the_size_foretold_and_reads_back(kind: str, vocabulary: int) -> None:
    t = logits(0, 5, vocabulary).float()
    generator = torch.Generator().manual_seed(0)
    target = top_k(t, 7, KL) if kind == "top_k" else sample(t, 7, KL, generator)
    stored = encode(target, vocabulary)
    assert sum(x.nbytes for x in stored.values()) == 5 * bytes_per_token(kind, 7, vocabulary)
    found = decode(stored)
    assert torch.equal(found.ids, target.ids)
    if isinstance(found, TopK):
        assert isinstance(target, TopK)
        assert (found.log_p.exp() - target.log_p.exp()).abs().max() < 2e-4
        assert torch.allclose(found.log_p.exp().sum(-1), torch.ones(5))
    else:
        assert isinstance(target, Sampled)
        assert torch.allclose(found.entropy, target.entropy, rtol=1e-3)


def test_targets_are_cut_by_rows() -> None:
    t = logits(0, 5, 9)
    whole = token_losses(t + 1, top_k(t, 2, KL), KL)
    part = token_losses(t[1:3] + 1, top_k(t, 2, KL)[1:3], KL)
    assert torch.equal(whole[1:3], part)


def test_keeping_every_token_leaves_no_rest_and_is_refused() -> None:
    with pytest.raises(ValueError, match="no rest"):
        top_k(logits(0, 2, 9), 9, KL)
