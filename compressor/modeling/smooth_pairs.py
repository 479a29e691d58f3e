"""Which weights of a block can trade a scale for each channel without changing the block.

    norm    gain of a norm -> columns of all weights that read its output (routers, experts)
    value   rows of the value projection -> columns of the output projection (through attention)
    mlp     rows of up -> columns of down (through the product with the gate)

Readers of a norm are observed, not listed: a module belongs to it if it is called with the very
tensor that the norm gave. What the structure does not tell is where the values lie inside a fused
projection: that is the table LAYOUTS. Nothing here is trusted; whoever scales checks the block's
output (`stages/transform_proof.py`).

Legend: D width, O out, I in, K key/value heads, G query heads for each, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.modeling.block import Block
from compressor.modeling.experts import SplitExperts
from compressor.modeling.linears import StoredLinear

PairKind = Literal["norm", "value", "mlp"]
# names of the projection that holds the values, of the output projection, and where values lie
LAYOUTS: tuple[tuple[str, str, str], ...] = (
    ("v_proj", "o_proj", "all"),
    ("v_proj", "dense", "all"),
    ("v_proj", "out_proj", "all"),
    ("qkv_proj", "o_proj", "last"),
    ("c_attn", "c_proj", "last"),
    ("query_key_value", "dense", "each head"),
)
# the factor of a gated MLP that passes through no nonlinearity, and where its rows lie
GATED: tuple[tuple[str, str, str], ...] = (
    ("up_proj", "down_proj", "all"),
    ("gate_up_proj", "down_proj", "second half"),
)


@dataclass(frozen=True, slots=True)
class Heads:
    """Shape of attention: key/value heads K, query heads for each G, head width d."""

    kv_heads: int
    group: int
    width: int


@dataclass(frozen=True, slots=True, eq=False)
class SmoothPair:
    """A source whose channels can be divided by s, and the readers whose columns take it back.

    kind: see the module.
    source: norm or linear, block-relative.
    readers: linears and routers, block-relative; what they read are the source's channels.
    offset: a norm multiplies by (offset + weight); 1 for Gemma, 0 elsewhere.
    rows: of a source linear that are channels; None for norms.
    heads: for "value": each channel is read by G query heads.
    """

    kind: PairKind
    source: str
    readers: tuple[str, ...]
    offset: float = 0.0
    rows: Tensor | None = None
    heads: Heads | None = None

    def spread(self, channels: Tensor) -> Tensor:
        """One number for each channel of the source -> for each column of the readers."""
        if self.heads is None:
            return channels
        h = self.heads
        return channels.view(h.kv_heads, 1, h.width).expand(-1, h.group, -1).reshape(-1)

    def gather(self, columns: Tensor) -> Tensor:
        """One size for each column of the readers -> the largest for each channel."""
        if self.heads is None:
            return columns
        h = self.heads
        return columns.view(h.kv_heads, h.group, h.width).amax(1).reshape(-1)


@dataclass(slots=True)
class _Seen:
    """What one run of a block told: norms' outputs, and the modules called with each tensor."""

    outputs: dict[tuple[int, int], str] = field(default_factory=dict)
    readers: dict[str, list[str]] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)


def find_pairs(
    block: Block, hidden: Tensor, kwargs: dict[str, Any], config: Any
) -> list[SmoothPair]:
    """All pairs of a block that its structure suggests, in order of the computation.

    Args:
        block: dense.
        hidden: [B, T, D] some inputs of the block.
        kwargs: of the call.
        config: transformers' configuration object.
    """
    pairs = norm_pairs(block, hidden, kwargs)
    heads = attention_heads(config)
    if heads is not None:
        pairs += value_pairs(block, heads)
    return pairs + mlp_pairs(block)


@torch.no_grad()
def norm_pairs(block: Block, hidden: Tensor, kwargs: dict[str, Any]) -> list[SmoothPair]:
    """Norms with a gain, and everything that reads what they give; post-norms have no readers."""
    seen = _observe(block, hidden, kwargs)
    found = []
    for norm, readers in seen.readers.items():
        offset = gain_offset(block.module.get_submodule(norm))
        if readers and offset is not None:
            found.append(SmoothPair("norm", norm, tuple(readers), offset=offset))
    return found


def gain_offset(norm: nn.Module) -> float | None:
    """c of norm(x) = n(x) (c + weight) + bias, found by trying weights 0 and 1; None if neither."""
    weight = norm.get_parameter("weight")
    x = torch.linspace(-1.0, 2.0, weight.shape[0], device=weight.device)[None]
    answers = []
    for value in (0.0, 1.0):
        trial = {"weight": torch.full_like(weight, value)}
        if getattr(norm, "bias", None) is not None:
            trial["bias"] = torch.zeros_like(weight)
        answers.append(torch.func.functional_call(norm, trial, (x,)))
    at_zero, unit = answers[0], answers[1] - answers[0]
    for offset in (0.0, 1.0):
        if torch.allclose(at_zero, offset * unit, atol=1e-5) and bool(unit.any()):
            return offset
    return None


