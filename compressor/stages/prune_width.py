"""Prune width: fewer MLP channels, fewer groups of attention heads; the same count in every layer.

    MLP channel      sqrt(mean a^2) ||column of down_proj||       a = what down_proj reads
    KV group         the same, summed over the inputs of o_proj that belong to the group

A key/value head goes together with all query heads that share it, so grouped-query attention stays
regular. Block by block, on the activations of the blocks already narrowed: rank, keep the best,
re-solve the reading linear (down_proj, o_proj) by least squares on what is kept, towards the dense
outputs of the original stream. The tensors get physically smaller and the configuration says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compressor.algorithms.gptq import hessian_error
from compressor.algorithms.reconstruct import reconstruct
from compressor.algorithms.structured import (
    kv_group_importance,
    mlp_channel_importance,
    repair_linear,
    select_channels,
)
from compressor.artifact.formats import fits
from compressor.artifact.packing import PackedWeight, pack_weight, unpack_weight
from compressor.errors import RecipeError, UnsupportedError
from compressor.modeling.block import Block, load_block
from compressor.modeling.linears import StoredLinear, find_linears, packed_from_tensors
from compressor.modeling.skeleton import Skeleton, parse_config
from compressor.modeling.state import BlockTensors, ModelState
from compressor.recipe import PruneConfig
from compressor.stages.blockwise import Rewritten, Sweep
from compressor.stages.context import StageContext, StageReport
from compressor.stages.group_sums import GroupStatistics
from compressor.stages.kept import kept_count
from compressor.stages.solve import Rounding, round_stack
from compressor.stages.statistics import BlockStatistics, Collection

GATE, UP, DOWN = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
Q, K, V, O = (f"self_attn.{leaf}_proj" for leaf in "qkvo")  # noqa: E741
ALIGNMENTS = (128, 64, 32, 16, 8, 4, 2, 1)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a block: MLP channels, key/value heads, query heads for each, head width."""

    channels: int
    kv_heads: int
    group: int
    head_dim: int

    def head_columns(self, kept: Tensor) -> Tensor:
        """Rows of q_proj (columns of o_proj) that belong to the kept KV groups."""
        return _spans(kept, self.group * self.head_dim)

    def kv_rows(self, kept: Tensor) -> Tensor:
        """Rows of k_proj and v_proj of the kept KV groups."""
        return _spans(kept, self.head_dim)


def _spans(kept: Tensor, width: int) -> Tensor:
    return (kept[:, None] * width + torch.arange(width)).flatten()


def prune_width(config: PruneConfig, context: StageContext) -> StageReport:
    """Narrow every block alike.

    Raises:
        RecipeError: a count that does not fit the model (RC17) or its stored groups (CK29).
        UnsupportedError: blocks that are not gated MLP plus separate q/k/v/o projections.
    """
    before, after, done = narrowed(config, context)
    sizes = {"mlp": [before.channels, after.channels]}
    sizes["kv_groups"] = [before.kv_heads, after.kv_heads]
    facts = {"linears": done.linears, "held_out_kl": done.held_out_kl, "width": sizes}
    return StageReport(done.state, facts | {"notes": _notes(config, before, after)})


def new_shape(config: PruneConfig, state: ModelState) -> tuple[Shape, Shape, dict[str, Any]]:
    """Sizes before and after, and the configuration after; raises as `prune_width`."""
    before = block_shape(state.config)
    check_structure(state.skeleton(), before)
    after = _wanted(config, before)
    return before, after, _new_config(config, state.config, before, after)


def narrowed(
    config: PruneConfig, context: StageContext, *, tag: str = ""
) -> tuple[Shape, Shape, Rewritten]:
    """The narrower model; tag: prefix of unit names."""
    before, after, new_config = new_shape(config, context.state)
    sweep = Sweep(context, tag=tag)
    collection = Collection(asymmetric=True, sequential=True)
    statistics = BlockStatistics(sweep.walk, sweep.streams, sweep.rows, collection)

    def rewrite(
        position: int, original: Block, source: BlockTensors
    ) -> tuple[BlockTensors, dict[str, Any]]:
        block = load_block(sweep.walk.skeleton, position, source)
        cut = _Cut(config, before, after, source)
        for group, found in statistics.groups(position, original, block, cut.readers()):
            for name in group:
                cut.narrow(name, block.linears[name], original.linears[name].dense(), found)
        return cut.result(), cut.facts

    return before, after, sweep.run(rewrite, shape_of=replace(context.state, config=new_config))


