"""Structured pruning: which channels, head groups and blocks matter, and how to mend the cut.

    MLP channel i     sqrt(E[a_i^2]) ||W_down[:, i]||        what it adds to the residual stream
    KV group g        sqrt(sum of E[o_i^2] ||W_o[:, i]||^2 over the inputs i of the group)
    block             1 - cos(x_in, x_out), averaged over tokens       (block influence)
    expert            g ||f(x)||, averaged over the tokens x that the router sends to it with
                      weight g                                         (REAP)

Forward statistics only, in the manner of Minitron (Muralidharan et al. 2024, arXiv 2407.14679) and
ShortGPT (Men et al. 2024, arXiv 2403.03853); experts as in REAP (Lasby et al. 2025, arXiv
2510.13999).

After channels P are removed and K kept, the next linear layer is re-solved. Its lost output is
predicted from the kept inputs by least squares,

    W' = W_K + W_P H_PK (H_KK + lambda mean(diag H_KK) I)^-1,

which changes nothing if the removed channels were silent or had zero weights.

# O out, I in, T tokens
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.algorithms.finite import require_finite
from compressor.algorithms.gptq import cholesky_factor, times_inverse


def mlp_channel_importance(act_sq_mean: Tensor, down_weight: Tensor) -> Tensor:
    """Importance [I] from E[a_i^2] [I] of the inputs of down_proj and its weight [O, I]."""
    column_norm: Tensor = down_weight.float().square().sum(dim=0).sqrt()
    return act_sq_mean.float().clamp(min=0).sqrt() * column_norm


def kv_group_importance(
    o_input_energy: Tensor, *, num_kv_heads: int, o_weight: Tensor | None = None
) -> Tensor:
    """Importance [num_kv_heads] of each KV head with all query heads that share it.

    o_input_energy: E[o_i^2] [I] of the inputs of o_proj, heads in order, so that the query heads of
    a KV group are neighbours. With o_weight [O, I] the inputs count by what o_proj makes of them.
    """
    energy = o_input_energy.float().clamp(min=0)
    if o_weight is not None:
        energy = energy * o_weight.float().square().sum(dim=0)
    return energy.reshape(num_kv_heads, -1).sum(dim=1).sqrt()


def block_influence(x_in: Tensor, x_out: Tensor) -> float:
    """1 - mean cosine between the input and output [..., D] of a block: 0 = it does nothing."""
    cosine = torch.nn.functional.cosine_similarity(x_in.float(), x_out.float(), dim=-1)
    return float(1 - cosine.mean(dtype=torch.float64))


def select_channels(importance: Tensor, keep: int, multiple_of: int = 1) -> Tensor:
    """Sorted int64 indices of the most important channels.

    ``keep`` is rounded up to a multiple of ``multiple_of`` (kernels want aligned sizes) but never
    beyond what there is. Equal importance: the lower index is kept.
    """
    if not 0 < keep <= len(importance):
        raise ValueError(f"cannot keep {keep} of {len(importance)} channels")
    count = min(-(-keep // multiple_of) * multiple_of, len(importance))
    order = torch.argsort(importance, descending=True, stable=True)
    return order[:count].sort().values


def repair_linear(weight: Tensor, kept: Tensor, hessian: Tensor, *, ridge: float = 1e-4) -> Tensor:
    """W' [O, len(kept)] in fp32 that best replaces weight [O, I] on the kept inputs.

    kept: int64 indices. hessian: E[x x^T] [I, I] of the dense layer's inputs. The mean squared
    output error is never above that of plain weight[:, kept], up to rounding. Raises NumericError
    NU01 for non-finite input.
    """
    require_finite(weight, "the weights to be repaired")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    weight, hessian = weight.to(dtype), hessian.to(dtype)
    removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    removed[kept] = False
    root, _ = cholesky_factor(hessian[kept][:, kept], dampening=ridge)
    lost = weight[:, removed] @ hessian[removed][:, kept]
    return weight[:, kept] + times_inverse(lost, root)
