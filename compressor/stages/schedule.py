"""What follows from the number of a training step alone: its learning rate and its rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compressor.recipe import DistillConfig

DECAY_SHARE = 0.2  # of a warm-up-stable-decay schedule


def learning_rate(step: int, config: DistillConfig) -> float:
    """The rate of step `step` (from 0): linear warm-up, then cosine to 0, or stable and decay."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    after = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * after))
    return config.learning_rate * min(1.0, (1 - after) / DECAY_SHARE)


def batch_rows(step: int, batch_size: int, num_rows: int, seed: int) -> Tensor:
    """Row numbers [B] of a step: epochs are permutations drawn from the seed, laid end to end."""
    begin = step * batch_size
    first, last = begin // num_rows, (begin + batch_size - 1) // num_rows
    order = []
    for epoch in range(first, last + 1):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        order.append(torch.randperm(num_rows, generator=generator))
    offset = begin - first * num_rows
    return torch.cat(order)[offset : offset + batch_size]
