"""One decoder block in memory: transformers' own module over stored linears.

`load_block` fills a fresh meta block. `inputs_of` runs it and hands out what reaches chosen
linears; which linears share an input is observed, not listed.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compressor.modeling.families import EXPERT
from compressor.modeling.linears import StoredLinear, find_linears, packed_from_tensors
from compressor.modeling.skeleton import Skeleton
from compressor.modeling.state import BlockTensors

HELD_BYTES = 1 << 28  # of dense weights


class _Enough(Exception):
    """Raised inside a forward pass when everything wanted has been seen."""


@dataclass(slots=True)
class Block:
    """A block that runs, and its linears by block-relative name (in order of definition)."""

    module: nn.Module
    linears: dict[str, StoredLinear]
    masked: frozenset[str]

    def run(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.module(hidden, **kwargs)  # type: ignore[no-any-return]

    @contextmanager
    def holding(self, names: Collection[str] | None = None) -> Iterator[None]:
        """Passes meanwhile share the dense weights of these linears (all), if they are small.

        None of them may be changed before the end.
        """
        chosen = [self.linears[n] for n in (self.linears if names is None else names)]
        if not held_bytes(sum(math.prod(linear.shape) for linear in chosen)):
            chosen = []
        for linear in chosen:
            linear.held = linear.dense()
        try:
            yield
        finally:
            for linear in chosen:
                linear.held = None


def held_bytes(weights: int) -> int:
    """Bytes of so many dense weights that passes share; 0 if they are too many to be held."""
    return 4 * weights if 4 * weights <= HELD_BYTES else 0


def load_block(
    skeleton: Skeleton, position: int, source: BlockTensors, *, dtype: torch.dtype = torch.float32
) -> Block:
    """Build block `position` on the skeleton's device.

    Linears keep their stored dtype, the rest is cast to `dtype`.
    """
    module, device = skeleton.new_block(position), skeleton.device
    linears: dict[str, StoredLinear] = {}
    for name, meta in find_linears(module).items():
        transposed = isinstance(meta, Conv1D)
        linears[name] = _stored_linear(name, source, transposed=transposed, device=device)
        module.set_submodule(name, linears[name])
    rest = {n: source.tensors[n].to(dtype) for n in module.state_dict()}
    module.load_state_dict(rest, assign=True)
    module.requires_grad_(False).to(device)
    return Block(module, linears, source.masked)


def _stored_linear(
    name: str, source: BlockTensors, *, transposed: bool, device: torch.device
) -> StoredLinear:
    bias = source.tensors.get(f"{name}.bias")
    bias = None if bias is None else bias.to(device)
    fmt = source.formats.get(name)
    if fmt is None:
        weight = source.tensors[f"{name}.weight"].to(device)
        return StoredLinear(weight, bias, transposed=transposed)
    linear = StoredLinear(torch.empty(0, device=device), bias)
    linear.set_packed(packed_from_tensors(source.tensors, name, fmt))
    return linear


def block_tensors(block: Block, source: BlockTensors) -> BlockTensors:
    """What is to be stored for a block whose linears were changed; the rest as it was read."""
    tensors: dict[str, Tensor] = {}
    formats = {}
    for name, linear in block.linears.items():
        if linear.packed is not None:
            parts = linear.packed.tensors.items()
            tensors.update({f"{name}.{suffix}": t for suffix, t in parts})
            formats[name] = linear.packed.format
        else:
            tensors[f"{name}.weight"] = linear.stored.cpu()
    weights = {f"{n}.weight" for n in block.linears}
    stored = tuple(f"{n}.weight_" for n in block.linears)
    rest = {
        n: t for n, t in source.tensors.items() if n not in weights and not n.startswith(stored)
    }
    return BlockTensors({**rest, **tensors}, formats, block.masked)


def input_phases(block: Block, hidden: Tensor, kwargs: dict[str, Any]) -> list[list[list[str]]]:
    """Observe which linears share an input, and in which order inputs are reached.

    Returns phases in order; a phase is a list of groups that can be calibrated in one pass; a group
    is a list of linears with the very same input. Experts of one layer form two phases (gate and
    up, then down). Linears that were not reached (experts without tokens) are grouped by name.
    """
    order: dict[tuple[int, int], list[str]] = {}
    alive: list[Tensor] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            alive.append(args[0])
            order.setdefault((args[0].data_ptr(), args[0].numel()), []).append(name)

        return hook

    handles = [m.register_forward_pre_hook(note(n)) for n, m in block.linears.items()]
    try:
        with torch.no_grad():
            block.run(hidden, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    groups = list(order.values())
    seen = {name for group in groups for name in group}
    groups += _unreached([n for n in block.linears if n not in seen])
    return _phases(groups)


def _unreached(names: list[str]) -> list[list[str]]:
    by_expert: dict[tuple[str, bool], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        by_expert.setdefault((parent, "down" in leaf), []).append(name)
    return list(by_expert.values())


def _phases(groups: list[list[str]]) -> list[list[list[str]]]:
    phases: list[list[list[str]]] = []
    experts: dict[tuple[str, bool], list[list[str]]] = {}
    for group in groups:
        match = EXPERT.match(group[0])
        if match is None:
            phases.append([group])
            continue
        key = (match["experts"], "down" in match["leaf"])
        if key not in experts:
            experts[key] = []
            phases.append(experts[key])
        experts[key].append(group)
    return phases


@torch.no_grad()
def inputs_of(
    block: Block, names: list[str], hidden: Tensor, kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """Run the block until every linear in `names` has been called; their inputs [..., I]."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]
            if len(seen) == len(names):
                raise _Enough

        return hook

    handles = [block.linears[n].register_forward_pre_hook(note(n)) for n in names]
    try:
        block.run(hidden, kwargs)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


class Observed:
    """A block whose linears hand out inputs or outputs; passes may run side by side."""

    def __init__(self, block: Block, names: Sequence[str], outputs: Sequence[str] = ()) -> None:
        """Watch the inputs of `names` and the outputs, less the bias, of `outputs`."""
        self._block, self._here = block, threading.local()
        linears = block.linears
        self._handles = [linears[n].register_forward_pre_hook(self._note(n)) for n in names]
        self._handles += [
            linears[n].register_forward_hook(self._note_output(n, linears[n].bias)) for n in outputs
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def run(self, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the block to its end: output [B, T, D], and what was watched, by name."""
        seen: dict[str, Tensor] = {}
        self._here.seen = seen
        return self._block.run(hidden, kwargs), seen

    def _note(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: self._here.seen.update({name: args[0]})

    def _note_output(
        self, name: str, bias: Tensor | None
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            # whatever follows may work in the output's own memory: keep another
            self._here.seen[name] = out.clone() if bias is None else out - bias

        return hook


def run_observed(
    block: Block, names: Sequence[str], hidden: Tensor, kwargs: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the block to its end once: output [B, T, D], and the inputs [..., I] of `names`."""
    with Observed(block, names) as observed:
        return observed.run(hidden, kwargs)


__all__ = [
    "Block",
    "Observed",
    "block_tensors",
    "input_phases",
    "inputs_of",
    "load_block",
    "run_observed",
]
