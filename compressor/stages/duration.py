"""How long stages take: their floating-point work over this machine's measured speed.

Counted are products only (2 FLOP a weight a token forwards, 4 more backwards); small layers spend
as much again on everything else, so estimates are right within 2 to 3 times.

# weights: all of the model; tokens: calibration rows x their length
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import torch

from compressor.algorithms.products import linear
from compressor.modeling.device import CPU
from compressor.modeling.state import ModelState
from compressor.recipe import (
    Budget,
    CalibrateConfig,
    DistillConfig,
    EvaluateConfig,
    PruneConfig,
    QuantizeConfig,
    Recipe,
    TransformConfig,
)
from compressor.recipe.data import SELF
from compressor.stages.calibrate import LOOK_TOKENS
from compressor.stages.search import ROUNDS
from compressor.stages.selection import block_linears, dense_bytes

LEARNING = 12.0  # FLOP a weight a token: forwards, backwards and the rounding in between
TRAINING = 10.0  # teacher forwards, student forwards and backwards, head twice
WRITING = 4.0  # token by token
SIZE, LARGE_SIZE = 768, 4096  # of the product that is timed on a CPU, and elsewhere


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the work depends on; `solve` and `statistics` are FLOP (the latter for each token)."""

    weights: float
    solve: float
    statistics: float
    search: float
    tokens: int = 0
    length: int = 0


def sizes_of(state: ModelState) -> Sizes:
    """The sizes of a model, without calibration rows."""
    stored = dense_bytes(state)
    weights = sum(info.nbytes for info in state.checkpoint.tensors.values()) / stored
    widths = [t.shape for t in block_linears(state.skeleton())]
    return Sizes(
        weights=weights,
        solve=sum(rows * cols**2 * 2 + cols**3 * 2 for rows, cols in widths),
        statistics=sum(cols**2 for _, cols in widths),
        search=sum(min(rows, 512) * cols**2 for rows, cols in widths),
    )


def seconds(recipe: Recipe, state: ModelState, device: torch.device = CPU) -> float:
    """Estimated time of all stages of a recipe on a device of this machine."""
    sizes, work = sizes_of(state), 0.0
    for stage in recipe.stages:
        if isinstance(stage, CalibrateConfig):
            tokens = stage.data.num_samples * stage.data.seq_len
            sizes = _with_rows(sizes, tokens, stage.data.seq_len)
            looked = min(tokens, LOOK_TOKENS)
            work += 2.0 * sizes.weights * looked
            work += WRITING * sizes.weights * tokens if SELF in stage.data.names else 0.0
        elif isinstance(stage, QuantizeConfig):
            work += quantize_work(stage, sizes)
        elif isinstance(stage, TransformConfig):
            tries = 2 * stage.grid_points if stage.method == "awq" else 2
            work += tries * 2 * sizes.search + _passes(sizes) / 2
        elif isinstance(stage, PruneConfig):
            work += sizes.solve + _passes(sizes)
        elif isinstance(stage, DistillConfig):
            work += TRAINING * sizes.weights * stage.steps * stage.batch_size * stage.data.seq_len
        elif isinstance(stage, EvaluateConfig):
            work += 5 * sizes.weights * stage.data.num_samples * stage.data.seq_len
    return work / flops(device)


def quantize_seconds(
    config: QuantizeConfig,
    state: ModelState,
    rows: tuple[int, int],
    device: torch.device = CPU,
) -> float:
    """Estimated time of one quantize stage with [N, T] calibration rows."""
    sizes = _with_rows(sizes_of(state), rows[0] * rows[1], rows[1])
    return quantize_work(config, sizes) / flops(device)


def quantize_work(config: QuantizeConfig, sizes: Sizes) -> float:
    """FLOP of a quantize stage at its effort."""
    if config.is_data_free:
        return 200 * sizes.weights  # the search of the grid
    work, own = 0.0, config.recovery_settings.own_rows if config.effort == "max" else 0
    if own:
        work += WRITING * sizes.weights * own * sizes.length
        sizes = _with_rows(sizes, sizes.tokens + own * sizes.length, sizes.length)
    each = sizes.solve + _passes(sizes)
    work += each * (1 if config.budget is None else candidate_count(config.budget))
    if config.learns:  # after the search
        learning = config.learning_settings
        learned = config.learning_steps * learning.batch_size * sizes.length
        work += LEARNING * sizes.weights * learned + (each if config.budget is not None else 0)
    if config.effort == "max":
        recovery = config.recovery_settings
        trained = recovery.steps * recovery.batch_size * sizes.length
        work += TRAINING * sizes.weights * trained
    return work


def candidate_count(budget: Budget) -> int:
    """Whole models that a budget materialises at most: uniform ones, the mixture, trials."""
    return (ROUNDS if budget.max_kl is not None else 3) + budget.trials


def _with_rows(sizes: Sizes, tokens: int, length: int) -> Sizes:
    return Sizes(
        sizes.weights, sizes.solve, sizes.statistics, sizes.search, tokens=tokens, length=length
    )


def _passes(sizes: Sizes) -> float:
    """Both streams through the blocks, and statistics of every shared input."""
    return sizes.tokens * (12 * sizes.weights + sizes.statistics)


@cache
def flops(device: torch.device = CPU) -> float:
    """Measured fp32 speed of a device at products as the blocks' linears make them, FLOP/s."""
    size = SIZE if device.type == "cpu" else LARGE_SIZE
    a = torch.randn(size, size).to(device)
    float(linear(a, a)[0, 0])  # a number that is read has been computed
    start = time.perf_counter()
    for _ in range(7):
        linear(a, a)
    float(linear(a, a)[0, 0])
    return 8 * 2 * size**3 / max(time.perf_counter() - start, 1e-6)
