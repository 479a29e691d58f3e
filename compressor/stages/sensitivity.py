"""How much each unit of linears minds each format: swap-in KL and output Fisher.

Both use the quantizer that is shipped, GPTQ on the Hessian of the original stream, and run what it
would store (also what a format does to the inputs).

* swap-in KL: put one unit in one format, everything else original, and measure KL(original ||
  swapped) at the logits. Only the blocks after the swap run again, and all variants of a block
  share each load of a later block. The most faithful score, in nats a token.
* output Fisher (as in ModelOpt's AutoQuantize): sum over tokens and outputs of (g_k dy_k)^2 with
  dy = dW x and g the gradient of the log-likelihood of tokens drawn from the model itself. One
  backward walk serves all units and formats; its scale is fitted to a few swap-in values.

Legend: R rows, T tokens, D width, V variants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.algorithms.divergence import kl_tokens
from compressor.algorithms.hessian import HessianAccumulator
from compressor.artifact.formats import LayerFormat
from compressor.modeling.activations import ActivationStore
from compressor.modeling.block import Block, input_phases, inputs_of, load_block
from compressor.modeling.linears import StoredLinear
from compressor.modeling.state import BlockTensors
from compressor.modeling.walk import Walk
from compressor.recipe import QuantizeConfig
from compressor.stages.backward import block_inputs, head_gradient, push_back
from compressor.stages.context import StageContext
from compressor.stages.solve import Rounding, round_stack, round_to_nearest
from compressor.stages.statistics import calibration_rows

Scores = dict[str, dict[str, float]]
OnBlock = Callable[[Scores], None]  # told the scores of each block as soon as they are there
SCORING_ROWS = 32


@dataclass(frozen=True, slots=True)
class UnitOption:
    """One unit in one candidate format: formats of its linears by block-relative name."""

    unit: str
    label: str
    position: int
    formats: dict[str, LayerFormat]


Change = Callable[[Block, dict[str, Tensor], UnitOption], None]


def swap_in_scores(
    config: Any,
    context: StageContext,
    options: list[UnitOption],
    *,
    on_block: OnBlock | None = None,
    change: Change | None = None,
) -> Scores:
    """KL in nats a token for each unit and label; no pass at all without options.

    change: what an option does to a block, given H of its linears; default: it is rounded.
    """
    put = change or (lambda block, found, o: _round_option(block, found, o.formats, config))
    scores: Scores = {}
    if not options:
        return scores
    assert context.tokens is not None, "scores need calibration rows"
    walk = Walk(context.state, context.tokens, context.walk_options())
    rows = _scoring_rows(walk)
    final = walk.open_stream("final")
    for position in range(walk.num_blocks):
        walk.advance(final, walk.load(position), position)
    stream = walk.open_stream("swap")
    for position in range(max(o.position for o in options) + 1):
        mine = [o for o in options if o.position == position]
        source = walk.state.read_block(position, walk.skeleton)
        found = _swap_block(walk, _Swap(position, source, stream, final, rows), mine, put)
        _merge(scores, found)
        if on_block is not None and found:
            on_block(found)
        walk.advance(stream, load_block(walk.skeleton, position, source), position)
        unit = f"swap-in-{position:04d}"
        context.run.progress({"unit": unit, "index": position + 1, "total": walk.num_blocks})
    final.close()
    stream.close()
    return scores


@dataclass(frozen=True, slots=True)
class _Swap:
    position: int
    source: BlockTensors
    stream: ActivationStore
    final: ActivationStore
    rows: slice


def _swap_block(walk: Walk, swap: _Swap, options: list[UnitOption], put: Change) -> Scores:
    if not options:
        return {}
    original = load_block(walk.skeleton, swap.position, swap.source)
    hessians = _hessians(walk, original, swap)
    variants: list[Tensor] = []
    for option in options:
        block = load_block(walk.skeleton, swap.position, swap.source)
        put(block, hessians, option)
        variants.append(walk.through(block, swap.position, swap.stream.read(swap.rows)))
    for position in range(swap.position + 1, walk.num_blocks):
        block = walk.load(position)
        variants = [walk.through(block, position, v) for v in variants]
    scores: Scores = {}
    for option, hidden in zip(options, variants, strict=True):
        kl = _divergence(walk, swap, hidden)
        scores.setdefault(option.unit, {})[option.label] = kl
    return scores


def _round_option(
    block: Block, hessians: dict[str, Tensor], formats: dict[str, LayerFormat], config: Any
) -> None:
    """Round some linears of a block in place, as the stage will when nothing else is rounded."""
    if config.is_data_free:
        round_to_nearest(block, formats, config)
        return
    for name, fmt in formats.items():
        linear = block.linears[name]
        weight = linear.dense()
        mask = weight != 0 if name in block.masked else None
        settings = (config.grid, config.dampening, name)
        round_stack([linear], Rounding(weight, hessians[name], fmt, mask, *settings))


@torch.no_grad()
def _hessians(walk: Walk, block: Block, swap: _Swap) -> dict[str, Tensor]:
    """H of every linear of a block on the original stream, over the calibration rows."""
    batches = list(walk.batches(calibration_rows(walk)))
    first = batches[0]
    kwargs = walk.kwargs(first, swap.position)
    groups = [g for p in input_phases(block, swap.stream.read(first), kwargs) for g in p]
    heads = [g[0] for g in groups]
    sums = {
        n: HessianAccumulator(block.linears[n].shape[1], with_cross=False, device=walk.device)
        for n in heads
    }
    for rows in batches:
        seen = inputs_of(block, heads, swap.stream.read(rows), walk.kwargs(rows, swap.position))
        for name, x in seen.items():
            sums[name].add(x.reshape(-1, x.shape[-1]).float(), None, None)
    return {n: _mean(sums[g[0]], block.linears[g[0]].shape[1]) for g in groups for n in g}


def _mean(total: HessianAccumulator, columns: int) -> Tensor:
    found = total.hessian()
    return found if total.num_tokens else torch.eye(columns, device=found.device)


@torch.no_grad()
def _divergence(walk: Walk, swap: _Swap, hidden: Tensor) -> float:
    total, count = 0.0, 0
    for rows in walk.batches(swap.rows):
        swapped = walk.skeleton.leave(hidden[rows], walk.tokens[rows])
        kl = kl_tokens(walk.logits(swap.final, rows), swapped)
        if walk.mask is not None:
            kl = kl[walk.mask[rows]]
        total, count = total + float(kl.double().sum()), count + kl.numel()
    return total / count


def fisher_scores(
    config: QuantizeConfig, context: StageContext, options: list[UnitOption]
) -> Scores:
    """Output-Fisher scores (mean over tokens, arbitrary scale) for each unit and label."""
    assert context.tokens is not None, "scores need calibration rows"
    walk = Walk(context.state, context.tokens, context.walk_options())
    rows = _scoring_rows(walk)
    inputs = block_inputs(walk, rows, "fisher")
    gradient = head_gradient(walk, inputs.pop(), rows, context.seed)
    scores: Scores = {}
    for position in reversed(range(walk.num_blocks)):
        block = walk.load(position)
        mine = [o for o in options if o.position == position]
        gradient, seen = _backward(walk, block, position, (inputs.pop(), gradient))
        _merge(scores, _fisher_block(block, seen, mine, config))
        index = walk.num_blocks - position
        event = {"unit": f"fisher-{position:04d}", "index": index, "total": walk.num_blocks}
        context.run.progress(event)
    return scores


@dataclass(slots=True)
class _Seen:
    """What one linear saw: inputs [n, I] and gradients at its outputs [n, O], in batches."""

    inputs: list[Tensor]
    gradients: list[Tensor]


def _backward(
    walk: Walk, block: Block, position: int, at: tuple[ActivationStore, Tensor]
) -> tuple[Tensor, dict[str, _Seen]]:
    """Push the gradient at a block's output [R, T, D] to its input, noting it at every linear."""
    seen = {name: _Seen([], []) for name in block.linears}
    handles = [m.register_forward_hook(_note(seen[n])) for n, m in block.linears.items()]
    gradient = push_back(walk, block, position, at)
    for handle in handles:
        handle.remove()
    return gradient, seen


