"""What of a student learns: `train` of a distill stage, as parameters of the model in memory.

auto, weights       dense weights, norms and biases, embeddings
scales, codes       of quantized linears
lora                adapters of low rank beside dense weights, norms and biases
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import RecipeError
from compressor.modeling.adapters import Adapter, Adapters
from compressor.modeling.skeleton import Skeleton
from compressor.modeling.state import ModelState
from compressor.modeling.whole import Near, Slot, WholeModel
from compressor.recipe import DistillConfig, match_names
from compressor.stages.selection import Target, block_linears

NEEDED = {"weights": "weight", "scales": "scale", "scales_and_norms": "scale", "codes": "latent"}


def near_of(teacher: ModelState, student: ModelState, model: WholeModel) -> Near:
    """Which weight is behind codes: the original's, unless the student's basis or shape differs."""
    numbers = {ref.index: i for i, ref in enumerate(teacher.blocks)}
    same = student.checkpoint.digest == teacher.checkpoint.digest
    same = same and "transform" not in student.trail

    def find(position: int, linear: str) -> Tensor | None:
        return model.dense_weight(numbers[student.blocks[position].index], linear)

    return find if same else lambda position, linear: None


def adapters_of(config: DistillConfig, student: ModelState, seed: int) -> Adapters | None:
    """The adapter of each linear; None if none is asked for.

    Raises:
        RecipeError: a linear is quantized, or narrower than the rank (RC17); a pattern matches
            nothing (RC14).
    """
    if config.train != "lora":
        return None
    targets = adapted(config, student.skeleton())
    _check_dense(config, student, targets)
    rank, chosen = config.adapters.rank, {(t.position, t.linear) for t in targets}
    generator = torch.Generator().manual_seed(seed)
    adapter = Adapter(rank, config.adapters.alpha / rank, generator)
    return lambda position, linear: adapter if (position, linear) in chosen else None


def adapted(config: DistillConfig, skeleton: Skeleton) -> list[Target]:
    """The linears that get adapters.

    Raises:
        RecipeError: one is narrower than the rank (RC17), a pattern matches nothing (RC14).
    """
    linears = {t.name: t for t in block_linears(skeleton)}
    where = config.where("lora.targets")
    hits = match_names(config.adapters.targets, list(linears), where=where).values()
    names = {name for found in hits for name in found}
    targets = [t for name, t in linears.items() if name in names]
    narrow = [t for t in targets if min(t.shape) < config.adapters.rank]
    if narrow:
        raise RecipeError(
            f"an adapter of rank {config.adapters.rank} is no smaller than {narrow[0].name}, "
            f"{narrow[0].shape[0]} x {narrow[0].shape[1]}",
            code="RC17",
            where=config.where("lora.rank"),
            fix="lower rank, or name other targets",
        )
    return targets


def _check_dense(config: DistillConfig, student: ModelState, targets: list[Target]) -> None:
    formats = [ref.meta.get("formats", {}) for ref in student.blocks]
    quantized = [t.name for t in targets if t.linear in formats[t.position]]
    if quantized:
        raise RecipeError(
            f"{quantized[0]} is quantized: an adapter cannot be merged into codes",
            code="RC17",
            where=config.where("train"),
            why=f"{len(quantized)} of the targets hold codes on a grid; adding a product to them "
            "would round most of it away, and adapters beside codes are no part of the format.",
            fix="use train: scales_and_norms or codes, or distill before the quantize stage",
        )


def chosen_slots(config: DistillConfig, slots: list[Slot]) -> list[Slot]:
    """The parameters that learn, by `train`.

    auto: scales, dense weights, norms and biases, and embeddings if nothing is quantized.
    weights: everything but scales. scales: nothing but scales. scales_and_norms: and norms, biases.
    codes: scales, norms, biases and the codes themselves. lora: adapters, norms and biases.
    """
    quantized = any(s.kind == "scale" for s in slots)
    kinds = {
        "auto": {"scale", "weight", "vector"} | (set() if quantized else {"table"}),
        "weights": {"weight", "vector", "table"},
        "scales": {"scale"},
        "scales_and_norms": {"scale", "vector"},
        "codes": {"latent", "scale", "vector"},
        "lora": {"adapter", "vector"},
    }[config.train]
    chosen = [s for s in slots if s.kind in kinds]
    needed = NEEDED.get(config.train)
    if needed and not any(s.kind == needed for s in chosen):
        raise RecipeError(
            f"train: {config.train} finds nothing to train: "
            + ("every linear is quantized" if needed == "weight" else "no linear is quantized"),
            code="RC17",
            where=config.where("train"),
            fix="use train: auto",
        )
    return chosen
