"""Rotate: the residual stream in another basis (R1), and the heads between value and output (R2).

    embedding  E -> E R1                       norms      gain g -> 1,  bias b -> (b / g) R1
    readers    W -> W diag(g) R1               writers    W -> R1^T W,  bias b -> b R1
    head       W -> W diag(g) R1               values     V_h -> R2^T V_h,   output  O_h -> O_h R2

Readers of a norm are observed (`modeling/smooth_pairs.py`); writers are the other linears that are
as wide as the stream. A tied head reads through the final norm's gain and the embedding does not,
so they part: the artifact grows by V D numbers. A norm that subtracts the mean gets an R1 that
leaves the vector of ones alone. Post-norms, whose gain sits between a writer and the stream,
commute with no rotation: such models are refused by the proof on their first block.

Legend: D width, V vocabulary, O out, K key/value heads, d head width.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.algorithms.rotation import Rotation, make_rotation
from compressor.errors import RecipeError, UnsupportedError, Where
from compressor.modeling.block import Block, load_block
from compressor.modeling.skeleton import Skeleton, tied_names
from compressor.modeling.smooth_pairs import (
    SmoothPair,
    attention_heads,
    gain_offset,
    is_norm,
    norm_pairs,
    subtracts_mean,
    value_pairs,
)
from compressor.modeling.state import BlockTensors, ModelState
from compressor.recipe import TransformConfig
from compressor.stages.context import StageContext, StageReport
from compressor.stages.transform_proof import (
    TOLERANCE,
    BlockWeights,
    Question,
    Witness,
    percentile,
    stored_as,
    witness_rows,
)

SMALLEST_GAIN = 1e-6
OUTER = "outer"


def rotate_model(config: TransformConfig, context: StageContext) -> StageReport:
    """Rotate the outer tensors, then every block.

    Raises:
        RecipeError: the model is pruned: its zeros would be mixed with other weights (RC17).
        UnsupportedError: the architecture does not commute with rotations (CK26).
        NumericError: rotated weights do not fit into their dtype (NU05).
    """
    _check_whole(config, context.state)
    rotator, skeleton = Rotator(config, context), context.state.skeleton(context.device)
    if not context.run.is_done(OUTER):
        context.run.commit(OUTER, *rotator.outer())
    state = rotator.untied(context.run.file(OUTER))
    untied = context.run.meta(OUTER)["untied_bytes"]
    notes = [f"the head parts from the embedding: {untied:,} bytes more"] if untied else []
    witness = Witness(context, state)
    for position in range(skeleton.num_blocks):
        source = context.state.read_block(position, skeleton)
        block = load_block(skeleton, position, source)
        unit = f"block-{position:04d}"
        if not context.run.is_done(unit):
            tensors, facts = rotator.block(source, witness.question(position, block))
            context.run.commit(unit, tensors.tensors, {**tensors.meta(), **facts})
        meta = context.run.meta(unit)
        state = state.with_block(position, context.run.file(unit), meta)
        witness.advance(position, block, state.read_block(position, skeleton))
        notes += [n for n in meta["notes"] if n not in notes]
        context.run.progress({"unit": unit, "index": position + 1, "total": skeleton.num_blocks})
    facts = {"rounding_kl": witness.divergence(), "untied_bytes": untied, "notes": notes}
    return StageReport(replace(state, trail=(*state.trail, "transform")), facts)


def _check_whole(config: TransformConfig, state: ModelState) -> None:
    if any(ref.meta.get("masked") for ref in state.blocks):
        raise RecipeError(
            "the model is pruned: a rotation would mix its zeros with other weights",
            code="RC17", where=config.where("method"), fix="rotate before prune",
        )  # fmt: skip


class Rotator:
    """Knows R1 and turns the outer tensors and one block after another."""

    def __init__(self, config: TransformConfig, context: StageContext) -> None:
        self.config = config
        self.context = context
        self.seed = context.seed if config.seed is None else config.seed
        self.model = _Outer(context.state)
        self.stream = make_rotation(
            self.model.width,
            config.rotation,
            seed=self.seed,
            keep_mean=subtracts_mean(self.model.norm),
        )

    def untied(self, outer: Path) -> ModelState:
        """The state with new outer tensors and a head of its own."""
        state = self.context.state
        config = dict(state.config)
        if self.model.tied:
            config["tie_word_embeddings"] = False
        return replace(state, config=config, outer=outer)

    def outer(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Embeddings, final norm and head in the new basis, and the bytes that untying costs.

        Raises:
            UnsupportedError: what surrounds the blocks computes something else then (CK26).
        """
        model = self.model
        exact = {n: t.float() for n, t in model.tensors.items()}
        head, norm = f"{model.head}.weight", model.norm_name
        if model.tied:
            exact[head] = exact[model.embedding].clone()
        gain = _fuse_norm(exact, norm, gain_offset(model.norm), self.stream)
        exact[head] = exact[head] * gain
        for name, tensor in exact.items():
            if tensor.ndim == 2 and tensor.shape[1] == model.width:
                exact[name] = self.stream.apply(tensor)
        self._prove_outer(exact)
        like = {**model.tensors, head: model.tensors.get(head, model.tensors[model.embedding])}
        stored = {n: stored_as(t, like[n], n) for n, t in exact.items()}
        untied = stored[head].numel() * stored[head].element_size() if model.tied else 0
        return stored, {"untied_bytes": untied}

    @torch.no_grad()
    def _prove_outer(self, exact: dict[str, Tensor]) -> None:
        after = self.untied(Path()).skeleton()
        after.fill_outer(exact, torch.float32)
        tokens = witness_rows(self.context).tokens
        before, hidden = self.model.skeleton, self.model.skeleton.enter(tokens)[0].float()
        turned = self.stream.apply(hidden)
        steps = {
            "embedding": (after.enter(tokens)[0], turned),
            "head": (after.leave(turned, tokens), before.leave(hidden, tokens)),
        }
        for what, (got, want) in steps.items():
            wrong = percentile((got - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-12))
            if wrong > TOLERANCE:
                raise _unfaithful(before, f"the {what}", wrong, [])

    def block(
        self, source: BlockTensors, question: Question
    ) -> tuple[BlockTensors, dict[str, Any]]:
        """The rotated tensors of a block, and facts: notes and the proven difference.

        Raises:
            UnsupportedError: the block computes something else then (CK26).
        """
        weights, block = BlockWeights.of(source, question.block), question.block
        pairs = norm_pairs(block, question.hidden, question.kwargs)
        width = self.stream.size
        pairs = [p for p in pairs if len(weights.tensors[f"{p.source}.weight"]) == width]
        for pair in pairs:
            gain = _fuse_norm(weights.tensors, pair.source, pair.offset, self.stream)
            for reader in pair.readers:
                matrix = weights.matrix(reader)
                matrix.copy_(self.stream.apply(matrix * gain))
        readers = {name for pair in pairs for name in pair.readers}
        for name, linear in block.linears.items():
            if name not in readers and linear.shape[0] == width:
                _turn_outputs(weights, name, self.stream)
        notes = self._turn_values(weights, question) if self.config.values else []
        difference = question.difference(weights, self.stream.apply)
        if difference > TOLERANCE:
            raise _unfaithful(
                question.skeleton,
                f"{question.skeleton.blocks_name}.{question.position}",
                difference,
                _post_norms(block, pairs, width),
            )
        return weights.stored(source), {"notes": notes, "difference": difference}

    def _turn_values(self, weights: BlockWeights, question: Question) -> list[str]:
        heads = attention_heads(question.skeleton.model.config)
        pairs = value_pairs(question.block, heads) if heads is not None else []
        if not pairs or heads is None:
            return [f"{question.skeleton.model_type} has no value pair to rotate"]
        rotation = make_rotation(
            heads.width, self.config.rotation, seed=self.seed + 1 + question.position
        )
        for pair in pairs:
            _turn_heads(weights, pair, rotation)
        return []