def _note(seen: _Seen) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen.inputs.append(args[0].detach().reshape(-1, args[0].shape[-1]))
        out.register_hook(  # type: ignore[no-untyped-call]
            lambda g: seen.gradients.append(g.reshape(-1, g.shape[-1]))
        )

    return hook


def _fisher_block(
    block: Block, seen: dict[str, _Seen], options: list[UnitOption], config: QuantizeConfig
) -> Scores:
    scores: Scores = {}
    inputs = {n: torch.cat(s.inputs) for n, s in seen.items() if s.inputs}
    gradients = {n: torch.cat(s.gradients) for n, s in seen.items() if s.gradients}
    hessians = {n: x.t() @ x / x.shape[0] for n, x in inputs.items()}
    for option in options:
        formats = {n: f for n, f in option.formats.items() if n in gradients}
        trial = _copies(block, formats)
        _round_option(trial, hessians, formats, config)
        total = 0.0
        for name in formats:
            delta = trial.linears[name].dense() - block.linears[name].dense()
            total += float(((inputs[name] @ delta.t()) * gradients[name]).square().double().sum())
        tokens = max((len(x) for x in inputs.values()), default=1)
        scores.setdefault(option.unit, {})[option.label] = total / tokens
    return scores


def _copies(block: Block, names: Iterable[str]) -> Block:
    """Linears that can be rounded without changing the block."""
    linears = {n: StoredLinear(block.linears[n].dense(), None) for n in names}
    return Block(nn.Module(), linears, block.masked)


def _scoring_rows(walk: Walk) -> slice:
    return slice(0, min(SCORING_ROWS, calibration_rows(walk).stop))


def _merge(into: Scores, more: dict[str, Any]) -> None:
    for unit, row in more.items():
        into.setdefault(unit, {}).update(row)