def subtracts_mean(norm: nn.Module) -> bool:
    """Whether a norm looks only at differences between channels, as LayerNorm does."""
    weight = norm.get_parameter("weight")
    x = torch.linspace(-1.0, 2.0, weight.shape[0], device=weight.device)[None]
    trial = {"weight": torch.ones_like(weight)}
    first, second = (torch.func.functional_call(norm, trial, (x + c,)) for c in (0.0, 1.0))
    return torch.allclose(first, second, atol=1e-3)


def is_norm(module: nn.Module) -> bool:
    """A module with nothing but a gain [D] and perhaps a bias [D]."""
    parameters = dict(module.named_parameters())
    shapes = {tuple(p.shape) for p in parameters.values()}
    flat = len(shapes) == 1 and len(next(iter(shapes))) == 1
    return "weight" in parameters and parameters.keys() <= {"weight", "bias"} and flat


def _observe(block: Block, hidden: Tensor, kwargs: dict[str, Any]) -> _Seen:
    seen = _Seen()
    handles = []
    for name, module in block.module.named_modules():
        if is_norm(module):
            handles.append(module.register_forward_hook(_note_output(seen, name)))
        elif _reads_columns(module) or isinstance(module, SplitExperts):
            handles.append(module.register_forward_pre_hook(_note_reader(seen, name)))
    try:
        block.run(hidden, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _reads_columns(module: nn.Module) -> bool:
    """Linears, and routers: modules with one matrix of their own."""
    if isinstance(module, StoredLinear):
        return True
    own = [p for p in module.parameters(recurse=False) if p.ndim == 2]
    return len(own) == 1 and getattr(module, "weight", None) is own[0]


def _note_output(seen: _Seen, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(_: nn.Module, __: Any, output: Tensor) -> None:
        seen.alive.append(output)
        seen.outputs[(output.data_ptr(), output.numel())] = name
        seen.readers.setdefault(name, [])

    return hook


def _note_reader(seen: _Seen, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args or not isinstance(args[0], Tensor):
            return
        norm = seen.outputs.get((args[0].data_ptr(), args[0].numel()))
        if norm is None:
            return
        if isinstance(module, SplitExperts):
            ends = ("gate_proj", "up_proj")
            seen.readers[norm] += [f"{name}.{i}.{e}" for i in range(len(module)) for e in ends]
        else:
            seen.readers[norm].append(name)

    return hook


def attention_heads(config: Any) -> Heads | None:
    """Shape of attention by a configuration; None if it names no heads."""
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(width, int):
        return None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    if heads % kv_heads:
        return None
    return Heads(int(kv_heads), int(heads // kv_heads), int(head_dim))


def value_pairs(block: Block, heads: Heads) -> list[SmoothPair]:
    """The value and the output projection of attention, where their shapes fit the heads."""
    for value, output, layout in LAYOUTS:
        for name in block.linears:
            parent, _, leaf = name.rpartition(".")
            other = f"{parent}.{output}" if parent else output
            if leaf != value or other not in block.linears:
                continue
            rows = _value_rows(layout, block.linears[name].shape[0], heads)
            columns = block.linears[other].shape[1]
            if rows is not None and columns == heads.kv_heads * heads.group * heads.width:
                return [SmoothPair("value", name, (other,), rows=rows, heads=heads)]
    return []


def _value_rows(layout: str, num_rows: int, heads: Heads) -> Tensor | None:
    """Rows of the values in the order of the key/value heads; None if the sizes do not fit."""
    count = heads.kv_heads * heads.width
    whole = count * (heads.group + 2)  # queries, keys and values in one matrix
    rows = torch.arange(num_rows)
    if layout == "all":
        return rows if num_rows == count else None
    if num_rows != whole or (layout == "each head" and heads.group != 1):
        return None
    if layout == "last":
        return rows[-count:]
    return rows.view(heads.kv_heads, 3, heads.width)[:, 2].reshape(-1)


def mlp_pairs(block: Block) -> list[SmoothPair]:
    """up and down of every gated MLP, experts included."""
    found = []
    for name, linear in block.linears.items():
        parent, _, leaf = name.rpartition(".")
        for up, down, layout in GATED:
            other = f"{parent}.{down}" if parent else down
            if leaf != up or other not in block.linears:
                continue
            channels = block.linears[other].shape[1]
            rows = torch.arange(linear.shape[0])[-channels:]
            gated = layout == "second half" or f"{parent}.gate_proj" in block.linears
            if gated and linear.shape[0] == channels * (2 if layout == "second half" else 1):
                found.append(SmoothPair("mlp", name, (other,), rows=rows))
    return found