class _Outer:
    """What surrounds the blocks: its tensors, and which of them are embedding, norm and head."""

    def __init__(self, state: ModelState) -> None:
        self.skeleton = state.skeleton()
        self.tensors = state.read_outer(self.skeleton)
        model = self.skeleton.model
        names: dict[nn.Module | None, str] = {m: n for n, m in model.named_modules()}
        self.embedding = f"{names[model.get_input_embeddings()]}.weight"
        self.head = names.get(model.get_output_embeddings(), "")
        self.tied = f"{self.head}.weight" in tied_names(model)
        self.width = int(self.tensors[self.embedding].shape[1])
        self.skeleton.fill_outer(dict(self.tensors), torch.float32)
        norms = {n: m for n, m in model.named_modules() if is_norm(m)}
        if len(norms) != 1 or not self.head:
            raise _unfaithful(self.skeleton, "what surrounds the blocks", float("inf"), [*norms])
        self.norm_name, self.norm = next(iter(norms.items()))


def _fuse_norm(
    tensors: dict[str, Tensor], norm: str, offset: float | None, rotation: Rotation
) -> Tensor:
    """Take the gain [D] out of a norm (for its readers) and turn its bias.

    The readers see n(x) g + b = (n(x) + b / g) g, so the bias that stays is (b / g) R.
    """
    if offset is None:
        raise UnsupportedError(
            f"{norm} multiplies by neither its weight nor one plus it", code="CK26",
            where=Where(tensor=f"{norm}.weight"), fix="leave the rotation out",
        )  # fmt: skip
    weight, bias = tensors[f"{norm}.weight"], tensors.get(f"{norm}.bias")
    gain = weight + offset
    tensors[f"{norm}.weight"] = torch.full_like(weight, 1.0 - offset)
    if bias is not None:
        if bool(((gain.abs() < SMALLEST_GAIN) & (bias != 0)).any()):
            raise UnsupportedError(
                f"{norm} has a bias where its gain is zero: the gain cannot move on", code="CK26",
                where=Where(tensor=f"{norm}.bias"), fix="leave the rotation out",
            )  # fmt: skip
        moved = torch.where(bias == 0, bias, bias / gain)
        tensors[f"{norm}.bias"] = rotation.apply(moved)
    return gain


