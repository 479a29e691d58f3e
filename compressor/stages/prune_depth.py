"""Prune depth: take whole blocks away, the least missed first.

Greedy by measurement: remove the block without which KL(original || rest) on calibration rows is
least, measure all again, and so on. One round runs every shortened model at once: at block p all
variants that lack an earlier block, and the one that skips p, pass through the same loaded block.

    kl          a round costs ~ L^2 / 2 block passes
    contiguous  one round for all runs of neighbouring blocks: KL without each of them
    influence   1 - cos(x_in, x_out) of each block (ShortGPT, Men et al. 2024), one pass
    auto        kl; influence where kl would cost more than COST_LIMIT

What is left is mended by least squares (`depth_repair.py`) unless the recipe says otherwise.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compressor.algorithms.divergence import kl_tokens
from compressor.algorithms.structured import block_influence
from compressor.errors import RecipeError, UnsupportedError
from compressor.modeling.skeleton import parse_config
from compressor.modeling.state import ModelState
from compressor.modeling.walk import Walk
from compressor.recipe import PruneConfig
from compressor.stages.context import StageContext, StageReport
from compressor.stages.depth_repair import repair_depth
from compressor.stages.statistics import calibration_rows

COST_LIMIT = 6e12  # FLOP; about two minutes on two CPU cores
RANKING_ROWS = 16
# Integers that count from the first block on; they shrink with the blocks below them.
LEADING_COUNTS = ("first_k_dense_replace", "max_window_layers")
UNSUPPORTED_KEYS = ("num_kv_shared_layers", "num_nextn_predict_layers")


def prune_depth(config: PruneConfig, context: StageContext) -> StageReport:
    """Remove blocks until as many are left as the recipe keeps.

    Raises:
        RecipeError: a count or list that does not fit the model (RC17).
        UnsupportedError: a model whose blocks share keys and values with one another.
    """
    state = context.state
    total = len(state.blocks)
    rounds: list[dict[str, Any]] = []
    if isinstance(config.depth, list):
        kept = _listed(config, config.depth, total)
        method = "listed in the recipe"
    else:
        method, rounds = ranked(context, total - _count(config, total), config.ranking)
        gone = {entry["removed"] for entry in rounds}
        kept = [i for i in range(total) if i not in gone]
    mended: dict[str, Any] = {}
    after = keep_layers(state, kept)
    if config.reconstruct:
        after, mended = repair_depth(context, after, kept)
    facts = {
        "linears": mended,
        "kept": kept,
        "removed": [i for i in range(total) if i not in kept],
        "ranking": method,
        "rounds": rounds,
        "held_out_kl": _held_out_kl(context, after),
    }
    return StageReport(after, facts)


def _listed(config: PruneConfig, kept: list[int], total: int) -> list[int]:
    wrong = [i for i in kept if not 0 <= i < total]
    repeated = len(set(kept)) != len(kept)
    if wrong or repeated or len(kept) == total:
        problem = "blocks are repeated" if repeated else "every block is kept"
        problem = f"there is no block {wrong[0]}" if wrong else problem
        raise RecipeError(
            f"depth: {problem} (the model has blocks 0 to {total - 1})",
            code="RC17",
            where=config.where("depth"),
            fix="list each kept block once, or give a count",
        )
    return sorted(kept)


def _count(config: PruneConfig, total: int) -> int:
    asked = config.depth
    assert isinstance(asked, int | float), "lists are handled elsewhere"
    count = asked if isinstance(asked, int) else max(1, math.floor(asked * total + 0.5))
    if count >= total:
        raise RecipeError(
            f"depth {asked} keeps {count} of {total} blocks: nothing would be removed",
            code="RC17",
            where=config.where("depth"),
            fix=f"keep at most {total - 1}",
        )
    return int(count)


def keep_layers(state: ModelState, kept: list[int]) -> ModelState:
    """The state with only these blocks (indices into the present ones, in rising order)."""
    config = config_with_layers(state.config, kept)
    return replace(state, config=config, blocks=tuple(state.blocks[i] for i in kept))


def config_with_layers(config: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """A `config.json` dict for some of its layers: the count and every list with one entry a layer.

    Lists that transformers derives from the count (`layer_types`) are written out, because they
    would be derived differently for the shorter model.
    """
    parsed = parse_config(config)
    total = int(parsed.num_hidden_layers)
    shared = [k for k in UNSUPPORTED_KEYS if config.get(k)]
    if shared or "text_config" in config:
        raise UnsupportedError(
            f"{config['model_type']}: removing blocks is not covered ({', '.join(shared)})",
            code="CK26",
            why="Blocks of this model depend on one another's place.",
        )
    new = dict(config)
    new[parsed.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    for key, value in parsed.to_dict().items():
        is_listed = isinstance(value, list) and len(value) == total
        if is_listed and (key in config or "layer" in key):
            new[key] = [value[i] for i in kept]
    for key in LEADING_COUNTS:
        if isinstance(config.get(key), int):
            new[key] = sum(i < config[key] for i in kept)
    return new


def ranked(
    context: StageContext, num_removed: int, ranking: str = "auto"
) -> tuple[str, list[dict[str, Any]]]:
    """How, and which blocks go: {"removed": index, "kl" or "influence": score}, in this order."""
    assert context.tokens is not None, "checked by the caller"
    walk = Walk(context.state, context.tokens, context.walk_options())
    rows = slice(0, min(RANKING_ROWS, calibration_rows(walk).stop))
    if ranking == "contiguous":
        return "measured KL, contiguous", _contiguous(context, walk, rows, num_removed)
    too_slow = _cost(walk, rows, num_removed) > COST_LIMIT
    if ranking == "influence" or (ranking == "auto" and too_slow):
        return "block influence", _by_influence(context, walk, rows, num_removed)
    return "measured KL, greedy", _greedy(context, walk, rows, num_removed)


def _greedy(
    context: StageContext, walk: Walk, rows: slice, num_removed: int
) -> list[dict[str, Any]]:
    """One block after the other, each round journaled."""
    rounds: list[dict[str, Any]] = []
    left = list(range(walk.num_blocks))
    reference: Tensor | None = None
    for number in range(num_removed):
        unit = f"drop-{number:04d}"
        if not context.run.is_done(unit):
            if reference is None:
                reference = _run(walk, list(range(walk.num_blocks)), rows)
            scores = _scores(walk, left, rows, reference)
            removed = min(scores, key=lambda i: (scores[i], -i))
            context.run.commit_meta(unit, {"removed": removed, "kl": scores[removed]})
        rounds.append(context.run.meta(unit))
        left.remove(rounds[-1]["removed"])
        event = {"unit": unit, "index": number + 1, "total": num_removed}
        context.run.progress(event | {"loss": rounds[-1]["kl"]})
    return rounds


def _contiguous(
    context: StageContext, walk: Walk, rows: slice, num_removed: int
) -> list[dict[str, Any]]:
    """The run of neighbouring blocks without which KL is least."""
    if not context.run.is_done("runs"):
        everything = list(range(walk.num_blocks))
        reference = _run(walk, everything, rows)
        scores = _scores(walk, everything, rows, reference, span=num_removed)
        context.run.commit_meta("runs", {"scores": list(scores.values())})
    found: list[float] = context.run.meta("runs")["scores"]
    start = min(range(len(found)), key=lambda i: (found[i], -i))
    return [{"removed": start + i, "kl": found[start]} for i in range(num_removed)]


def _cost(walk: Walk, rows: slice, num_removed: int) -> float:
    """FLOP of all rounds: 2 for each weight of a block, token, and pass."""
    weights = sum(p.numel() for p in walk.skeleton.blocks[0].parameters())
    tokens = (rows.stop - rows.start) * walk.tokens.shape[1]
    return float(weights * tokens * num_removed * walk.num_blocks**2)


@torch.no_grad()
def _scores(
    walk: Walk, left: list[int], rows: slice, reference: Tensor, *, span: int = 1
) -> dict[int, float]:
    """KL without each run of `span` of the blocks `left`, by the first block of the run.

    All shortened models advance through each loaded block.
    """
    stream = walk.open_stream("depth")
    hidden = stream.read(rows)
    stream.close()
    variants: dict[int, Tensor] = {}
    for place, position in enumerate(left):
        block = walk.load(position)
        variants = {
            start: walk.through(block, position, v) if start + span <= place else v
            for start, v in variants.items()
        }
        if place + span <= len(left):
            variants[place] = hidden
        hidden = walk.through(block, position, hidden)
    return {left[i]: _divergence(walk, rows, reference, v) for i, v in variants.items()}


@torch.no_grad()
def _run(walk: Walk, positions: list[int], rows: slice) -> Tensor:
    stream = walk.open_stream("depth")
    hidden = stream.read(rows)
    stream.close()
    for position in positions:
        hidden = walk.through(walk.load(position), position, hidden)
    return hidden


def _divergence(walk: Walk, rows: slice, reference: Tensor, hidden: Tensor) -> float:
    kl = []
    for part in walk.batches(slice(0, hidden.shape[0])):
        tokens = walk.tokens[rows][part]
        logits = [walk.skeleton.leave(h[part], tokens) for h in (reference, hidden)]
        kl.append(kl_tokens(*logits).double())
    return float(torch.cat(kl).mean().item())


@torch.no_grad()
def _by_influence(
    context: StageContext, walk: Walk, rows: slice, num_removed: int
) -> list[dict[str, Any]]:
    if not context.run.is_done("influence"):
        stream = walk.open_stream("depth")
        hidden, scores = stream.read(rows), []
        stream.close()
        for position in range(walk.num_blocks):
            out = walk.through(walk.load(position), position, hidden)
            scores.append(block_influence(hidden.cpu(), out))
            hidden = out
            event = {"unit": "influence", "index": position + 1, "total": walk.num_blocks}
            context.run.progress(event)
        context.run.commit_meta("influence", {"scores": scores})
    found: list[float] = context.run.meta("influence")["scores"]
    order = sorted(range(len(found)), key=lambda i: (found[i], -i))
    return [{"removed": i, "influence": found[i]} for i in order[:num_removed]]


@torch.no_grad()
def _held_out_kl(context: StageContext, after: ModelState) -> float | None:
    """KL on the rows that ranked nothing: the model before this stage against the one after it."""
    if context.tokens is None:
        return None
    before, now = (
        Walk(state, context.tokens, context.walk_options()) for state in (context.state, after)
    )
    count = before.tokens.shape[0]
    rows = slice(calibration_rows(before).stop, count)
    if rows.start == count:
        return None
    reference = _run(before, list(range(before.num_blocks)), rows)
    return _divergence(before, rows, reference, _run(now, list(range(now.num_blocks)), rows))
