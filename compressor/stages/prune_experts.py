"""Prune experts: in every layer those that contribute least to what the router makes of them go.

    importance    mean of g ||f(x)|| over the tokens x sent to it, g the router's weight

(REAP, Lasby et al. 2025, arXiv 2510.13999). Block by block, on activations of the blocks already
pruned. The kept experts are numbered anew, the router loses the rows of the others, and the
configuration says how many are left; tokens still go to as many experts as before.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compressor.algorithms.structured import select_channels
from compressor.errors import RecipeError, UnsupportedError
from compressor.modeling.block import Block
from compressor.modeling.experts import SplitExperts
from compressor.modeling.skeleton import parse_config
from compressor.modeling.state import BlockTensors
from compressor.recipe import PruneConfig
from compressor.stages.blockwise import Sweep
from compressor.stages.context import StageContext, StageReport
from compressor.stages.kept import kept_count

COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


def prune_experts(config: PruneConfig, context: StageContext) -> StageReport:
    """Keep the most important experts of every layer.

    Raises:
        RecipeError: more experts than there are, or fewer than a token goes to (RC17).
        UnsupportedError: a model without experts, or with experts in groups (CK26).
    """
    before, after = _counts(config, context.state.config)
    new = dict(context.state.config)
    new |= {key: after for key in COUNT_KEYS if key in new}
    sweep = Sweep(context)

    def rewrite(
        position: int, original: Block, source: BlockTensors
    ) -> tuple[BlockTensors, dict[str, Any]]:
        found = _experts(original.module, before)
        if found is None:
            return source, {}
        scores = _importance(sweep, original, position, found)
        kept = select_channels(scores, after)
        total = max(float(scores.sum()), 1e-30)
        fact = {"kept": kept.tolist(), "of": before, "share": float(scores[kept].sum()) / total}
        return _without_others(source, found, kept), {found: fact}

    done = sweep.run(rewrite, shape_of=replace(context.state, config=new))
    facts = {"linears": {}, "experts": done.linears, "held_out_kl": done.held_out_kl}
    return StageReport(done.state, facts)


def _counts(config: PruneConfig, old: dict[str, Any]) -> tuple[int, int]:
    """Experts of a layer before and after."""
    assert config.width is not None, "called for width"
    asked = config.width.experts
    assert asked is not None, "called for experts"
    before = next((int(old[key]) for key in COUNT_KEYS if old.get(key)), 0)
    if not before or (old.get("n_group") or 1) > 1:
        why = "its experts form groups" if before else "it has no experts"
        raise UnsupportedError(
            f"{old.get('model_type')}: experts cannot be pruned, {why}", code="CK26"
        )
    after = kept_count(config, "experts", asked, (before, 1))
    least = int(getattr(parse_config(old), "num_experts_per_tok", 1))
    if not least <= after < before:
        raise RecipeError(
            f"width.experts keeps {after} of {before} experts, {least} of them for each token",
            code="RC17",
            where=config.where("width.experts"),
            fix=f"keep {least} to {before - 1}",
        )
    return before, after


def _experts(module: nn.Module, count: int) -> str | None:
    """The name of a block's experts; None for a dense block."""
    found = [n for n, m in module.named_modules() if isinstance(m, SplitExperts)]
    return next((n for n in found if len(module.get_submodule(n)) == count), None)  # type: ignore[arg-type]


@torch.no_grad()
def _importance(sweep: Sweep, block: Block, position: int, name: str) -> Tensor:
    """Mean of router weight x output norm of each expert [E]; 0 for one that saw no token."""
    experts = block.module.get_submodule(name)
    assert isinstance(experts, SplitExperts), "found by its class"
    sums = torch.zeros(len(experts), device=sweep.walk.device)
    counts = torch.zeros_like(sums)

    def note(_: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, chosen, weights = args
        for index, expert in enumerate(experts):
            token, slot = torch.where(chosen == index)
            norms = expert(hidden[token]).float().norm(dim=-1) * weights[token, slot].float()
            sums[index] += norms.sum()
            counts[index] += len(token)

    handle = experts.register_forward_pre_hook(note)
    try:
        for rows in sweep.walk.batches(sweep.rows):
            hidden = sweep.streams.compressed.read(rows)
            block.run(hidden, sweep.walk.kwargs(rows, position))
    finally:
        handle.remove()
    return (sums / counts.clamp(min=1)).cpu()


def _without_others(source: BlockTensors, experts: str, kept: Tensor) -> BlockTensors:
    """The block's tensors with the kept experts numbered anew, and their rows of the router."""
    new = {int(old): number for number, old in enumerate(kept)}
    pattern = re.compile(rf"^{re.escape(experts)}\.(\d+)\.")
    count = 1 + max(int(m[1]) for m in map(pattern.match, source.tensors) if m)
    router = experts.rpartition(".")[0]

    def name_of(old: str) -> str | None:
        match = pattern.match(old)
        if match is None:
            return old
        number = new.get(int(match[1]))
        return None if number is None else f"{experts}.{number}.{old[match.end() :]}"

    tensors: dict[str, Tensor] = {}
    for name, tensor in source.tensors.items():
        here = name_of(name)
        if here is None:
            continue
        is_router = here == name and name.startswith(f"{router}.") and len(tensor) == count
        tensors[here] = tensor[kept] if is_router and "shared" not in name else tensor
    formats = {n: f for n, f in ((name_of(n), f) for n, f in source.formats.items()) if n}
    masked = frozenset(n for n in map(name_of, source.masked) if n)
    return BlockTensors(tensors, formats, masked)
