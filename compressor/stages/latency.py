"""How long a token takes to decode, predicted from bandwidth: for budgets, not for data sheets.

    t = sum over linears [ active * bytes / (bandwidth * efficiency(format)) + launch ]
        + bytes of head and norms / (bandwidth * efficiency(BF16))

Batch 1, empty context: every weight is read once, attention over the KV cache is not counted.
`active` is the fraction of experts a token goes through, 1 for everything else. The shipped table
holds data-sheet bandwidths and *assumed* efficiencies; a JSON file with measured ones replaces it:

    {"bandwidth_gb_s": 3350, "launch_us": 3, "efficiency": {"BF16": 0.85, "W4A16": 0.7},
     "default_efficiency": 0.5}

Keys of `efficiency` are scheme labels without the group size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compressor.errors import RecipeError, Where
from compressor.recipe import KEEP

# Fractions of the bandwidth that decoding kernels reach: assumed, not measured.
ASSUMED: dict[str, float] = {
    KEEP: 0.85, "W8A16": 0.75, "W4A16": 0.7, "W8A8": 0.8, "FP8_DYNAMIC": 0.8, "FP8A16": 0.75,
    "FP8_BLOCK": 0.75, "NVFP4": 0.7, "NVFP4A16": 0.65, "MXFP4": 0.7, "MXFP4A16": 0.65,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Device:
    """GB/s of the memory, microseconds a kernel launch takes, efficiency by scheme label."""

    bandwidth_gb_s: float
    launch_us: float = 3.0
    efficiency: Mapping[str, float] = field(default_factory=lambda: ASSUMED)
    default_efficiency: float = 0.5

    def milliseconds(self, label: str, num_bytes: float) -> float:
        """Time to read the weights of one linear stored as `label`."""
        rate = self.bandwidth_gb_s * self.efficiency.get(label, self.default_efficiency)
        return num_bytes / (rate * 1e6) + self.launch_us / 1e3


# Memory bandwidths of the makers' data sheets.
DEVICES: dict[str, Device] = {
    "h200": Device(4800), "h100": Device(3350), "a100-80gb": Device(2039), "b200": Device(8000),
    "l40s": Device(864), "l4": Device(300), "rtx4090": Device(1008), "rtx3090": Device(936),
    "mi300x": Device(5300), "cpu-ddr5": Device(80, launch_us=1.0), "cpu-ddr4": Device(40, 1.0),
}  # fmt: skip


def find_device(name: str, where: Where) -> Device:
    """A shipped device, or one described by a JSON file.

    Raises:
        RecipeError: no such device, or the file is not such a description.
    """
    if name.lower() in DEVICES:
        return DEVICES[name.lower()]
    if not name.endswith(".json"):
        raise RecipeError(
            f"no device is called {name}",
            code="RC17",
            where=where,
            fix=f"one of {', '.join(DEVICES)}, or a JSON file with measured rates",
        )
    try:
        return _device(json.loads(Path(name).read_bytes()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"{name} describes no device: {error}",
            code="RC17",
            where=where,
            fix='write {"bandwidth_gb_s": 3350, "launch_us": 3, "efficiency": {"W4A16": 0.7}}',
        ) from error


def _device(data: dict[str, Any]) -> Device:
    """A device from parsed JSON; raises TypeError or ValueError for anything unexpected."""
    table = {str(k): float(v) for k, v in data.pop("efficiency", ASSUMED).items()}
    device = Device(**{key: float(value) for key, value in data.items()}, efficiency=table)
    rates = [device.bandwidth_gb_s, device.default_efficiency, *table.values()]
    if min(rates) <= 0 or device.launch_us < 0:
        raise ValueError("rates must be positive")
    return device
