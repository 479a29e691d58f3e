"""Rows that the student writes itself: it learns where its own mistakes lead (GKD, on-policy).

Some rows of a batch keep their first `prefix_tokens` tokens; the student goes on from there, one
token at a time over a cache of keys and values, and the teacher judges every position. A row that
the student ends early (EOS) counts up to there. u of each draw comes from the seed, the step, the
row and the position alone: the same rows whatever the processes or micro-batches, and after a
resume. The student writes with the weights it has at that step, so rows are never kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from compressor.modeling.endings import end_of_text_ids
from compressor.modeling.whole import WholeModel
from compressor.recipe import DistillConfig
from compressor.recipe.data import Sampling
from compressor.stages.objective import Batch
from compressor.stages.self_text import draw, uniform


def with_own_rows(
    student: WholeModel, batch: Batch, config: DistillConfig, *, step: int, seed: int, mine: slice
) -> Batch:
    """This process's rows of the batch, those whose turn it is continued by the student."""
    assert config.on_policy is not None, "the caller's condition"
    count, numbers = len(batch), range(len(batch))[mine]
    own = own_count(step, count, config.on_policy.fraction)
    chosen = [place for place, row in enumerate(numbers) if row < own]
    part = batch.part(mine)
    if not chosen:
        return part
    tokens, counted = part.tokens.clone(), torch.ones_like(part.tokens, dtype=torch.bool)
    sampling = Sampling(temperature=config.on_policy.temperature)
    names = [step * count + numbers[place] for place in chosen]
    prefix = part.tokens[chosen, : config.on_policy.prefix_tokens]
    written, ends = _written(student, prefix, tokens.shape[1], seed, names, sampling)
    tokens[chosen] = written
    counted[chosen] = torch.arange(tokens.shape[1]) < ends[:, None]
    return Batch(tokens, part.numbers, counted)


def own_count(step: int, rows: int, fraction: float) -> int:
    """How many rows of this step the student writes; over many steps exactly the fraction."""
    return int((step + 1) * rows * fraction) - int(step * rows * fraction)


@torch.no_grad()
def _written(
    student: WholeModel,
    prefix: Tensor,
    length: int,
    seed: int,
    names: list[int],
    sampling: Sampling,
) -> tuple[Tensor, Tensor]:
    """Rows [B, length] that begin with prefix [B, P], and how many tokens of each count [B]."""
    config = student.skeleton.model.config
    cache = DynamicCache(config=config)
    ends = torch.full((len(prefix),), length)
    eos = torch.tensor(sorted(end_of_text_ids(student.skeleton.model)), dtype=torch.int64)
    tokens, given = prefix, prefix
    while tokens.shape[1] < length:
        hidden = student.hidden_states(given, cache=cache)[0][:, -1]
        place = tokens.shape[1]
        u = torch.tensor([uniform(seed, name, place) for name in names])
        given = draw(student.head(hidden).cpu(), u, sampling)[:, None]
        tokens = torch.cat([tokens, given], dim=1)
        ended = torch.isin(given[:, 0], eos) & (ends == length)
        ends[ended] = place + 1
    return tokens, ends
