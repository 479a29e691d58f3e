"""What is compared: every tool at every width, group size and symmetry, and our budgets.

A case is one compressed checkpoint. `bits` None = our allocation decides within `budget`: average
bits for each weight of the quantized linears, scales counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

BITS = (4, 3, 2, 8)
BUDGETS = (2.5, 3.0, 3.5, 4.25)

# Settings of our quantize stage. `default` is what a recipe without any setting gets.
OURS: dict[str, dict[str, Any]] = {
    "ours-fast": {"effort": "fast"},
    "ours-gptq": {"asymmetric_target": False},
    "ours-default": {},
    "ours-high": {"effort": "high"},
    "ours-max": {"effort": "max"},
}
OURS_WITH_BUDGET = ("ours-default", "ours-high")

# Which environment of benchmarks/peers/ holds the tool.
PEERS: dict[str, str] = {
    "llmc-rtn": "a",
    "llmc-gptq": "a",
    "llmc-gptq-mse": "a",
    "hqq": "b",
    "torchao-rtn": "b",
    "torchao-hqq": "b",
    "gptqmodel": "b",
    "autoround": "a",
}
DATA_FREE = ("ours-fast", "llmc-rtn", "hqq", "torchao-rtn", "torchao-hqq")
ASYMMETRIC_ONLY = ("hqq",)
SYMMETRIC_ONLY = ("torchao-hqq",)
NEEDS_ACCELERATOR = {"torchao-int4": "Int4WeightOnlyConfig packs with CUDA or XPU libraries only"}


@dataclass(frozen=True, slots=True)
class Case:
    """One tool in one setting, calibrated with the rows of one seed."""

    tool: str
    bits: int | None
    group: int
    symmetric: bool
    seed: int = 0
    budget: float | None = None

    @property
    def label(self) -> str:
        """Name of its folder, for example `llmc-gptq-w4-g32-sym-seed0`."""
        width = f"w{self.bits}" if self.budget is None else f"avg{self.budget:g}"
        group = "channel" if self.group == -1 else f"g{self.group}"
        kind = "sym" if self.symmetric else "asym"
        return f"{self.tool}-{width}-{group}-{kind}-seed{self.seed}"


def uniform_cases(
    tools: list[str], *, groups: tuple[int, ...], bits: list[int], seeds: int
) -> list[Case]:
    """Every tool at one width for all linears, in the order of running: the slow one last."""
    order = [*OURS, *PEERS]
    found = [c for tool in tools for c in _of_tool(tool, groups, bits, seeds)]
    return sorted(found, key=lambda c: (c.tool == "autoround", c.seed, order.index(c.tool)))


def budget_cases(tools: list[str], *, groups: tuple[int, ...], seeds: int) -> list[Case]:
    """Our mixtures within each budget."""
    chosen = [tool for tool in tools if tool in OURS_WITH_BUDGET]
    return [
        Case(tool, None, group, True, seed, budget)
        for seed in range(seeds)
        for tool in chosen
        for group in groups
        for budget in BUDGETS
    ]


def _of_tool(tool: str, groups: tuple[int, ...], bits: list[int], seeds: int) -> Iterator[Case]:
    for seed in range(seeds if _has_seeds(tool) else 1):
        for group in groups:
            for symmetric in (True, False):
                if tool not in (ASYMMETRIC_ONLY if symmetric else SYMMETRIC_ONLY):
                    yield from (Case(tool, b, group, symmetric, seed) for b in bits)


def _has_seeds(tool: str) -> bool:
    """Whether the calibration rows change the result."""
    return tool not in DATA_FREE
