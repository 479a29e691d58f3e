"""Mixture-of-experts layers with one linear for each expert matrix.

transformers keeps the experts of a layer in two fused 3-D parameters; checkpoints and inference
engines name every expert's matrices. `split_experts` swaps a fused module for one with the names
that are on disk, so that each expert is calibrated, quantized and stored like any other linear.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """One gated MLP: down(act(gate x) * up x)."""

    def __init__(self, hidden: int, intermediate: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class SplitExperts(nn.ModuleList):
    """The experts of one layer; the same call as transformers' fused module."""

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], chosen experts [T, k] and their weights [T, k] -> [T, H]."""
        out = torch.zeros_like(hidden)
        for index, expert in enumerate(self):
            token, slot = torch.where(top_k_index == index)
            if token.numel():
                weighted = expert(hidden[token]) * top_k_weights[token, slot, None]
                out.index_add_(0, token, weighted.to(out.dtype))
        return out


def is_fused_experts(module: nn.Module) -> bool:
    """Whether this is transformers' fused form: gate_up_proj [E, 2I, H] and down_proj [E, H, I]."""
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    fused = isinstance(gate_up, nn.Parameter) and isinstance(down, nn.Parameter)
    return fused and gate_up.ndim == 3 and gate_up.shape[0] == down.shape[0]  # type: ignore[union-attr]


def split_experts(model: nn.Module) -> None:
    """Replace every fused experts module in `model` (on the meta device: no data is moved)."""
    for name, module in list(model.named_modules()):
        if not is_fused_experts(module):
            continue
        count, double, hidden = module.gate_up_proj.shape
        with torch.device(module.gate_up_proj.device):
            experts = [Expert(hidden, double // 2, module.act_fn) for _ in range(count)]
        model.set_submodule(name, SplitExperts(experts))
