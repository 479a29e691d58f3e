"""A whole model in memory that can be trained: transformers' own blocks over our linears.

The blocks run one after another as in the walk, between `Skeleton.enter` and `Skeleton.leave`, so
the states between them are at hand and the head can be asked for a few tokens at a time. Every
number is a parameter, frozen until somebody asks for its gradient:

    dense linear       weight fp32 [O, I]; a mask keeps pruned weights at zero
        or             factors of an adapter, merged (`adapters`)
    quantized linear   log|scale| [O, G]; codes, zero points and signs never change
        or             positions on the grid [O, G, g] and factors of scales [O, G] (`CodesLinear`)

Legend: B rows, T tokens, D width, V vocabulary, O out, I in, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from compressor.algorithms import products
from compressor.algorithms.distillation import exported_scale, scaled_dequantize
from compressor.algorithms.float_grid import FloatGrid
from compressor.algorithms.grid import Grid
from compressor.algorithms.input_rounding import round_inputs
from compressor.algorithms.latent_rounding import LatentWeight
from compressor.artifact.formats import SCALE_DTYPES, LayerFormat
from compressor.artifact.packing import pack_weight
from compressor.errors import UnsupportedError
from compressor.modeling.adapters import AdaptedLinear, Adapter, Adapters
from compressor.modeling.block import Block, load_block
from compressor.modeling.linears import StoredLinear
from compressor.modeling.skeleton import Skeleton
from compressor.modeling.state import ModelState

OUTER = -1  # position of the tensors outside of the blocks
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
Kind = Literal["weight", "scale", "latent", "adapter", "vector", "table"]
Near = Callable[[int, str], Tensor | None]  # the dense weight [O, I] behind the codes of a linear


class DenseLinear(nn.Module):
    """A linear layer whose weight can be trained; `keep` is False where it was pruned."""

    keep: Tensor | None

    def __init__(self, linear: StoredLinear, *, masked: bool) -> None:
        super().__init__()
        weight = linear.dense().clone()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = _bias(linear)
        self.register_buffer("keep", weight != 0 if masked else None)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return products.linear(x, self.weight, self.bias)


class ScaledLinear(nn.Module):
    """A quantized linear layer whose scales can be trained; it computes with what is stored."""

    codes: Tensor
    zero_point: Tensor
    sign: Tensor

    def __init__(self, linear: StoredLinear) -> None:
        super().__init__()
        fmt = linear.format
        assert fmt is not None, "only for quantized linears"
        if fmt.preset.is_fixed:
            raise UnsupportedError(
                f"{fmt.label} layers cannot be trained",
                code="CK26",
                why="Only scales of integers with 16-bit activations are trainable.",
                fix="use train: codes, or distill before the quantize stage",
            )
        codes, scale, zero = linear.codes()
        self.register_buffer("codes", codes)
        self.register_buffer("zero_point", zero)
        self.register_buffer("sign", torch.where(scale < 0, -1.0, 1.0))
        self.log_scale = nn.Parameter(scale.abs().log(), requires_grad=False)
        self.bias = _bias(linear)
        self.group_size, self.scale_dtype = fmt.group_size, SCALE_DTYPES[fmt.scale_dtype]

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        weight = scaled_dequantize(
            self.codes,
            self.zero_point,
            self.log_scale,
            self.group_size,
            scale_dtype=self.scale_dtype,
            sign=self.sign,
        )
        return products.linear(x, weight, self.bias)

    def exported_scale(self) -> Tensor:
        """Scales fp32 [O, G] as they are stored."""
        return exported_scale(self.log_scale, scale_dtype=self.scale_dtype) * self.sign


class CodesLinear(nn.Module):
    """A quantized linear layer whose codes can be trained, its scales too if they are integers'.

    It computes with what would be stored now, and rounds its inputs as its format says; both
    roundings pass gradients straight through.
    """

    def __init__(
        self,
        linear: StoredLinear,
        *,
        near: Tensor | None,
        masked: bool,
        device: torch.device,
    ) -> None:
        """Start at the stored codes, as close to the dense weight `near` [O, I] as they allow."""
        super().__init__()
        assert linear.packed is not None, "only for quantized linears"
        self.format, self.global_scales = linear.packed.format, linear.packed.global_scales
        self.input_scale = self.global_scales.get("input_global_scale")
        codes, scale, zero = (part.to(device) for part in linear.codes())
        self.latent = LatentWeight(
            codes,
            _grid(scale, zero, self.format),
            scale_dtype=SCALE_DTYPES.get(self.format.scale_dtype, torch.float32),
            near=near if near is not None and near.shape == codes.shape else None,
            mask=(linear.dense() != 0).to(device) if masked else None,
        )
        self.offset = nn.Parameter(self.latent.offset.detach(), requires_grad=False)
        self.latent.offset = self.offset
        if self.format.number == "int":
            self.factor = nn.Parameter(self.latent.factor.detach(), requires_grad=False)
            self.latent.factor = self.factor
        self.bias = _bias(linear)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        rounded = round_inputs(x.detach(), self.format.activations, self.input_scale)
        return products.linear(x + (rounded - x.detach()), self.latent.value(), self.bias)

    def exported_codes(self) -> Tensor:
        """The codes as they are stored."""
        codes, grid = self.latent.rounded()
        parts = (codes.cpu(), grid.scale.cpu(), grid.zero_point.cpu())
        packed = pack_weight(*parts, self.format, global_scales=self.global_scales)
        return packed.tensors[codes_suffix(self.format)]

    def exported_scale(self) -> Tensor:
        """Scales fp32 [O, G] as they are stored."""
        return self.latent.scale().detach()


def codes_suffix(fmt: LayerFormat) -> str:
    """Name of the stored tensor that holds the codes."""
    return "weight" if fmt.stored in ("int-quantized", "float-quantized") else "weight_packed"


def _grid(scale: Tensor, zero: Tensor, fmt: LayerFormat) -> Grid | FloatGrid:
    if fmt.number == "float":
        return FloatGrid(scale, fmt.bits, fmt.block or fmt.group_size)
    return Grid(scale, zero, fmt.bits, fmt.group_size, fmt.symmetric)


def _bias(linear: StoredLinear) -> nn.Parameter | None:
    if linear.bias is None:
        return None
    return nn.Parameter(linear.bias.float().clone(), requires_grad=False)


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """A parameter and the stored tensor it stands for.

    position: of the block, or OUTER. name: of the stored tensor, block-relative inside a block.
    kind: "weight" or "adapter" of a dense linear, "scale" or "latent" (codes) of a quantized one,
    "table" (embedding, head), or "vector" (norms, biases and everything else). export: the stored
    tensor where it is not the parameter itself.
    """

    position: int
    name: str
    kind: Kind
    parameter: nn.Parameter
    dtype: torch.dtype
    keep: Tensor | None = None
    transposed: bool = False
    export: Callable[[], Tensor] | None = None

    @property
    def key(self) -> str:
        """A name that is unique in the model."""
        return f"{'outer' if self.position == OUTER else self.position}/{self.name}"

    def stored(self) -> Tensor:
        """The tensor as it would be written now, on the CPU."""
        value = whole_tensor(self.parameter.detach()) if self.export is None else self.export()
        if self.transposed:
            value = value.t()
        return value.to(self.dtype, copy=True).contiguous().cpu()


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor that may be cut up among processes, whole in each of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class WholeModel:
    """All blocks of a model, its outer part, and the slots that lead back to what is stored."""

    def __init__(
        self,
        state: ModelState,
        *,
        device: torch.device | str = "cpu",
        near: Near | None = None,
        adapters: Adapters | None = None,
        with_blocks: bool = True,
    ) -> None:
        """Read everything, or what is outside of the blocks; the compute dtype is fp32.

        Codes of quantized linears can be trained if `near` says which dense weight, if any, is
        behind those of a linear (position of its block, name); else their scales alone can. A dense
        linear with an adapter keeps its weight.
        """
        self.device = torch.device(device)
        self.skeleton = state.skeleton(self.device)
        outer = state.read_outer(self.skeleton)
        self.skeleton.fill_outer({n: t.clone() for n, t in outer.items()}, torch.float32)
        self.skeleton.model.requires_grad_(False)
        self.slots = _outer_slots(self.skeleton, outer)
        self.blocks: list[Block] = []
        for position in range(self.skeleton.num_blocks if with_blocks else 0):
            source = state.read_block(position, self.skeleton)
            block = load_block(self.skeleton, position, source)
            for name, linear in block.linears.items():
                adapter = None if adapters is None else adapters(position, name)
                behind = None if near is None else partial(near, position, name)
                new = _trainable(linear, name in block.masked, adapter, behind, self.device)
                block.module.set_submodule(name, new)
            self.slots += _slots_of_block(block, position, source.tensors)
            block.module.to(self.device)
            self.blocks.append(block)

    def dense_weight(self, position: int, linear: str) -> Tensor | None:
        """The weight fp32 [O, I] of a dense linear; None if there is none of that name."""
        modules = dict(self.blocks[position].module.named_modules())
        found = modules.get(linear)
        return found.weight.detach() if isinstance(found, DenseLinear) else None

    def hidden_states(
        self,
        tokens: Tensor,
        *,
        wanted: Sequence[int] = (-1,),
        grad: bool = False,
        recompute: bool = False,
        cache: Any = None,
    ) -> list[Tensor]:
        """Outputs [B, T, D] of the wanted blocks for tokens [B, T], with a graph if `grad`.

        With `recompute` (gradient checkpointing) the graph keeps only the blocks' inputs and
        runs each block again in the backward pass. A cache of transformers' holds tokens before.
        """
        count = len(self.blocks)
        states: dict[int, Tensor] = {}
        with torch.set_grad_enabled(grad):
            hidden, kwargs = self.skeleton.enter(tokens, grad=grad, cache=cache)
            for place, (block, known) in enumerate(zip(self.blocks, kwargs, strict=True)):
                if recompute and grad:
                    hidden = checkpoint(block.run, hidden, known, use_reentrant=False)
                else:
                    hidden = block.run(hidden, known)
                if place in wanted or place - count in wanted:
                    states[place] = hidden
        return [states[place % count] for place in wanted]

    def head_parameters(self) -> list[nn.Parameter]:
        """Everything outside of the blocks; among it, what `head` computes with."""
        return list(self.skeleton.model.parameters())

    @contextmanager
    def projections(self, position: int) -> Iterator[dict[str, Tensor]]:
        """Catch what the q, k and v projections of a block give, [B, T, W] by "q", "k", "v".

        Raises:
            UnsupportedError: the block has no such linears (CK26).
        """
        named = self.blocks[position].module.named_modules()
        found = {n.rpartition(".")[2][0]: m for n, m in named if n.endswith(PROJECTIONS)}
        if set(found) != {"q", "k", "v"}:
            raise UnsupportedError(
                f"{self.skeleton.model_type}: attention has no q_proj, k_proj and v_proj",
                code="CK26",
                fix="set attention_weight to 0",
            )
        seen: dict[str, Tensor] = {}

        def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            return lambda _, given, out: seen.update({name: out})

        handles = [m.register_forward_hook(note(name)) for name, m in found.items()]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def head(self, hidden: Tensor) -> Tensor:
        """Final norm and head: [t, D] -> logits [t, V].

        Each token passes as a sequence of its own, so any number may come at once.
        """
        alone = torch.zeros(hidden.shape[0], 1, dtype=torch.int64, device=self.device)
        return self.skeleton.leave(hidden[:, None], alone)[:, 0]


def _outer_slots(skeleton: Skeleton, outer: dict[str, Tensor]) -> list[Slot]:
    found = []
    for name, parameter in skeleton.model.named_parameters():
        if name in outer:
            kind: Kind = "table" if parameter.ndim > 1 else "vector"
            found.append(Slot(OUTER, name, kind, parameter, outer[name].dtype))
    return found


def _trainable(
    linear: StoredLinear,
    masked: bool,
    adapter: Adapter | None,
    near: Callable[[], Tensor | None] | None,
    device: torch.device,
) -> nn.Module:
    if linear.format is None and adapter is not None:
        return AdaptedLinear(linear, adapter, masked=masked)
    if linear.format is None:
        return DenseLinear(linear, masked=masked)
    if near is None:
        return ScaledLinear(linear)
    return CodesLinear(linear, near=near(), masked=masked, device=device)


def _slots_of_block(block: Block, position: int, stored: dict[str, Tensor]) -> list[Slot]:
    """The parameters of a block with trainable linears, which take the stored ones' place."""
    dense = {name for name, linear in block.linears.items() if linear.format is None}
    transposed = {name for name in dense if block.linears[name].transposed}
    modules = dict(block.module.named_modules())
    slots = []
    for name, _ in block.module.named_parameters():
        owner = name.rpartition(".")[0]
        slots.append(_slot(modules[owner], position, name, stored, owner in transposed))
    block.linears = {}
    return slots


def _slot(
    owner: nn.Module, position: int, name: str, stored: dict[str, Tensor], transposed: bool
) -> Slot:
    prefix, _, leaf = name.rpartition(".")
    parameter = owner.get_parameter(leaf)
    if isinstance(owner, ScaledLinear | CodesLinear) and leaf in ("log_scale", "factor"):
        disk, export = f"{prefix}.weight_scale", owner.exported_scale
        return Slot(position, disk, "scale", parameter, stored[disk].dtype, export=export)
    if isinstance(owner, CodesLinear) and leaf == "offset":
        disk, export = f"{prefix}.{codes_suffix(owner.format)}", owner.exported_codes
        return Slot(position, disk, "latent", parameter, stored[disk].dtype, export=export)
    if isinstance(owner, AdaptedLinear) and leaf == "factors":
        disk, export = f"{prefix}.weight", owner.exported_weight
        dtype = stored[disk].dtype
        return Slot(
            position, disk, "adapter", parameter, dtype, transposed=transposed, export=export
        )
    dtype = stored[name].dtype
    if isinstance(owner, DenseLinear) and leaf == "weight":
        return Slot(position, name, "weight", parameter, dtype, owner.keep, transposed)
    return Slot(position, name, "vector", parameter, dtype)