def block_shape(config: dict[str, Any]) -> Shape:
    """Sizes of a block by its configuration."""
    parsed = parse_config(config)
    try:
        heads, hidden = parsed.num_attention_heads, parsed.hidden_size
        kv_heads = getattr(parsed, "num_key_value_heads", None) or heads
        head_dim = getattr(parsed, "head_dim", None) or hidden // heads
        return Shape(int(parsed.intermediate_size), int(kv_heads), heads // kv_heads, int(head_dim))
    except (AttributeError, TypeError) as error:
        raise _unsupported(str(config.get("model_type"))) from error


def check_structure(skeleton: Skeleton, shape: Shape) -> None:
    """Raises UnsupportedError (CK26) for anything but gated MLP and separate q/k/v/o."""
    heads = shape.kv_heads * shape.group * shape.head_dim
    rows = {Q: heads, K: shape.kv_heads * shape.head_dim, V: shape.kv_heads * shape.head_dim}
    rows |= {GATE: shape.channels, UP: shape.channels}
    columns = {O: heads, DOWN: shape.channels}
    for block in skeleton.blocks:
        linears = find_linears(block)
        sizes = {n: tuple(m.get_parameter("weight").shape) for n, m in linears.items()}
        if set(sizes) != rows.keys() | columns.keys():
            raise _unsupported(skeleton.model_type)
        fit = all(sizes[n][0] == r for n, r in rows.items())
        fit &= all(sizes[n][1] == c for n, c in columns.items())
        inner = {n: t for n, t in block.state_dict().items() if n.startswith("self_attn.")}
        rest = [t for n, t in inner.items() if n.rpartition(".")[0] not in linears]
        if not fit or any(t.shape != (shape.head_dim,) for t in rest):
            raise _unsupported(skeleton.model_type)


def _unsupported(model_type: str) -> UnsupportedError:
    return UnsupportedError(
        f"{model_type}: its blocks cannot be narrowed",
        code="CK26",
        why="Width pruning covers q/k/v/o_proj and gate/up/down_proj blocks (Llama, Qwen2, Qwen3, "
        "Mistral, Gemma and their kind), without experts.",
        fix="prune depth or use a sparsity instead",
    )


def _wanted(config: PruneConfig, before: Shape) -> Shape:
    width = config.width
    assert width is not None, "called for width"
    channels, groups = before.channels, before.kv_heads
    if width.mlp is not None:
        channels = kept_count(config, "mlp", width.mlp, (channels, alignment(channels)))
    if width.kv_groups is not None:
        groups = kept_count(config, "kv_groups", width.kv_groups, (groups, 1))
    if (channels, groups) == (before.channels, before.kv_heads):
        raise RecipeError(
            "this width keeps everything",
            code="RC17",
            where=config.where("width"),
            fix="give a smaller fraction or count",
        )
    return replace(before, channels=channels, kv_heads=groups)


def alignment(size: int) -> int:
    """The largest power of two up to 128 that divides a size at least eight times over."""
    return next(a for a in ALIGNMENTS if size % a == 0 and (size >= 8 * a or a == 1))


def _new_config(
    config: PruneConfig, old: dict[str, Any], before: Shape, after: Shape
) -> dict[str, Any]:
    new = dict(old)
    if after.channels != before.channels:
        new["intermediate_size"] = after.channels
    if after.kv_heads != before.kv_heads:
        new |= _heads(before, after.kv_heads)
        if not is_legal(new):
            counts = range(1, before.kv_heads)
            legal = [n for n in counts if is_legal({**new, **_heads(before, n)})]
            raise RecipeError(
                f"{new['model_type']} does not allow {new['num_attention_heads']} heads "
                f"with hidden size {new.get('hidden_size')}",
                code="RC17",
                where=config.where("width.kv_groups"),
                fix=f"KV groups that it allows: {', '.join(map(str, legal)) or 'none'}",
            )
    return new


def _heads(before: Shape, kv_heads: int) -> dict[str, int]:
    return {
        "num_attention_heads": kv_heads * before.group,
        "num_key_value_heads": kv_heads,
        "head_dim": before.head_dim,
    }


def is_legal(config: dict[str, Any]) -> bool:
    """Whether transformers accepts the configuration (its classes check the heads)."""
    try:
        parse_config(config)
    except Exception:  # its validation errors share no base class
        return False
    return True


def _notes(config: PruneConfig, before: Shape, after: Shape) -> list[str]:
    step = alignment(before.channels)
    if after.channels % step and config.width is not None and isinstance(config.width.mlp, int):
        return [f"{after.channels} channels are no multiple of {step}, as {before.channels} were"]
    return []


class _Cut:
    """What is kept of one block, found reader by reader, and the smaller tensors."""

    def __init__(
        self, config: PruneConfig, before: Shape, after: Shape, source: BlockTensors
    ) -> None:
        self.repair = config.reconstruct
        self.before, self.after, self.source = before, after, source
        self.facts: dict[str, Any] = {}
        self._rows: dict[str, Tensor] = {}
        self._readers: dict[str, BlockTensors] = {}

    def readers(self) -> list[str]:
        """The linears that lose inputs."""
        narrower = {O: self.after.kv_heads < self.before.kv_heads}
        narrower |= {DOWN: self.after.channels < self.before.channels}
        return [name for name, yes in narrower.items() if yes]

    def narrow(
        self, name: str, linear: StoredLinear, weight: Tensor, found: GroupStatistics
    ) -> None:
        """Choose the kept inputs [K] of a reader, mend it, and let the block compute with that."""
        columns = self._choose(name, linear.dense(), found.hessian)
        target, strength = found.target(weight, [name]) if self.repair else (linear.dense(), 0.0)
        solved = self._solved(name, target, columns, found.hessian)
        self._store_reader(name, solved, (columns, found.hessian))
        full = torch.zeros_like(target)
        full[:, columns] = solved
        plain = torch.zeros_like(target)
        plain[:, columns] = target[:, columns]
        error, whole = (hessian_error(w, found.hessian) for w in (full - target, target))
        self.facts[name] = {
            "kept": len(columns),
            "of": weight.shape[1],
            "error_before_repair": hessian_error(plain - target, found.hessian),
            "error": error,
            "relative_error": error / max(whole, 1e-30),
            "strength": strength,
        }
        linear.set_dense_exact(full)

    def _choose(self, name: str, weight: Tensor, hessian: Tensor) -> Tensor:
        energy = hessian.diagonal()
        if name == DOWN:
            importance = mlp_channel_importance(energy, weight)
            kept = select_channels(importance, self.after.channels).cpu()
            self._rows |= {GATE: kept, UP: kept}
            return kept
        scores = kv_group_importance(energy, num_kv_heads=self.before.kv_heads, o_weight=weight)
        groups = select_channels(scores, self.after.kv_heads).cpu()
        heads, rows = self.before.head_columns(groups), self.before.kv_rows(groups)
        self._rows |= {Q: heads, K: rows, V: rows}
        return heads

    def _solved(self, name: str, target: Tensor, columns: Tensor, hessian: Tensor) -> Tensor:
        if not self.repair:
            return target[:, columns]
        if name not in self.source.masked:
            return repair_linear(target, columns, hessian)
        mask = (self._weight(name) != 0).to(target.device)
        gone = torch.ones_like(mask[0])
        gone[columns] = False
        mask[:, gone] = False
        return reconstruct(target, hessian, mask)[:, columns]

    def _weight(self, name: str) -> Tensor:
        if name not in self.source.formats:
            return self.source.tensors[f"{name}.weight"].float()
        linear = StoredLinear(torch.empty(0), None)
        linear.set_packed(self._packed(name))
        return linear.dense()

    def _packed(self, name: str) -> PackedWeight:
        return packed_from_tensors(self.source.tensors, name, self.source.formats[name])

    def _store_reader(self, name: str, solved: Tensor, of: tuple[Tensor, Tensor]) -> None:
        """Keep what will be stored of a reader: cast, or rounded again into the same format."""
        columns, hessian = of
        fmt = self.source.formats.get(name)
        if fmt is None:
            cast = solved.to(self.source.tensors[f"{name}.weight"].dtype).cpu()
            self._readers[name] = BlockTensors({f"{name}.weight": cast})
            return
        if not fits(fmt, len(columns)):
            raise RecipeError(
                f"{len(columns)} kept inputs of {name} cannot be split into groups of "
                f"{fmt.group_size}",
                code="CK29",
                fix=f"keep a multiple of {fmt.group_size}, or prune width before quantize",
            )
        linear = StoredLinear(solved, None)
        mask = solved != 0 if name in self.source.masked else None
        round_stack([linear], Rounding(solved, hessian[columns][:, columns], fmt, mask))
        assert linear.packed is not None, "just rounded"
        solved.copy_(linear.dense())
        parts = {f"{name}.{suffix}": t for suffix, t in linear.packed.tensors.items()}
        self._readers[name] = BlockTensors(parts)

    def result(self) -> BlockTensors:
        """The block's tensors, smaller."""
        tensors = dict(self.source.tensors)
        for name, rows in self._rows.items():
            tensors |= self._fewer_outputs(name, rows)
        for reader in self._readers.values():
            tensors |= reader.tensors
        return BlockTensors(tensors, self.source.formats, self.source.masked)

    def _fewer_outputs(self, name: str, rows: Tensor) -> dict[str, Tensor]:
        bias = self.source.tensors.get(f"{name}.bias")
        found = {} if bias is None else {f"{name}.bias": bias[rows]}
        if name not in self.source.formats:
            return {**found, f"{name}.weight": self.source.tensors[f"{name}.weight"][rows]}
        packed = self._packed(name)
        codes, scale, zero = unpack_weight(packed)
        fewer = pack_weight(codes[rows], scale[rows], zero[rows], packed.format)
        return found | {f"{name}.{suffix}": t for suffix, t in fewer.tensors.items()}
