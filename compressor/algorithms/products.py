"""Products of float32 matrices on a CPU, by the library that is quicker there.

torch lets MKL multiply, and MKL runs AVX2 code on every processor that Intel did not make. Where
such a processor has AVX-512, oneDNN (torch carries both) multiplies twice as fast, and as
exactly: float32 factors, float32 sums. Small products stay with MKL, oneDNN takes longer to start.

torch can hand all its products to oneDNN (`torch.backends.mkldnn.matmul.fp32_precision = "bf16"`),
but then attention's many small ones go there, too, and take three times as long; and where a
processor has matrix tiles, that setting computes in bf16.

# T tokens, O out, I in
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor_kernels import native

SMALLEST = 1 << 22  # multiplications


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b with gradients: x [..., I], weight [O, I], bias [O] -> [..., O] in x's dtype."""
    if not _is_for_onednn(x, weight):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _onednn(x, weight, bias)
    found: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return found


def by_feature(x: Tensor) -> Tensor:
    """x [T, I] as [I, T], laid out for `add_products` of it or of some of its rows."""
    return x.T.contiguous() if _is_for_onednn(x.T, x.T) else x.T


def add_products(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add sum_t a_t b_t^T to `total` [O, I] in place: a [O, T], b [I, T], from `by_feature`."""
    if _is_for_onednn(a, b):
        total.add_(_onednn(a, b))
    else:
        total.addmm_(a, b.T)


class _Linear(torch.autograd.Function):
    """F.linear, all three products of it by oneDNN."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            _onednn(gradient, weight.T) if wants_x else None,
            _onednn(rows.T, x.flatten(0, -2).T) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b; parts of wider matrices are copied, those oneDNN multiplies very slowly."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(
        _whole(x), _whole(weight), bias, "none", [], ""
    )
    return found


def _whole(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether x W^T is large enough, float32 all through, and oneDNN is the quicker library."""
    if x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return False
    if x.numel() * weight.shape[0] < SMALLEST or x.dim() < 2:
        return False
    return onednn_is_quicker() and not torch.is_autocast_enabled("cpu")


@cache
def onednn_is_quicker() -> bool:
    """Whether this processor has AVX-512 that MKL does not use."""
    mkl, onednn = torch.backends.mkl, torch.backends.mkldnn
    if not mkl.is_available() or not onednn.is_available():  # type: ignore[no-untyped-call]
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    made_by_amd = "AuthenticAMD" in native.processor()
    return made_by_amd and hasattr(torch.ops.mkldnn, "_linear_pointwise")
