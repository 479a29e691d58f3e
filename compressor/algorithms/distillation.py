"""Losses that teach a compressed student what the original would have said.

With student logits z, teacher logits t and temperature T,

    forward_kl = T^2 KL(softmax(t/T) || softmax(z/T)),    d/dz = T (softmax(z/T) - softmax(t/T)).

The factor T^2 keeps the size of the gradient independent of T (Hinton et al. 2015, section 2). The
teacher never receives a gradient. All losses are means over the tokens that ``mask`` leaves.

A vocabulary of 150k makes logits the largest tensor of training. ``chunked_forward_kl`` therefore
takes hidden states and heads, and makes the logits of a few hundred tokens at a time; the backward
pass makes them again instead of keeping them.

``scaled_dequantize`` is the weight of a quantized layer as a function of its scales only: codes and
zero points stay as they are, log(scale) is trained (an absolute step that suits one scale ruins
another; a relative one suits all). Its forward value is bit for bit what ``grid.dequantize`` gives
for the exported scale; the rounding of the scale passes gradients straight through.

# T tokens (B batch x S steps), V vocabulary, D hidden width, O out, I in, G groups
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TOKENS_PER_CHUNK = 512

Head = Callable[[Tensor], Tensor]


def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Scalar T^2 KL(teacher || student), averaged over tokens. Logits [..., V], mask [...] bool."""
    return masked_mean(_kl_per_token(student_logits, teacher_logits, temperature), mask)


def chunked_forward_kl(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_head: Head,
    teacher_head: Head,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    tokens_per_chunk: int = TOKENS_PER_CHUNK,
) -> Tensor:
    """``forward_kl`` of head(hidden) without ever holding the logits of more than one chunk.

    Hidden states are [..., D]; heads map [t, D] to [t, V] (an ``nn.Linear`` will do). Gradients
    reach student_hidden and the parameters of student_head. Tokens that the mask drops cost
    nothing.
    """
    student, teacher = _rows(student_hidden, mask), _rows(teacher_hidden, mask)

    def chunk_loss(hidden: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher_head(target)
        return _kl_per_token(student_head(hidden), wanted, temperature).sum()

    total = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32))
    chunks = zip(
        torch.split(student, tokens_per_chunk),
        torch.split(teacher.detach(), tokens_per_chunk),
        strict=True,
    )
    for hidden, target in chunks:
        part = checkpoint(chunk_loss, hidden, target, use_reentrant=False)
        total = total + part
    return total / max(student.shape[0], 1)


def cross_entropy(logits: Tensor, targets: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Scalar mean of -log q(target) in nats. Logits [..., V] already aligned with targets [...]."""
    log_q = torch.log_softmax(_wide(logits), dim=-1)
    loss = -log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return masked_mean(loss, mask)


def hidden_mse(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Scalar mean squared difference of hidden states [..., D], relative to the teacher's power.

    Dividing by mean(teacher^2) makes one weight fit all layers, though the size of the residual
    stream grows with depth.
    """
    target = _wide(teacher.detach())
    error = (_wide(student) - target).square().mean(dim=-1)
    power = masked_mean(target.square().mean(dim=-1), mask)
    return masked_mean(error, mask) / power.clamp(min=1e-12)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of values [...] where mask is True; 0 if it is True nowhere."""
    if mask is None:
        return values.mean()
    kept = values.masked_fill(~mask, 0)  # not a product: 0 * nan would stay nan
    return kept.sum() / mask.sum().clamp(min=1)


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
    info = torch.finfo(scale_dtype)
    scale = log_scale.detach().exp().clamp(info.tiny, info.max)
    return scale.to(scale_dtype).to(log_scale.dtype)


def _kl_per_token(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL of each token: [..., V] -> [...]."""
    log_q = torch.log_softmax(_wide(student) / temperature, dim=-1)
    log_p = torch.log_softmax(_wide(teacher.detach()) / temperature, dim=-1)
    impossible = log_p == -torch.inf  # p = 0 contributes 0, whatever q says
    difference = log_p.masked_fill(impossible, 0) - log_q.masked_fill(impossible, 0)
    return (log_p.exp() * difference).sum(dim=-1) * temperature**2


def _rows(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """[..., D] -> [t, D], only the tokens that count."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    return rows if mask is None else rows[mask.reshape(-1)]


def _wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
