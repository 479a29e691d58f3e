"""Calibrate: fix the token rows of the later stages, and look at what the model does on them.

The first rows go through the original, block by block: every activation is checked to be finite,
and for each linear the mean square of every input, dead inputs and the tokens each expert saw are
noted. That is a look before long work, not its input: stages that solve for weights collect their
own statistics of all rows, because they need them behind the blocks that are compressed already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.data import TokenRows, token_rows
from compressor.data.rows import Generate
from compressor.errors import CheckpointError, RecipeError, Where
from compressor.modeling.activations import ActivationStore
from compressor.modeling.block import Block, input_phases, run_observed
from compressor.modeling.load import load_tokenizer
from compressor.modeling.skeleton import parse_config
from compressor.modeling.walk import Walk
from compressor.recipe import CalibrateConfig, DataConfig
from compressor.stages.context import StageContext, StageReport
from compressor.stages.self_text import written_by_the_model

LOOK_TOKENS = 1 << 14  # enough to meet every kind of token; a pass over all costs as much as GPTQ's
ROWS_UNIT = "tokens"  # the rows a stage works on, whatever the stage


def apply(config: CalibrateConfig, context: StageContext) -> StageReport:
    """Make the rows and note the statistics.

    Raises:
        DataError: the text cannot be used (CA rows).
        NumericError: non-finite activations (NU01).
    """
    rows = rows_for(config.data, context)
    looked = rows.first(max(1, LOOK_TOKENS // rows.tokens.shape[1]))
    walk = Walk(context.state, looked, context.walk_options())
    stream = walk.open_stream("calibrate")
    facts: dict[str, Any] = {}
    for position in range(walk.num_blocks):
        unit = f"block-{position:04d}"
        block = walk.load(position)
        if not context.run.is_done(unit):
            found = _statistics(walk, stream, block, position)
            tensors = {name: square for name, (square, _) in found.items()}
            counts = {name: count for name, (_, count) in found.items()}
            context.run.commit(unit, tensors, {"tokens": counts, "dead": _dead(tensors)})
        facts[walk.block_name(position)] = context.run.meta(unit)
        walk.advance(stream, block, position)
        del block
        event = {"unit": unit, "index": position + 1, "total": walk.num_blocks}
        context.run.progress(event)
    stream.close()
    state = replace(context.state, trail=(*context.state.trail, "calibrate"))
    found = _facts(rows, facts, looked.tokens.numel()) | {"data": config.data.model_dump()}
    return StageReport(state, found, tokens=rows)


def rows_for(data: DataConfig, context: StageContext) -> TokenRows:
    """Token rows of a recipe's data for the model of this run; stored as a unit of the stage.

    Raises:
        RecipeError: a resumed run sees other rows than those it began with (KI13).
    """
    rows = read_rows(data, context, partial(written_by_the_model, context=context))
    if not context.run.is_done(ROWS_UNIT):
        context.run.commit(ROWS_UNIT, {"tokens": rows.tokens}, {"digest": rows.digest})
    if context.run.meta(ROWS_UNIT)["digest"] != rows.digest:
        raise RecipeError(
            "the text has changed since this run began",
            code="KI13",
            where=data.where("source"),
            why="Going on would mix two runs. Nothing was changed.",
            fix="restore the text, or start anew with --fresh",
        )
    return rows


def read_rows(
    data: DataConfig, context: StageContext, generate: Generate | None = None
) -> TokenRows:
    """Token rows of a recipe's data, cut for the model of this run."""
    config = parse_config(context.state.config).get_text_config()
    return token_rows(
        data,
        required_tokenizer(context.source),
        vocab_size=config.vocab_size,
        max_positions=getattr(config, "max_position_embeddings", None),
        generate=generate,
    )


def required_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder.

    Raises:
        CheckpointError: it has none (CK37).
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise CheckpointError(
            "the model has no tokenizer, so text cannot be turned into tokens",
            code="CK37",
            where=Where(str(folder)),
            fix="copy tokenizer.json and tokenizer_config.json into the folder",
        )
    return tokenizer


@torch.no_grad()
def _statistics(
    walk: Walk, stream: ActivationStore, block: Block, position: int
) -> dict[str, tuple[Tensor, int]]:
    """Mean square [I] of each shared input (under its first linear's name) and its token count.

    The stream moves on to the block's outputs.
    """
    one = slice(0, 1)
    phases = input_phases(block, stream.read(one), walk.kwargs(one, position))
    heads = [group[0] for phase in phases for group in phase]
    widths = {n: block.linears[n].shape[1] for n in heads}
    sums = {n: torch.zeros(w, dtype=torch.float64, device=walk.device) for n, w in widths.items()}
    counts = dict.fromkeys(heads, 0)

    def outputs() -> Iterator[Tensor]:
        for rows in walk.batches():
            kwargs = walk.kwargs(rows, position)
            out, seen = run_observed(block, heads, stream.read(rows), kwargs)
            for name, x in seen.items():
                real = walk.real_tokens(rows, x)
                sums[name] += real.float().square().sum(0)
                counts[name] += len(real)
            yield out

    walk.take_outputs(stream, outputs(), position)
    return {n: ((sums[n] / max(counts[n], 1)).float().cpu(), counts[n]) for n in heads}


def _dead(tensors: dict[str, Tensor]) -> dict[str, int]:
    return {name: int((square == 0).sum()) for name, square in tensors.items()}


def _facts(rows: TokenRows, blocks: dict[str, Any], looked_at: int) -> dict[str, Any]:
    return {
        "digest": rows.digest,
        "rows": list(rows.tokens.shape),
        "sources": [asdict(s) for s in rows.sources],
        "notes": list(rows.notes),
        "tokens_looked_at": looked_at,
        "dead_inputs": sum(sum(b["dead"].values()) for b in blocks.values()),
        "few_tokens": sorted(
            f"{name}.{linear}"
            for name, block in blocks.items()
            for linear, count in block["tokens"].items()
            if count < looked_at // 64
        ),
    }
