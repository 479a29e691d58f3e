"""The last step of `effort: max`: scales, norms and biases learn from the whole original model.

Calibration text is short, and everything that learns from it soon knows it by heart. So the model
writes more rows itself (`stages/self_text.py`); they go before the calibration rows, whose last
ones stay held out. Blocks are solved and learned on all of them, and at last the distribution of
the whole model is pulled towards the original's, with the codes frozen unless `train: codes` is
asked for: what is stored stays exactly as large. The state before is a candidate, so recovery never
ends worse on held-out rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from compressor.data.rows import TokenRows, token_digest
from compressor.modeling.state import ModelState
from compressor.recipe import DataConfig, DistillConfig, QuantizeConfig
from compressor.recipe.data import SELF
from compressor.stages import distill
from compressor.stages.calibrate import rows_for
from compressor.stages.context import StageContext
from compressor.stages.training import SCALE_RATE

CHECKPOINT_STEPS = 25


def with_own_rows(config: QuantizeConfig, context: StageContext) -> StageContext:
    """The context with rows that the model wrote before the calibration rows."""
    count = config.recovery_settings.own_rows
    if count == 0 or context.tokens is None:
        return context
    length = context.tokens.tokens.shape[1]
    data = DataConfig(source=SELF, num_samples=count, seq_len=length)
    written = rows_for(data, replace(context, run=context.run.part("own")))
    return replace(context, tokens=_joined(written, context.tokens))


def _joined(first: TokenRows, second: TokenRows) -> TokenRows:
    tokens = torch.cat([first.tokens, second.tokens])
    mask = torch.cat([first.mask, second.mask])
    places = second.positions
    if places is not None:
        own = torch.arange(first.tokens.shape[1]).expand_as(first.tokens)
        places = torch.cat([own, places])
    return replace(second, tokens=tokens, mask=mask, digest=token_digest(tokens), positions=places)


def recover(
    config: QuantizeConfig, context: StageContext, start: ModelState
) -> tuple[ModelState, dict[str, Any]]:
    """Train scales, norms and biases of the quantized model `start`, and codes if asked to.

    Returns:
        The best state on held-out rows, and facts for the report.
    """
    rows = context.tokens
    assert rows is not None, "high and max calibrate"
    settings = config.recovery_settings
    training = DistillConfig(
        kind="distill",
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.rate / SCALE_RATE,  # `rate` is that of log-scales
        train=settings.train,
        checkpoint_steps=CHECKPOINT_STEPS,
    )
    inside = replace(context, state=start, run=context.run.part("recovery"))
    report = distill.teach(training, inside, start, lambda: rows)
    facts = dict(report.facts)
    facts.pop("losses", None)
    return report.state, facts
