"""An accelerator without hardware: its tensors are CPU tensors in a wrapper that says otherwise.

Computing is the CPU's, so results can be compared bit by bit. What a real device refuses is
refused: two devices in one operation (but for numbers of no dimension), and NumPy. The device is
torch's "lazy", which nothing else uses here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("lazy", 0)
CROSSING = ("copy", "_to_", "index.Tensor", "index_put", "lift")  # may see both sides


class There(Tensor):
    """A tensor on the pretended device; `data_` is where its numbers are."""

    data_: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: Tensor) -> There:
        made: There = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            data.size(),
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            layout=data.layout,
            device=DEVICE,
        )
        made.data_ = data
        return made

    def data_ptr(self) -> int:
        """Where the numbers are: the wrapper has no memory."""
        return self.data_.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Sees tensors that are made on the device from nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU; its tensors are on the device if its arguments are."""
    seen = _Seen()
    bare = tuple(seen.bare(x) for x in args)
    named = {key: seen.bare(x) for key, x in kwargs.items()}
    if seen.there and (seen.here or not isinstance(args[0], There)):
        _check(str(func), args, seen.here)
    out = func(*bare, **named)
    lands = bool(seen.there) if seen.lands is None else seen.lands
    known = {id(x.data_): x for x in seen.there}  # an operation in place gives its argument back

    def wrap(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(wrap, value))
        if id(value) in known or not isinstance(value, Tensor):
            return known.get(id(value), value)
        return There(value)

    return wrap(out) if lands else out


def _check(name: str, args: Any, here: list[Tensor]) -> None:
    if here and not any(word in name for word in CROSSING):
        raise RuntimeError(f"{name}: tensors on two devices: {[t.shape for t in here]}")
    if "index" in name and not isinstance(args[0], There):
        raise RuntimeError(f"{name}: a CPU tensor with indices on the device")


class _Seen:
    """What the arguments of an operation were, and the same ones for the CPU."""

    def __init__(self) -> None:
        self.there: list[There] = []
        self.here: list[Tensor] = []
        self.lands: bool | None = None  # where results go, if an argument says so

    def bare(self, value: Any) -> Any:
        if isinstance(value, There):
            self.there.append(value)
            return value.data_
        if isinstance(value, Tensor):
            if value.ndim:
                self.here.append(value)
            return value
        if isinstance(value, list | tuple):
            return [self.bare(x) for x in value]
        if isinstance(value, torch.device):
            self.lands = value.type == DEVICE.type
            return torch.device("cpu") if self.lands else value
        return value


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device is there, in this thread and in those that it starts."""
    run, generator, tensor = threading.Thread.run, torch.Generator, torch.tensor

    def tensor_there(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        made = tensor(*args, **kwargs)
        return made if device is None else made.to(device)

    def run_there(self: threading.Thread) -> None:
        with _Factories():
            run(self)

    monkeypatch.setattr(threading.Thread, "run", run_there)
    monkeypatch.setattr(torch, "tensor", tensor_there)
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # wrappers count their versions
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator("cpu"))
    with _Factories():
        yield DEVICE
