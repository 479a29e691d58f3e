"""What a distill stage will take, from the recipe and the shapes of the model alone.

Training holds the teacher (4 bytes a weight in fp32, its outer part alone with a cache) and of the
student weights, gradients and two moments (16), the best state (4) and what it was read from. A
quantized student that learns its scales holds codes (1) and makes each dense weight for its
product, which the backward pass keeps (4); so does one with adapters, besides the weight it starts
from (4) and the best one (4).

# weights: of the whole model
"""

from __future__ import annotations

from typing import Any

from compressor.modeling.state import ModelState
from compressor.recipe import DistillConfig, Recipe
from compressor.stages.learners import adapted
from compressor.stages.teacher_cache import cache_bytes
from compressor.stages.training import held_out_rows

TEACHER, LEARNING, ADAPTED, SCALES = 4, 20, 12, 6  # bytes a weight


def distill_costs(recipe: Recipe, state: ModelState) -> list[dict[str, Any]]:
    """What a plan tells besides memory, as its table's rows."""
    cache, adapters = teacher_cache_bytes(recipe, state), adapter_numbers(recipe, state)
    rows: list[dict[str, Any]] = [
        {"what": "teacher cache, bytes", "value": cache, "kind": "exact but for headers"},
        {"what": "adapters, trained numbers", "value": adapters, "kind": "at most (shape decides)"},
    ]
    return [row for row in rows if row["value"]]


def adapter_numbers(recipe: Recipe, state: ModelState) -> int:
    """Most numbers that the adapters of a distill stage have, for the shape before any pruning.

    Raises:
        RecipeError: they do not fit the model (RC14, RC17).
    """
    found = [0]
    for stage in recipe.stages:
        if not isinstance(stage, DistillConfig) or stage.train != "lora":
            continue
        if stage.student is None or stage.student.path is None:
            targets = adapted(stage, state.skeleton())
            found.append(stage.adapters.rank * sum(sum(t.shape) for t in targets))
    return max(found)


def teacher_cache_bytes(recipe: Recipe, state: ModelState) -> int:
    """Bytes of all teacher caches that a recipe fills; but for 250 a file of 64 rows."""
    config = state.skeleton().model.config.get_text_config()
    total = 0
    for stage in recipe.stages:
        if isinstance(stage, DistillConfig) and stage.teacher.is_cached:
            rows = stage.data.num_samples, stage.data.seq_len
            held_out = held_out_rows(rows[0], stage)
            sizes = config.vocab_size, config.hidden_size
            total += cache_bytes(stage.teacher, rows, held_out, sizes)
    return total


def training_bytes(recipe: Recipe, state: ModelState, weights: int) -> int:
    """Most memory that a distill stage holds for teacher and student."""
    most, is_quantized = 0, False
    for stage in recipe.stages:
        is_quantized |= stage.kind == "quantize"
        if isinstance(stage, DistillConfig):
            learns = stage.train == "codes" or not is_quantized
            each = ADAPTED if stage.train == "lora" else LEARNING if learns else SCALES
            student = _share(stage, len(state.blocks)) * each
            most = max(most, int(weights * (TEACHER + student)))
    return most


def _share(stage: DistillConfig, num_blocks: int) -> float:
    """Part of the teacher's blocks that a student has; a folder is not looked into."""
    student = stage.student
    if student is None:
        return 1.0
    if student.path is not None:
        return 0.0
    if student.depth is not None:
        return student.depth
    kept = student.num_hidden_layers or len(student.layers or []) or num_blocks
    return kept / num_blocks
