"""Losses that teach a compressed student what the original would have said.

With log-probabilities log p = log softmax(t/T) of the teacher, log q = log softmax(z/T) of the
student and temperature T, for each token

    forward_kl       T^2 sum_v p (log p - log q)          d/dz = T (q - p)
    reverse_kl       T^2 sum_v q (log q - log p)
    jsd              T^2 (b KL(p || m) + (1-b) KL(q || m)),   m = b p + (1-b) q
    total_variation  T^2 sum_v |p - q| / 2                = T^2 (1 - rate of accepted drafts)

The factor T^2 keeps the size of the gradient independent of T (Hinton et al. 2015, section 2); jsd
as in GKD (arXiv 2306.13649), total variation as in DistillSpec (arXiv 2310.08461). The teacher
never receives a gradient. What a teacher says may be a whole distribution or the few numbers that
`sparse_logits` keeps of it.

A vocabulary of 150k makes logits the largest tensor of training. `chunked_sum` therefore asks for
the losses of a few tokens at a time, takes their gradient at once and keeps that instead of logits:
neither forwards nor backwards do the logits of more than one chunk exist.

`scaled_dequantize` is the weight of a quantized layer as a function of its scales only: codes and
zero points stay as they are, log(scale) is trained (an absolute step that suits one scale ruins
another; a relative one suits all). Its forward value is bit for bit what ``grid.dequantize`` gives
for the exported scale; the rounding of the scale passes gradients straight through.

# t or T tokens (B batch x S steps), V vocabulary, D hidden width, O out, I in, G groups, R heads
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compressor.algorithms.grid import as_stored

Kind = Literal["forward_kl", "reverse_kl", "jsd", "total_variation"]
LossOf = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True, slots=True)
class Divergence:
    """Which distance of two distributions is taken, at which temperature."""

    kind: Kind = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """log softmax(logits / T) in at least fp32, [..., V] -> [..., V]."""
        known = wide(logits)
        return torch.log_softmax(
            known if self.temperature == 1 else known / self.temperature, dim=-1
        )

    def between(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Distance of student q and teacher p for each token: two [..., V] -> [...]."""
        log_p = log_p.detach()
        return _DISTANCES[self.kind](log_q, log_p, self.beta) * self.temperature**2

    def of_logits(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The same from logits, [..., V] -> [...]."""
        if self.kind == "forward_kl":
            value: Tensor = _ForwardKl.apply(student, teacher.detach(), self)  # type: ignore[no-untyped-call]
            return value
        return self.between(
            self.log_probabilities(student), self.log_probabilities(teacher.detach())
        )


class _ForwardKl(torch.autograd.Function):
    """T^2 KL(p || q) of logits; its gradient T (q - p) is made in place, beside the value."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, divergence: Divergence) -> Tensor:
        log_q = divergence.log_probabilities(student)
        log_p = divergence.log_probabilities(teacher)
        p = log_p.exp()
        difference = log_p.sub_(log_q)
        value: Tensor = torch.linalg.vecdot(p, difference)
        if not bool(value.isfinite().all()):  # impossible tokens: 0 times infinity counts as 0
            value = torch.linalg.vecdot(p, difference.masked_fill_(p == 0, 0))
        value = value * divergence.temperature**2
        ctx.save_for_backward(log_q.exp_().sub_(p))
        ctx.temperature, ctx.dtype = divergence.temperature, student.dtype
        return value

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        found: Tensor = gradient * (factor * ctx.temperature).unsqueeze(-1)
        return found.to(ctx.dtype), None, None


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of each row; a = 0 contributes 0, whatever b says."""
    impossible = log_a == -torch.inf
    difference = log_a.masked_fill(impossible, 0) - log_b.masked_fill(impossible, 0)
    return (log_a.exp() * difference).sum(dim=-1)


def _jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    impossible = (log_p == -torch.inf) & (log_q == -torch.inf)
    known_p, known_q = (x.masked_fill(impossible, -1e4) for x in (log_p, log_q))  # exp gives 0
    log_m = torch.logaddexp(known_p + math.log(beta), known_q + math.log1p(-beta))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


_DISTANCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": lambda log_q, log_p, _: _kl(log_p, log_q),
    "reverse_kl": lambda log_q, log_p, _: _kl(log_q, log_p),
    "jsd": _jsd,
    "total_variation": lambda log_q, log_p, _: (log_p.exp() - log_q.exp()).abs().sum(-1) / 2,
}


class _ChunkedSum(torch.autograd.Function):
    """The sum of losses by chunk; gradients are taken forwards, while a chunk's logits exist."""

    @staticmethod
    def forward(ctx: Any, loss_of: LossOf, size: int, hidden: Tensor, *shared: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        of_hidden = torch.zeros_like(hidden)
        of_shared: list[Tensor | None] = [None] * len(shared)
        for begin in range(0, len(hidden), size):
            rows = slice(begin, begin + size)
            with torch.enable_grad():
                part = hidden[rows].detach().requires_grad_()
                loss = loss_of(part, rows)
                found = torch.autograd.grad(loss, [part, *shared], allow_unused=True)
            total += loss.detach()
            of_hidden[rows] = found[0]
            for i, gradient in enumerate(found[1:]):
                if gradient is not None:
                    known = of_shared[i]
                    of_shared[i] = gradient if known is None else known.add_(gradient)
        ctx.gradients = [of_hidden, *of_shared]
        return total.to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(None if g is None else g * factor for g in ctx.gradients))


def chunked_sum(
    loss_of: LossOf, hidden: Tensor, *, shared: Iterable[Tensor], tokens_per_chunk: int
) -> Tensor:
    """Scalar sum of loss_of(hidden[rows], rows) over chunks of rows, with gradients.

    Args:
        loss_of: scalar loss of hidden states [t, D] that are the given rows of all of them. It is
            called once for each chunk; its logits are free before the next one.
        hidden: [N, D].
        shared: parameters that `loss_of` uses (the head); they get gradients as `hidden` does.
    """
    trained = [p for p in shared if p.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or trained):
        total: Tensor = _ChunkedSum.apply(loss_of, tokens_per_chunk, hidden, *trained)  # type: ignore[no-untyped-call]
        return total
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for begin in range(0, len(hidden), tokens_per_chunk):
        rows = slice(begin, begin + tokens_per_chunk)
        total = total + loss_of(hidden[rows], rows)
    return total.to(torch.promote_types(hidden.dtype, torch.float32))


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log q(target) of each token in nats: logits [..., V], targets [...] -> [...]."""
    log_q = torch.log_softmax(wide(logits), dim=-1)
    return -log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def hidden_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Scalar mean squared difference of hidden states [..., S, D], relative to the teacher's power.

    Dividing by mean(teacher^2) of each row makes one weight fit all layers, though the size of the
    residual stream grows with depth; rows are averaged, so parts of a batch add up to the whole.
    """
    target = wide(teacher.detach())
    error = (wide(student) - target).square().mean(dim=(-2, -1))
    power = target.square().mean(dim=(-2, -1))
    return (error / power.clamp(min=1e-12)).mean()


def attention_relation(student: Tensor, teacher: Tensor, *, heads: int) -> Tensor:
    """Mean KL of how tokens relate, scalar: x [B, S, W] of one projection; widths may differ.

    A relation is softmax(x_r x_r^T / sqrt(W/R)) over the tokens up to the present one, for each of
    R = `heads` slices of the width: MiniLMv2 (arXiv 2012.15828), equation 4, made causal. `heads`
    divides both widths.
    """
    log_q, log_p = (_relation(x, heads) for x in (student, teacher.detach()))
    return _kl(log_p, log_q).mean()


def _relation(x: Tensor, heads: int) -> Tensor:
    """Log-probabilities [B, R, S, S] of the relations of x [B, S, W]."""
    slices = wide(x).reshape(*x.shape[:-1], heads, -1).transpose(1, 2)
    scores = slices @ slices.mT / math.sqrt(slices.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    return torch.log_softmax(scores.masked_fill(later, -torch.inf), dim=-1)


def scaled_dequantize(
    codes: Tensor,
    zero_point: Tensor,
    log_scale: Tensor,
    group_size: int,
    *,
    scale_dtype: torch.dtype = torch.bfloat16,
    sign: Tensor | None = None,
) -> Tensor:
    """(q - z) * scale in fp32 [O, I], differentiable in log_scale [O, G].

    codes: uint8 [O, I]; zero_point: int [O, G]; group_size: columns per group or -1; sign: +-1
    [O, G] of scales that may be negative. Equal, bit for bit, to ``dequantize`` with the scale
    ``exported_scale(log_scale) * sign``.
    """
    smooth = log_scale.exp()
    # straight-through: exactly + 0 in value, the gradient of exp in the backward pass
    scale = exported_scale(log_scale, scale_dtype=scale_dtype) + (smooth - smooth.detach())
    if sign is not None:
        scale = scale * sign
    width = codes.shape[1] if group_size == -1 else group_size
    centred = codes.reshape(len(codes), -1, width).float() - zero_point.unsqueeze(-1).float()
    return (centred * scale.unsqueeze(-1)).flatten(1)


def exported_scale(log_scale: Tensor, *, scale_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """exp(log_scale) [O, G] in fp32 as it is stored: rounded to scale_dtype, positive, normal."""
    scale = log_scale.detach().exp().clamp(min=torch.finfo(scale_dtype).tiny)
    return as_stored(scale, scale_dtype).to(log_scale.dtype)


def wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
