"""Quantize what lies outside of the blocks: the embedding and the output head.

Both are large in small models (a vocabulary of 32 000 times the width) and touched once a token, so
8 bits cost next to nothing, 4 bits a little. They are rounded to nearest on searched grids.

A tied matrix is rounded once and used for both: its codes are stored under the embedding's name,
and the head gets only a copy of the scales, which is what compressed-tensors ties in memory.
Embeddings are stored as int8 (`int-quantized`): transformers (5.23) looks for `weight` in them and
cannot load packed ones (tests/test_formats_outer.py), so 4-bit embeddings are for our engine only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from compressor.algorithms.grid import quantize
from compressor.artifact.formats import GROUP_SIZES, SCALE_DTYPES, LayerFormat, ScaleDtype, fits
from compressor.artifact.packing import dense_weight, pack_weight
from compressor.errors import RecipeError
from compressor.modeling.skeleton import Skeleton
from compressor.modeling.state import ModelState, spellings
from compressor.recipe import QuantizeConfig
from compressor.recipe.presets import loads_embedding
from compressor.stages.context import StageContext
from compressor.stages.grids import make_grid
from compressor.stages.selection import scale_dtype, stored_dtype

UNIT = "outer"
BITS = {"W8A16": 8, "W4A16": 4}
GROUP = 128


def quantize_outer(
    config: QuantizeConfig, context: StageContext, state: ModelState
) -> tuple[ModelState, dict[str, Any]]:
    """Round embedding and head as the recipe says; gives the new state, and facts with notes.

    Raises:
        RecipeError: a tied matrix is asked for in two formats (RC17).
    """
    skeleton = state.skeleton()
    dtype = scale_dtype(config, stored_dtype(state))
    formats = outer_formats(config, skeleton, dtype)
    if not formats:
        return state, {}
    if not context.run.is_done(UNIT):
        tensors, facts = _rounded(state.read_outer(skeleton), formats, config.grid)
        stored = {name: fmt.as_json() for name, fmt in formats.items()}
        context.run.commit(UNIT, tensors, {"formats": stored, "facts": facts})
    file, meta = context.run.file(UNIT), context.run.meta(UNIT)
    facts = {"layers": meta["facts"], "notes": outer_notes(formats, config)}
    return replace(state, outer=file, outer_formats=formats), facts


def outer_names(skeleton: Skeleton) -> tuple[str, str]:
    """Module names of the embedding and of the head."""
    names = {id(module): name for name, module in skeleton.model.named_modules()}
    inputs, head = skeleton.model.get_input_embeddings(), skeleton.model.get_output_embeddings()
    return names[id(inputs)], names[id(head)]


def outer_formats(
    config: QuantizeConfig, skeleton: Skeleton, scales: ScaleDtype
) -> dict[str, LayerFormat]:
    """The formats that the recipe asks for, by module name; both names of a tied matrix."""
    embedding, head = outer_names(skeleton)
    wanted = {embedding: config.embeddings, head: config.head}
    tied = skeleton.model.config.get_text_config().tie_word_embeddings
    chosen = {name: scheme for name, scheme in wanted.items() if scheme != "none"}
    if tied and chosen:
        if len(set(chosen.values())) > 1:
            raise RecipeError(
                f"head {config.head} and embeddings {config.embeddings} are one tied matrix",
                code="RC17",
                where=config.where("head"),
                fix="ask for the same scheme, or leave one of them out",
            )
        scheme = next(iter(chosen.values()))
        _check_table(config, scheme)
        fmt = _format(scheme, skeleton, scales, is_table=True)
        return {embedding: fmt, head: fmt}
    return {
        name: _format(scheme, skeleton, scales, is_table=name == embedding)
        for name, scheme in chosen.items()
    }


def outer_notes(formats: dict[str, LayerFormat], config: QuantizeConfig) -> list[str]:
    """What a person should know about a quantized head or embedding."""
    notes = []
    if len(formats) == 2 and len(set(formats.values())) == 1:
        notes.append(f"quantized outside of the blocks: {', '.join(formats)}")
    others = [e for e in config.engines if e not in ("ours", "transformers")]
    if formats and others:
        notes.append(f"not checked: whether {', '.join(others)} loads a quantized head")
    return notes


def outer_bytes(config: QuantizeConfig, state: ModelState) -> tuple[int, int]:
    """Bytes of embedding and head where they are quantized: before and after."""
    skeleton = state.skeleton()
    formats = outer_formats(config, skeleton, scale_dtype(config, stored_dtype(state)))
    rows, columns = skeleton.model.get_input_embeddings().weight.shape
    after = {name: fmt.packed_bytes((rows, columns)) for name, fmt in formats.items()}
    before = 0
    for name, fmt in formats.items():
        on_disk = [s for s in spellings(f"{name}.weight") if s in state.checkpoint.tensors]
        tied_copy = f"{name}.weight" not in skeleton.outer_names()
        if tied_copy:
            after[name] = rows * fmt.num_groups(columns) * SCALE_DTYPES[fmt.scale_dtype].itemsize
        if on_disk:
            before += state.checkpoint.tensors[on_disk[0]].nbytes
    return before, sum(after.values())


def _check_table(config: QuantizeConfig, scheme: str) -> None:
    """A tied matrix is stored as an embedding, whatever key asked for it."""
    for engine in config.engines:
        if not loads_embedding(engine, scheme):
            raise RecipeError(
                f"engine {engine} does not read {scheme} embeddings, and this model's head is "
                "tied to its embedding",
                code="RC17",
                where=config.where("head" if config.head != "none" else "embeddings"),
                fix="W8A16 loads in transformers and ours, W4A16 in ours alone",
            )


def _format(scheme: str, skeleton: Skeleton, scales: ScaleDtype, *, is_table: bool) -> LayerFormat:
    bits = BITS[scheme]
    columns = skeleton.model.get_input_embeddings().weight.shape[1]
    plain = is_table and bits == 8
    known = [LayerFormat(bits, g, True, scales, plain=plain) for g in GROUP_SIZES if g <= GROUP]
    return max((f for f in known if fits(f, columns)), key=lambda f: f.group_size)


def _rounded(
    tensors: dict[str, Tensor], formats: dict[str, LayerFormat], kind: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stored tensors instead of the weights, and the relative error of each."""
    found, facts = dict(tensors), {}
    scales: dict[str, Tensor] = {}
    for name, fmt in formats.items():
        weight = found.pop(f"{name}.weight", None)
        if weight is None:  # the head of a tied matrix
            found[f"{name}.weight_scale"] = next(iter(scales.values())).clone()
            continue
        grid = make_grid(weight.float(), fmt, kind)
        codes = quantize(weight.float(), grid)
        packed = pack_weight(codes, grid.scale, grid.zero_point, fmt)
        found |= {f"{name}.{suffix}": t for suffix, t in packed.tensors.items()}
        scales[name] = packed.tensors["weight_scale"]
        error = (dense_weight(packed) - weight.float()).norm() / weight.float().norm()
        facts[name] = {
            "bits": fmt.bits,
            "group_size": fmt.group_size,
            "method": "rtn",
            "relative_error": float(error),
        }
    return found, facts
