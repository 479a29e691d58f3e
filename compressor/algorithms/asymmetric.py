"""The asymmetric target: weights that make up for the drift of their own input.

A layer of the compressed model sees x~ = x + noise, because the layers before it are compressed
already. What should be matched is the original output W x, so the problem is

    min over W^ on the grid of  || W^ X~ - W X ||^2
      =  tr((W^ - W*) H (W^ - W*)^T) + const,      W* = W (I + D H^-1),

with H = X~ X~^T and D = (X - X~) X~^T: ordinary GPTQ (or pruning) on the target W* with the same H.
This is QEP (Arai & Ichikawa 2025, arXiv 2504.09629); GPTAQ (2504.02692) and Qronos (2505.11695)
solve the same problem in the column sweep. In practice

    W* = W + a (W D) (H + lambda mean(diag H) I)^-1

where a < 1 and lambda > 0 keep a correction learned from few tokens from overfitting them. A layer
with fewer outputs than inputs needs no D: with the original outputs Y = W X,  W D = Y X~^T - W H.

# O out, I in, n calibration tokens, a strength, lambda ridge
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.algorithms.finite import require_finite
from compressor.algorithms.gptq import ROWS_AT_ONCE, cholesky_factor, times_inverse

RIDGE = 0.01


def correction_strength(num_tokens: int, columns: int) -> tuple[float, float]:
    """Strength a and ridge lambda for n tokens and I columns.

    By n / I: below 1 no correction; below 5 the full one with a strong ridge; below 50 half of it;
    all of it above. Measured at 3 bit on models below 1M parameters over n / I = 0.7 to 140; larger
    models may want other borders.
    """
    ratio = num_tokens / columns
    if ratio < 1:
        return 0.0, RIDGE
    if ratio < 5:
        return 1.0, 1.0
    return (0.5, RIDGE) if ratio < 50 else (1.0, RIDGE)


def asymmetric_target(
    w: Tensor, hessian: Tensor, cross: Tensor, *, strength: float, ridge: float
) -> Tensor:
    """W* [O, I] in fp32 for w [O, I], hessian H [I, I] and cross D [I, I].

    strength 0 or D = 0 give w back exactly. Raises NumericError NU01 for non-finite input.
    """
    if strength != 0 and len(w) < len(cross):
        drift = w.to(torch.promote_types(w.dtype, torch.float32)) @ cross
        return target_of_drift(w, hessian, drift, strength=strength, ridge=ridge)
    target = _copy(w)
    if strength == 0:
        return target
    # one correction for all rows is less work than one for each
    correction = _corrections(cross, hessian, ridge).to(target.dtype)
    for rows in torch.split(target, ROWS_AT_ONCE):
        rows.addmm_(rows.clone(), correction, alpha=strength)
    return target


def target_of_drift(
    w: Tensor, hessian: Tensor, drift: Tensor, *, strength: float, ridge: float
) -> Tensor:
    """The same from W D [O, I], as it is or as `hessian.OutputAccumulator` has it."""
    return _copy(w).add_(_corrections(drift, hessian, ridge), alpha=strength)


def _copy(w: Tensor) -> Tensor:
    target = w.to(torch.promote_types(w.dtype, torch.float32), copy=True)
    require_finite(target, "the weights to be corrected")
    return target


def _corrections(left: Tensor, hessian: Tensor, ridge: float) -> Tensor:
    """left (H + ridge mean(diag H) I)^-1, some rows at once."""
    require_finite(left, "the input drift statistics of a layer")
    root, _ = cholesky_factor(hessian, dampening=ridge)  # = R R^T
    left = left.to(root.dtype)
    return torch.cat([times_inverse(rows, root) for rows in torch.split(left, ROWS_AT_ONCE)])
