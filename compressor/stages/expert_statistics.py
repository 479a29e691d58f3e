"""What is known about experts that few calibration tokens were sent to.

A router sends each token to a few experts, so some see little of the text. With n tokens, I inputs:

    n >= 4 I        H of its own tokens
    n >= I / 4      the same, pulled towards its diagonal: (1 - a) H + a diag(H), a = I / (I + n)
    n >= 1          H of all tokens that reached the layer, sent through this expert
    n = 0           nothing: rounded to the nearest point of a grid searched without data

The asymmetric target stays off for experts: it subtracts what the same token gave in the original
model, and after compression the router may send other tokens, so the two sides do not pair up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressor.algorithms.hessian import HessianAccumulator
from compressor.modeling.block import Block
from compressor.modeling.families import EXPERT

OWN, SHRUNK, LAYER, NONE = "own tokens", "shrunk", "all tokens of the layer", "no tokens"
SHRINK_BELOW = 4  # tokens for each input
LAYER_BELOW = 1 / 4


def kind_of(num_tokens: int, columns: int) -> str:
    """Which of the four cases an expert with so many tokens and inputs is."""
    if num_tokens == 0:
        return NONE
    if num_tokens < LAYER_BELOW * columns:
        return LAYER
    return SHRUNK if num_tokens < SHRINK_BELOW * columns else OWN


class _Enough(Exception):
    """Raised inside a forward pass when the input of the experts has been seen."""


@torch.no_grad()
def layer_input(block: Block, experts: str, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """All tokens [t, I] that the block gives to its experts module."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Enough

    handle = block.module.get_submodule(experts).register_forward_pre_hook(note)
    try:
        block.run(hidden, kwargs)
    except _Enough:
        pass
    finally:
        handle.remove()
    return seen[0]


class LayerHessians:
    """H of every linear in `heads` over all tokens of its layer, sent through its expert."""

    def __init__(self, block: Block, heads: Iterable[str]) -> None:
        self.block = block
        self._sums: dict[str, HessianAccumulator] = {}
        for head in heads:
            linear = block.linears[head]
            self._sums[head] = HessianAccumulator(
                linear.shape[1], with_cross=False, device=linear.stored.device
            )

    def add(self, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Count one micro-batch: the block's input [B, T, D] and keyword arguments."""
        inputs: dict[str, Tensor] = {}
        for head, total in self._sums.items():
            match = EXPERT.match(head)
            assert match is not None, "only linears of experts have a layer"
            experts = match["experts"]
            if experts not in inputs:
                inputs[experts] = layer_input(self.block, experts, hidden, kwargs).float()
            total.add(self._input(f"{experts}.{match['index']}", head, inputs[experts]))

    def get(self, head: str) -> Tensor | None:
        """H [I, I] of a linear, if it was asked for."""
        return self._sums[head].hessian() if head in self._sums else None

    @torch.no_grad()
    def _input(self, expert: str, head: str, x: Tensor) -> Tensor:
        """What reaches a linear when its expert gets all tokens [t, I]."""
        seen: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            raise _Enough

        handle = self.block.linears[head].register_forward_pre_hook(note)
        try:
            self.block.module.get_submodule(expert)(x)
        except _Enough:
            pass
        finally:
            handle.remove()
        return seen[0]


def expert_notes(linears: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each layer and case: its experts with few tokens, named with their counts.

    Args:
        linears: facts by full name, with `num_tokens` and `statistics`.
    """
    found: dict[tuple[str, str], dict[int, int]] = {}
    for name, facts in linears.items():
        match, kind = EXPERT.match(name), facts.get("statistics", OWN)
        if match is None or kind == OWN:
            continue
        counts = found.setdefault((match["experts"], kind), {})
        counts[int(match["index"])] = int(facts["num_tokens"])
    return [
        f"{experts}: {_DONE[kind]}: "
        + ", ".join(f"{index} ({count} tokens)" for index, count in sorted(counts.items()))
        for (experts, kind), counts in found.items()
    ]


_DONE = {
    SHRUNK: "Hessians of few tokens pulled towards their diagonals",
    LAYER: "too few tokens, all tokens of the layer used instead",
    NONE: "no calibration token came, rounded to nearest without data",
}
