"""Which device computes: the accelerator of this machine, or the CPU."""

from __future__ import annotations

import torch

from compressor.errors import UnsupportedError, UsageError

AUTO = "auto"
CPU = torch.device("cpu")


def choose_device(name: str = AUTO) -> torch.device:
    """The device of that name; "auto" is the accelerator that is there, else the CPU.

    Args:
        name: "auto", or a device as torch writes it: "cpu", "cuda", "cuda:1", "xpu".

    Raises:
        UsageError: torch knows no such device.
        UnsupportedError: this machine, or this build of torch, does not have it.
    """
    there = torch.accelerator.is_available()
    found = torch.accelerator.current_accelerator() if there else None
    if name == AUTO:
        return CPU if found is None else _numbered(found)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"--device {name}: no such device", fix="use auto, cpu, cuda or cuda:N"
        ) from error
    if device.type == "cpu":
        return CPU
    count = torch.accelerator.device_count() if found is not None else 0
    if found is None or found.type != device.type or (device.index or 0) >= count:
        names = [] if found is None else [f"{found.type}:{i}" for i in range(count)]
        raise UnsupportedError(
            f"--device {name} is not there; torch {torch.__version__} sees {['cpu', *names]}",
            code="KI20",
            fix="name one of these, or install the build of torch for this machine",
        )
    return _numbered(device)


def _numbered(device: torch.device) -> torch.device:
    """The device with its number, so that two of them compare equal."""
    if device.index is not None:
        return device
    return torch.device(device.type, torch.accelerator.current_device_index())