def _turn_outputs(weights: BlockWeights, name: str, rotation: Rotation) -> None:
    """R^T W and b R for a linear that writes into the stream."""
    matrix, bias = weights.matrix(name), weights.bias(name)
    matrix.copy_(rotation.apply(matrix.t()).t())
    if bias is not None:
        bias.copy_(rotation.apply(bias))


def _turn_heads(weights: BlockWeights, pair: SmoothPair, rotation: Rotation) -> None:
    """R2^T V_h for every key/value head, O_h R2 for every query head."""
    matrix, bias, rows = weights.matrix(pair.source), weights.bias(pair.source), pair.rows
    values = matrix[rows].view(-1, rotation.size, matrix.shape[1]).transpose(1, 2)
    matrix[rows] = rotation.apply(values).transpose(1, 2).reshape(-1, matrix.shape[1])
    if bias is not None:
        bias[rows] = rotation.apply(bias[rows].view(-1, rotation.size)).flatten()
    for reader in pair.readers:
        out = weights.matrix(reader)
        turned = rotation.apply(out.reshape(len(out), -1, rotation.size))
        out.copy_(turned.reshape(out.shape))


def _post_norms(block: Block, pairs: list[SmoothPair], width: int) -> list[str]:
    """Norms as wide as the stream that no linear reads."""
    read = {pair.source for pair in pairs}
    norms = {n: m for n, m in block.module.named_modules() if is_norm(m)}
    return [
        n for n, m in norms.items() if n not in read and len(m.get_parameter("weight")) == width
    ]


def _unfaithful(skeleton: Skeleton, what: str, by: float, norms: list[str]) -> UnsupportedError:
    suspects = f"Norms that no linear reads: {', '.join(norms)}. " if norms else ""
    return UnsupportedError(
        f"{skeleton.model_type} cannot be rotated: {what} would compute something else "
        f"(by {by:.1e})",
        code="CK26",
        where=Where(key=skeleton.blocks_name),
        why=f"{suspects}Only what commutes with a rotation may stand between the linears.",
        fix="use method: awq, which needs no rotation; if values are gated, try values: false",
    )
