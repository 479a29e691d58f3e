"""Linear layers as the walk sees them: weights kept as stored, computed in one dtype.

A `StoredLinear` holds its weight as it lies on disk (for example bf16) or as codes and grid once it
is quantized, and makes the dense fp32 matrix only for the moment of a product (in small blocks once
for many passes, see `Block.holding`). So a block in memory costs its stored bytes, and a quantized
layer computes with exactly the numbers that were stored.

The block may be on an accelerator; tensors of the file format (`packed`) stay on the CPU.

Legend: O out, I in, G groups.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compressor.algorithms import products
from compressor.algorithms.float_grid import FloatGrid
from compressor.algorithms.grid import Grid
from compressor.algorithms.input_rounding import round_inputs
from compressor.artifact.formats import LayerFormat
from compressor.artifact.packing import (
    SUFFIXES,
    PackedWeight,
    expand_codes,
    pack_weight,
    unpack_weight,
)


class StoredLinear(nn.Module):
    """A linear layer over a stored weight: dense (any dtype) or quantized (codes and grid)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, transposed: bool = False) -> None:
        """Wrap a weight.

        Args:
            weight: as on disk: [O, I], or [I, O] if `transposed` (GPT-2's Conv1D).
            bias: [O] or None.
        """
        super().__init__()
        self.stored = weight
        self.bias = bias
        self.transposed = transposed
        self.packed: PackedWeight | None = None
        self.held: Tensor | None = None  # the dense weight, while many passes share it
        self._codes: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I], whatever the orientation on disk."""
        if self.packed is not None:
            return self.packed.shape
        rows, columns = self.stored.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def format(self) -> LayerFormat | None:
        """The format of the stored codes; None while the weight is dense."""
        return self.packed.format if self.packed is not None else None

    def dense(self) -> Tensor:
        """The weight fp32 [O, I] this layer computes with."""
        if self.packed is not None and self._codes is not None:
            return expand_codes(self._codes, self.packed.format)
        weight = self.stored.t() if self.transposed else self.stored
        return weight.float()

    def set_dense(self, weight: Tensor) -> None:
        """Replace the weight by a dense one [O, I], rounded to the dtype on disk."""
        stored = weight.t().contiguous() if self.transposed else weight
        self.stored = stored.to(self.stored.dtype)
        self.packed, self._codes = None, None

    def set_dense_exact(self, weight: Tensor) -> None:
        """Replace the weight by fp32 [O, I] without rounding (trials that are never stored)."""
        self.stored = weight.t().contiguous() if self.transposed else weight
        self.packed, self._codes = None, None

    def set_packed(self, packed: PackedWeight) -> None:
        """Replace the weight by stored codes; from now on this layer computes with them."""
        self.packed = packed
        codes, scale, zero = unpack_weight(packed)
        device = self.stored.device
        self._codes = (codes.to(device), scale.to(device), zero.to(device))
        self.stored = self.stored.new_empty(0)

    def set_codes(self, codes: Tensor, scale: Tensor, zero: Tensor, fmt: LayerFormat) -> None:
        """Quantize: pack codes uint8 [O, I] and grid [O, G], then compute with what was packed.

        Global scales that are stored already are kept.
        """
        known = {} if self.packed is None else self.packed.global_scales
        parts = (codes.cpu(), scale.cpu(), zero.cpu())
        self.set_packed(pack_weight(*parts, fmt, global_scales=known))

    def set_rounded(self, codes: Tensor, grid: Grid | FloatGrid, fmt: LayerFormat) -> None:
        """Quantize: pack codes uint8 [O, I] on a grid of O rows, global scale included."""
        known = {}
        if isinstance(grid, FloatGrid) and grid.global_scale is not None:
            known = {"weight_global_scale": grid.global_scale.cpu()}
        parts = (codes.cpu(), grid.scale.cpu(), grid.zero_point.cpu())
        self.set_packed(pack_weight(*parts, fmt, global_scales=known))

    def add_input_scale(self, global_scale: Tensor) -> None:
        """Store the calibrated global scale of the inputs, fp32 [1] (NVFP4)."""
        assert self.packed is not None, "only quantized layers round their inputs"
        self.packed.tensors["input_global_scale"] = global_scale

    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes uint8 [O, I], scale fp32 [O, G], zero point int32 [O, G]; quantized layers only."""
        if self._codes is None:
            raise ValueError("this layer is dense")
        return self._codes

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O] in the dtype of x; inputs are rounded as the format says."""
        if self.packed is not None and self.packed.format.activations != "none":
            known = self.packed.tensors.get("input_global_scale")
            known = None if known is None else known.to(x.device)
            x = round_inputs(x, self.packed.format.activations, known)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weight = self.dense() if self.held is None else self.held
        return products.linear(x, weight.to(x.dtype), bias)


def is_linear(module: nn.Module) -> bool:
    """Whether a module of transformers' own class is a linear layer."""
    return isinstance(module, (nn.Linear, Conv1D))


def find_linears(block: nn.Module) -> dict[str, nn.Module]:
    """Block-relative names of all linear layers, in order of definition."""
    return {name: m for name, m in block.named_modules() if is_linear(m)}


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """[O, I] of a linear of transformers' own class, whatever its orientation."""
    weight = module.get_parameter("weight")
    rows, columns = weight.t().shape if isinstance(module, Conv1D) else weight.shape
    return rows, columns


def packed_from_tensors(tensors: dict[str, Tensor], linear: str, fmt: LayerFormat) -> PackedWeight:
    """Pick one linear's stored tensors out of a block's."""
    prefix = f"{linear}."
    named = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    return PackedWeight({k: v for k, v in named.items() if k in SUFFIXES}, fmt)
