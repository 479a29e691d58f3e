"""Mixture-of-experts layers on a GPU: all experts of a matrix in one launch.

    inner[i] = act(x[i / k] G_e^T) * (x[i / k] U_e^T)     i = token * k + choice, e its expert
    y[t]     = sum of the k choices of t of  r[i] * inner[i] D_e^T

`SplitExperts` asks each expert in turn, which needs to know on the CPU who was chosen; here choices
are sorted on the GPU (`moe_gemm.sort_tokens`), so a decode step can be recorded.

# T tokens, k choices a token, E experts, H hidden size, I inner size
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from compressor.modeling.experts import SplitExperts
from compressor.modeling.packed_linear import PackedLinear
from compressor_kernels.layout import PlanarWeight

_NAMES = ("gate_proj", "up_proj", "down_proj")
_TILES = (16, 32, 64)


def pack_experts(model: nn.Module) -> list[str]:
    """Replace the layers of experts that the kernel takes; notes about the others.

    A layer is taken when all of its linears are computed by Triton from inputs as they come, and
    those of one name have one format.
    """
    notes = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, SplitExperts) or not _are_packed(module):
            continue
        try:
            model.set_submodule(name, PackedExperts(module))
        except ValueError as error:
            notes.append(f"{name}: experts are computed one after another: {error}")
    return notes


def _are_packed(experts: SplitExperts) -> bool:
    linears = [getattr(expert, name) for expert in experts for name in _NAMES]
    return all(isinstance(m, PackedLinear) and m.is_triton for m in linears)


class PackedExperts(nn.Module):
    """The experts of one layer behind the call of `SplitExperts`; inputs are bf16 or fp16.

    Args:
        experts: their linears have `planar` weights, which are copied.

    Raises ValueError when the weights of one name differ in format.
    """

    def __init__(self, experts: SplitExperts) -> None:
        from compressor_kernels.moe_gemm import stack_experts  # triton exists only on Linux

        super().__init__()
        first: Any = experts[0]
        self.count, self.act = len(experts), first.act
        self.inner, self.hidden = first.gate_proj.out_features, first.down_proj.out_features
        self._weights: dict[str, PlanarWeight] = {
            name: stack_experts([getattr(expert, name).planar for expert in experts])
            for name in _NAMES
        }

    @property
    def resident_bytes(self) -> int:
        """Bytes that the weights occupy in memory."""
        return sum(weight.nbytes for weight in self._weights.values())

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], chosen experts [T, k] and their weights [T, k] -> [T, H]."""
        from compressor_kernels.moe_gemm import moe_dequant_gemm, sort_tokens

        top_k = top_k_index.shape[1]
        tokens = sort_tokens(top_k_index, self.count, block_m=self._block(top_k_index.numel()))
        shape = (self.count, self.inner, top_k)
        gate, up = (
            moe_dequant_gemm(hidden, self._weights[name], tokens, shape=shape)
            for name in _NAMES[:2]
        )
        routing = top_k_weights.flatten().float()
        shape = (self.count, self.hidden, 1)  # the rows are choices already
        inner = self.act(gate) * up
        y = moe_dequant_gemm(
            inner, self._weights["down_proj"], tokens, shape=shape, routing=routing
        )
        return y.view(-1, top_k, self.hidden).sum(1)

    def _block(self, choices: int) -> int:
        """Rows a tile: the smallest that holds what an expert gets on average."""
        return next((size for size in _TILES if choices <= size * self.count), _TILES[-1])

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.count} experts, {self.hidden}, {self.inner}, kernel=moe_dequant_gemm"


def resident_bytes(model: nn.Module) -> int:
    """Bytes of the weights of all packed experts in the model."""
    return sum(m.resident_bytes for m in model.modules() if isinstance(m, PackedExperts))
