"""One linear: the method's mask, the weights that are left re-solved, and what was stored."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch import Tensor

from compressor.algorithms.gptq import hessian_error
from compressor.algorithms.masks import (
    alps_mask,
    magnitude,
    n_of_m_mask,
    parse_pattern,
    ria,
    sparsegpt_mask,
    unstructured_mask,
    wanda,
)
from compressor.algorithms.reconstruct import reconstruct
from compressor.modeling.linears import StoredLinear
from compressor.recipe import PruneConfig
from compressor.stages.group_sums import GroupStatistics
from compressor.stages.solve import Rounding, round_stack


def prune_linear(
    config: PruneConfig,
    linear: StoredLinear,
    *,
    name: str,
    weight: Tensor,
    statistics: GroupStatistics,
) -> dict[str, Any]:
    """Prune a linear towards W* of the dense `weight` [O, I]; the facts of the report.

    statistics: those of the linear's group.
    """
    target, strength = statistics.target(weight, [name])
    mask, first = proposed(config, target, statistics.hessian)
    kept = solved(config, target, hessian=statistics.hessian, mask=mask, first=first)
    rounding: dict[str, Any] = {}
    if linear.format is None:
        linear.set_dense(kept)
    else:
        job = Rounding(kept, statistics.hessian, linear.format, mask)
        rounding = round_stack([linear], job)
    total = hessian_error(target, statistics.hessian)
    cut = hessian_error(target * mask - target, statistics.hessian)
    error = hessian_error(linear.dense() - target, statistics.hessian)
    return {
        **rounding,
        **counts(config, linear),
        "error_before_repair": cut,
        "error": error,
        "relative_error": error / total if total else 0.0,
        "strength": strength,
        "num_tokens": statistics.num_tokens,
    }


def proposed(config: PruneConfig, target: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The method's mask [O, I] and its weights [O, I], zero where the mask is False."""
    if config.method == "sparsegpt":
        return sparsegpt_mask(target, hessian, sparsity=config.sparsity, pattern=config.pattern)
    if config.method == "alps":
        return alps_mask(target, hessian, choose=partial(mask_of, config, per="layer"))
    if config.method == "magnitude":
        scores = magnitude(target)
    else:
        scores = {"wanda": wanda, "ria": ria}[config.method](target, hessian.diagonal())
    mask = mask_of(config, scores)
    return mask, target * mask


def solved(
    config: PruneConfig, target: Tensor, *, hessian: Tensor, mask: Tensor, first: Tensor
) -> Tensor:
    """The weights [O, I] to store, from the method's mask and weights."""
    return reconstruct(target, hessian, mask, start=first) if config.reconstruct else first


def mask_of(config: PruneConfig, scores: Tensor, *, per: Literal["row", "layer"] = "row") -> Tensor:
    """True where a weight is kept [O, I]."""
    if config.pattern is not None:
        n, m = parse_pattern(config.pattern)
        return n_of_m_mask(scores, n=n, m=m)
    assert config.sparsity is not None, "the recipe has exactly one of the two"
    return unstructured_mask(scores, sparsity=config.sparsity, per=per)


def counts(config: PruneConfig, linear: StoredLinear) -> dict[str, Any]:
    """Zeros as stored: counted after the cast to the stored dtype or the grid."""
    dense = linear.dense()
    zeros = int((dense == 0).sum())
    asked = config.pattern or config.sparsity
    counts = {"num_zeros": zeros, "num_weights": dense.numel()}
    return {"pruned_by": config.method, "asked": asked, **counts}
