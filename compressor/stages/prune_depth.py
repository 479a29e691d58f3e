"""Prune depth: take whole blocks away, the least missed first.

Greedy by measurement: remove the block without which KL(original || rest) on calibration rows is
least, measure all again, and so on. One round runs every shortened model at once: at block p all
variants that lack an earlier block, and the one that skips p, pass through the same loaded block.

    cost of a round ~ L^2 / 2 block passes;  above COST_LIMIT the ranking falls back to
    block influence 1 - cos(x_in, x_out)  (ShortGPT, Men et al. 2024), one pass for all rounds.
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
from compressor.modeling.block import Block
from compressor.modeling.skeleton import parse_config
from compressor.modeling.state import ModelState
from compressor.modeling.walk import Walk
from compressor.recipe import PruneConfig
from compressor.stages.context import StageContext, StageReport
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
        count = _count(config, total)
        method, rounds = _ranked(context, total - count)
        gone = {entry["removed"] for entry in rounds}
        kept = [i for i in range(total) if i not in gone]
    after = keep_layers(state, kept)
    facts = {
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


def _ranked(context: StageContext, num_removed: int) -> tuple[str, list[dict[str, Any]]]:
    """Rounds {"removed": index, "kl" or "influence": score}, journaled one by one."""
    assert context.tokens is not None, "checked by the caller"
    walk = Walk(context.state, context.tokens, context.walk_options())
    rows = slice(0, min(RANKING_ROWS, calibration_rows(walk).stop))
    if _cost(walk, rows, num_removed) > COST_LIMIT:
        return "block influence", _by_influence(context, walk, rows, num_removed)
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
    return "measured KL, greedy", rounds


def _cost(walk: Walk, rows: slice, num_removed: int) -> float:
    """FLOP of all rounds: 2 for each weight of a block, token, and pass."""
    weights = sum(p.numel() for p in walk.skeleton.blocks[0].parameters())
    tokens = (rows.stop - rows.start) * walk.tokens.shape[1]
    return float(weights * tokens * num_removed * walk.num_blocks**2)


@torch.no_grad()
def _scores(walk: Walk, left: list[int], rows: slice, reference: Tensor) -> dict[int, float]:
    """KL without each block of `left`: all shortened models advance through each loaded block."""
    stream = walk.open_stream("depth")
    hidden = stream.read(rows)
    stream.close()
    variants: dict[int, Tensor] = {}
    for position in left:
        block = walk.load(position)
        variants = {i: _through(walk, block, position, v) for i, v in variants.items()}
        variants[position] = hidden
        hidden = _through(walk, block, position, hidden)
    return {i: _divergence(walk, rows, reference, v) for i, v in variants.items()}


@torch.no_grad()
def _run(walk: Walk, positions: list[int], rows: slice) -> Tensor:
    stream = walk.open_stream("depth")
    hidden = stream.read(rows)
    stream.close()
    for position in positions:
        hidden = _through(walk, walk.load(position), position, hidden)
    return hidden


def _through(walk: Walk, block: Block, position: int, hidden: Tensor) -> Tensor:
    """Rows [R, T, D] through one block, in micro-batches."""
    parts = walk.batches(slice(0, hidden.shape[0]))
    return torch.cat([block.run(hidden[r], walk.kwargs(r, position)) for r in parts])


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
            out = _through(walk, walk.load(position), position, hidden)
            scores.append(block_influence(hidden, out))
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
