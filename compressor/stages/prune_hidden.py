"""Prune the hidden size: the same channels of the residual stream go in every block and outside.

    importance of a channel    sum over the linears that read it of sqrt(E x_c^2) ||column c of W||

(x: what a linear reads behind its norm; as MLP channels are ranked.) Embedding, norms and head lose
these channels, linears that read the stream lose columns, linears that write to it lose rows. Then,
block by block on the activations of the narrower model, every linear is re-solved towards what the
original gave:

    W' = W C (H + r I)^-1,    C = mean x x~^T [I, I'],   H = mean x~ x~^T [I', I']

which also absorbs that a norm over fewer channels has another length; the last linear of a block
also learns what the stream has lost so far (`depth_repair.py`). The final norm is rescaled. This is
a start for distillation, not a finished model: the stream is the most sensitive width of all.

Legend: D hidden size, K kept channels, I inputs of a linear, x~ its inputs in the narrower model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compressor.algorithms.gptq import cholesky_factor, times_inverse
from compressor.algorithms.hessian import HessianAccumulator
from compressor.algorithms.products import add_products, by_feature
from compressor.algorithms.structured import mlp_channel_importance, select_channels
from compressor.errors import RecipeError, UnsupportedError
from compressor.modeling.activations import ActivationStore
from compressor.modeling.block import Block, block_tensors, input_phases, inputs_of, load_block
from compressor.modeling.state import BlockTensors, ModelState
from compressor.modeling.walk import Walk
from compressor.recipe import PruneConfig
from compressor.stages.context import StageContext, StageReport
from compressor.stages.depth_repair import mend
from compressor.stages.held_out import HeldOut
from compressor.stages.kept import kept_count
from compressor.stages.prune_width import (
    DOWN,
    GATE,
    UP,
    K,
    O,
    Q,
    V,
    alignment,
    block_shape,
    check_structure,
    is_legal,
)
from compressor.stages.statistics import calibration_rows

RIDGE = 1e-3  # of the mean of diag H
READERS, WRITERS = (Q, K, V, GATE, UP), (O, DOWN)


def prune_hidden(config: PruneConfig, context: StageContext) -> StageReport:
    """Narrow the residual stream.

    Raises:
        RecipeError: a count that does not fit the model (RC17).
        UnsupportedError: other blocks than pre-norm attention and gated MLP, or quantized ones.
    """
    assert context.tokens is not None, "checked by the caller"
    whole = Walk(context.state, context.tokens, context.walk_options())
    new = _new_config(config, whole)
    kept = _chosen(context, whole, int(new["hidden_size"]))
    state = _cut_outer(context, replace(context.state, config=new), kept)
    narrow = Walk(state, context.tokens, context.walk_options())
    streams = _Streams(whole.open_stream("hidden-whole"), narrow.open_stream("hidden"), kept)
    facts: dict[str, Any] = {}
    for position in range(whole.num_blocks):
        original, unit = whole.load(position), f"block-{position:04d}"
        if not context.run.is_done(unit):
            source = _cut_block(context.state.read_block(position, whole.skeleton), kept)
            block, found = load_block(narrow.skeleton, position, source), {}
            if config.reconstruct:
                _resolve((whole, narrow), (original, block), position, streams)
                whole.advance(streams.whole, original, position)
                found = mend(narrow, block, position, (streams, streams.narrow))
            stored = block_tensors(block, source)
            context.run.commit(unit, stored.tensors, {**stored.meta(), "facts": found})
        whole.advance(streams.whole, original, position)
        meta = context.run.meta(unit)
        state = state.with_block(position, context.run.file(unit), meta)
        facts |= {f"{whole.block_name(position)}.{n}": f for n, f in meta["facts"].items()}
        narrow.state = state
        narrow.advance(streams.narrow, narrow.load(position), position)
        context.run.progress({"unit": unit, "index": position + 1, "total": whole.num_blocks})
    state = _rescaled(context, state, narrow, streams)
    sizes = {"hidden": [streams.whole.width, len(kept)]}
    kl = HeldOut(context).measure(state).mean
    streams.close()
    return StageReport(state, {"linears": facts, "width": sizes, "held_out_kl": kl})


@dataclass(frozen=True, slots=True)
class _Streams:
    """Activations of both models; read as one store it gives the kept channels of the whole one."""

    whole: ActivationStore
    narrow: ActivationStore
    kept: Tensor

    def read(self, rows: slice) -> Tensor:
        """[B, T, K]."""
        return self.whole.read(rows)[..., self.kept]

    def close(self) -> None:
        """Remove their files, if there are any."""
        self.whole.close()
        self.narrow.close()


def _new_config(config: PruneConfig, whole: Walk) -> dict[str, Any]:
    old = whole.state.config
    shape = block_shape(old)
    check_structure(whole.skeleton, shape)
    _check_plain(whole)
    assert config.width is not None, "called for width"
    assert config.width.hidden is not None, "called for the hidden size"
    size = int(old["hidden_size"])
    count = kept_count(config, "hidden", config.width.hidden, (size, alignment(size)))
    new = {**old, "hidden_size": count, "head_dim": shape.head_dim}
    if count == size or not is_legal(new):
        raise RecipeError(
            f"{old['model_type']} cannot have a hidden size of {count} for one of {size}",
            code="RC17",
            where=config.where("width.hidden"),
            fix="keep fewer channels, a multiple of the number of heads",
        )
    return new


def _check_plain(whole: Walk) -> None:
    """Dense blocks with two norms, and an embedding that enters them as it is."""
    quantized = any(r.meta.get("formats") or r.meta.get("masked") for r in whole.state.blocks)
    names = whole.skeleton.blocks[0].state_dict()
    norms = [n for n in names if "norm" in n and not n.startswith("self_attn.")]
    row = slice(0, 1)
    table = whole.skeleton.model.get_input_embeddings().weight
    entered, _ = whole.skeleton.enter(whole.tokens[row])
    if quantized or len(norms) != 2 or not torch.equal(entered, table[whole.tokens[row]]):
        raise UnsupportedError(
            f"{whole.skeleton.model_type}: its hidden size cannot be pruned",
            code="CK26",
            why="It covers dense blocks with one norm before attention and one before the MLP, "
            "and embeddings that are not scaled.",
            fix="prune mlp, kv_groups or depth, and before quantize",
        )


@torch.no_grad()
def _chosen(context: StageContext, whole: Walk, count: int) -> Tensor:
    """The kept channels [K], rising; journaled."""
    if not context.run.is_done("channels"):
        stream = whole.open_stream("importance")
        importance = torch.zeros(stream.width)
        for position in range(whole.num_blocks):
            block = whole.load(position)
            for head, readers in ((Q, (Q, K, V)), (GATE, (GATE, UP))):
                energy, tokens = torch.zeros(stream.width), 0
                for rows in whole.batches(calibration_rows(whole)):
                    kwargs = whole.kwargs(rows, position)
                    seen = inputs_of(block, [head], stream.read(rows), kwargs)
                    x = whole.real_tokens(rows, seen[head]).float()
                    energy, tokens = energy + x.square().sum(0), tokens + len(x)
                weights = torch.cat([block.linears[n].dense() for n in readers])
                importance += mlp_channel_importance(energy / max(tokens, 1), weights)
            whole.advance(stream, block, position)
        stream.close()
        context.run.commit_meta("channels", {"kept": select_channels(importance, count).tolist()})
    return torch.tensor(context.run.meta("channels")["kept"])


def _cut_block(source: BlockTensors, kept: Tensor) -> BlockTensors:
    tensors = {}
    for name, tensor in source.tensors.items():
        linear, _, leaf = name.rpartition(".")
        if linear in READERS:
            tensors[name] = tensor[:, kept] if leaf == "weight" else tensor
        elif linear in WRITERS or not name.startswith("self_attn."):
            tensors[name] = tensor[kept]
        else:
            tensors[name] = tensor
    return BlockTensors({n: t.contiguous() for n, t in tensors.items()})


def _cut_outer(context: StageContext, state: ModelState, kept: Tensor) -> ModelState:
    """Embedding, final norm and head with the kept channels (their last dimension)."""
    if not context.run.is_done("cut"):
        outer = context.state.read_outer(context.state.skeleton())
        tensors = {n: t[..., kept].contiguous() for n, t in outer.items()}
        context.run.commit("cut", tensors, {})
    return replace(state, outer=context.run.file("cut"), outer_formats={})


@torch.no_grad()
def _resolve(
    walks: tuple[Walk, Walk], pair: tuple[Block, Block], position: int, streams: _Streams
) -> None:
    """Re-solve every linear of the narrow block in place, in order, but the last."""
    (whole, narrow), (original, block) = walks, pair
    first = slice(0, 1)
    hidden, kwargs = streams.narrow.read(first), narrow.kwargs(first, position)
    groups = [group for phase in input_phases(block, hidden, kwargs) for group in phase]
    for group in (g for g in groups if DOWN not in g):
        head = group[0]
        columns = block.linears[head].shape[1]
        total = HessianAccumulator(columns, with_cross=False, device=narrow.device)
        cross = torch.zeros(original.linears[head].shape[1], columns, device=narrow.device)
        for rows in narrow.batches(calibration_rows(narrow)):
            there = inputs_of(
                original, [head], streams.whole.read(rows), whole.kwargs(rows, position)
            )
            here = inputs_of(
                block, [head], streams.narrow.read(rows), narrow.kwargs(rows, position)
            )
            x = whole.real_tokens(rows, there[head]).float()
            features = total.add(narrow.real_tokens(rows, here[head]))
            add_products(cross, by_feature(x), features)
        root, _ = cholesky_factor(total.hessian(), dampening=RIDGE)
        carried = times_inverse(cross / total.num_tokens, root)
        for name in group:
            weight = original.linears[name].dense()
            rows_left = weight[streams.kept] if name in WRITERS else weight
            block.linears[name].set_dense(rows_left @ carried)


@torch.no_grad()
def _rescaled(
    context: StageContext, state: ModelState, narrow: Walk, streams: _Streams
) -> ModelState:
    """The final norm times the factor that brings its outputs nearest to the original's."""
    if not context.run.is_done("outer"):
        above, below = 0.0, 0.0
        for rows in narrow.batches(calibration_rows(narrow)):
            y, mine = streams.whole.read(rows), streams.narrow.read(rows)
            wanted = (y / _length(y))[..., streams.kept]
            given = mine / _length(mine)
            above += float((wanted * given).sum())
            below += float(given.square().sum())
        tensors = state.read_outer(narrow.skeleton)
        (norm,) = [n for n, t in tensors.items() if t.ndim == 1]
        tensors[norm] = (tensors[norm].float() * above / below).to(tensors[norm].dtype)
        context.run.commit("outer", tensors, {})
    return replace(state, outer=context.run.file("outer"))


def _length(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
