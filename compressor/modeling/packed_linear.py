"""Layers that compute with their packed weights: what is in memory is what is on disk.

Integers run in kernels. Small floats have none here: they are dequantized once, and the product is
dense (`plan.name` is "dense", `plan.reason` says so). Inputs are rounded as the format says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from compressor.algorithms.input_rounding import round_inputs
from compressor.artifact.packing import PackedWeight, dense_weight
from compressor.recipe.presets import Activations
from compressor_kernels.dispatch import LinearPlan, LinearSpec, Product, plan_for, planar_of
from compressor_kernels.layout import PlanarWeight
from compressor_kernels.native import Weight
from compressor_kernels.native_block import Resident


def rounds_inputs(model: nn.Module) -> bool:
    """Whether a packed layer of the model rounds its inputs."""
    layers = (m for m in model.modules() if isinstance(m, PackedLinear))
    return any(layer.activations != "none" or layer.rounds for layer in layers)


@contextmanager
def unrounded_inputs(model: nn.Module) -> Iterator[None]:
    """Within it no packed layer of the model rounds its inputs.

    For comparing two ways of computing: a sum at the edge of two levels may fall to either side.
    """
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    kinds = [(layer.activations, layer.plan) for layer in layers]
    try:
        for layer in layers:
            layer.activations, layer.plan = "none", layer.plan.exact
        yield
    finally:
        for layer, (kind, plan) in zip(layers, kinds, strict=True):
            layer.activations, layer.plan = kind, plan


@dataclass(frozen=True, slots=True)
class LookupPlan:
    """How rows of a table are found: the name and reason that a `LinearPlan` has."""

    name: str
    reason: str


class PackedLinear(nn.Module):
    """y = x W^T + b with W in packed form; the kernel is chosen once, when the layer is made."""

    def __init__(
        self,
        packed: PackedWeight,
        bias: Tensor | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
        rounds: bool = False,
    ) -> None:
        """Lay the stored tensors out for the device's kernel.

        Args:
            packed: stored tensors and format of one linear.
            bias: [O] or None.
            device: where the layer will run.
            dtype: dtype of the activations.
            rounds: the C kernels of a CPU may round inputs to eight bits, where the format itself
                does not round them.
        """
        super().__init__()
        self.bias: Tensor | None
        self.input_global_scale: Tensor | None
        self.out_features, self.in_features = packed.shape
        fmt = packed.format
        spec = LinearSpec(
            fmt.bits, fmt.group_size, fmt.symmetric, packed.shape, dtype, fmt.stored, fmt.block,
            rounds and fmt.activations == "none", fmt.activations,
        )  # fmt: skip
        self.plan: LinearPlan = plan_for(device, spec)
        self.activations: Activations = fmt.activations
        known = packed.tensors.get("input_global_scale")
        self.register_buffer(
            "input_global_scale", None if known is None else known.to(device), persistent=False
        )
        self._bound: tuple[LinearPlan, Product] | None = None  # a product made at the first call
        self._names: list[str] = []
        for name, tensor in self.plan.prepare(packed.tensors).items():
            self.register_buffer(f"packed_{name}", tensor, persistent=False)
            self._names.append(name)
        own_bias = None if bias is None else bias.to(device, dtype)
        self.register_buffer("bias", own_bias, persistent=False)

    @property
    def weight(self) -> Tensor:
        """An empty tensor: some model code asks a linear's weight for its device and dtype."""
        return self._resident()[self._names[0]].new_empty(0, dtype=torch.float32)

    @property
    def resident_bytes(self) -> int:
        """Bytes that the weight occupies in memory."""
        return sum(t.nbytes for t in self._resident().values())

    @property
    def rounds(self) -> bool:
        """Whether the C kernel rounds the inputs to eight bits."""
        return self.plan.name == "native-int8"

    @property
    def is_native(self) -> bool:
        """Whether the C kernels compute it from inputs as they come."""
        return self.plan.name.startswith("native") and self.activations == "none"

    @property
    def resident(self) -> Resident:
        """The weight as the C kernels take it (only when `is_native`)."""
        spec = self.plan.spec
        weight = Weight(spec.bits, spec.group_size, spec.shape)
        bias = None if self.bias is None else self.bias.float().contiguous()
        return Resident(weight, self._resident(), bias)

    @property
    def is_triton(self) -> bool:
        """Whether the Triton kernels compute it from inputs as they come."""
        return self.plan.name == "triton" and self.activations == "none"

    @property
    def planar(self) -> PlanarWeight:
        """The weight as the Triton kernels take it (only when `is_triton`)."""
        return planar_of(self.plan.spec, self._resident())

    def _resident(self) -> dict[str, Tensor]:
        return {name: getattr(self, f"packed_{name}") for name in self._names}

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O] in the dtype of x."""
        if not self.plan.rounds_inputs:
            x = round_inputs(x, self.activations, self.input_global_scale)
        if self._bound is None or self._bound[0] is not self.plan:
            self._bound = (self.plan, self.plan.bind(self._resident(), self.bias))
        return self._bound[1](x)

    def _apply(self, *args: Any, **options: Any) -> Self:
        """`to` and its like may replace the tensors that a product was made of."""
        self._bound = None
        moved: Self = super()._apply(*args, **options)  # type: ignore[no-untyped-call]
        return moved

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.in_features}, {self.out_features}, kernel={self.plan.name}"


class PackedEmbedding(nn.Module):
    """An embedding that dequantizes the rows it is asked for; its class does the rest."""

    plan = LookupPlan("rows", "the rows of the tokens are dequantized at each call")

    def __init__(
        self,
        embedding: nn.Embedding,
        packed: PackedWeight,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Keep the stored tensors, and the original module for what its class adds (Gemma scales).

        Args:
            embedding: the module that is replaced; its weight is never read.
            packed: stored tensors and format.
            device: where the layer will run.
            dtype: of the rows.
        """
        super().__init__()
        self.original = embedding
        self.original.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        self.original.padding_idx = None
        self.num_embeddings, self.embedding_dim = packed.shape
        self.format, self.dtype = packed.format, dtype
        self._names = [n for n in packed.tensors if n != "weight_shape"]
        for name in self._names:
            self.register_buffer(
                f"packed_{name}", packed.tensors[name].to(device), persistent=False
            )

    @property
    def weight(self) -> Tensor:
        """An empty tensor: some model code asks an embedding's weight for its device and dtype."""
        known: Tensor = getattr(self, f"packed_{self._names[0]}")
        return known.new_empty(0, dtype=self.dtype)

    @property
    def resident_bytes(self) -> int:
        """Bytes that the table occupies in memory."""
        return sum(getattr(self, f"packed_{name}").nbytes for name in self._names)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> rows [..., D]."""
        flat = ids.flatten()
        parts = {name: getattr(self, f"packed_{name}")[flat].cpu() for name in self._names}
        shape = torch.tensor([len(flat), self.embedding_dim])
        rows = dense_weight(PackedWeight(parts | {"weight_shape": shape}, self.format))
        place = torch.arange(len(flat), device=ids.device).view(ids.shape)
        weights = {"weight": rows.to(ids.device, self.dtype)}
        out: Tensor = torch.func.functional_call(self.original, weights, (place,))
        return out
