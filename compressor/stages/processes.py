"""Distillation in several processes: the first one runs the recipe, the others help in training.

    accelerate launch --multi_gpu --num_processes 2 -m compressor run recipe.yaml
    torchrun --standalone --nproc_per_node 2 -m compressor run recipe.yaml

(NCCL with GPUs, gloo without; `accelerate launch --cpu` would start one process only.)

Process 0 is the run: it reads, writes, journals and does every other stage. The others wait; for
each distill stage they are sent what to train, build the same models from the same files and take
part in every step, and when the run ends they are dismissed. If process 0 fails or is stopped, the
launcher ends them; what training had committed by then is on disk as always.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.distributed import DistError

from compressor.errors import CompressError, ResourceError
from compressor.modeling.state import ModelState

WAIT = timedelta(days=30)  # a run may calibrate for long before it trains
_kind = {"cpu": False}  # whether this process was told to leave accelerators alone


def compute_on(device: torch.device) -> None:
    """Train on this device; of several processes each has the accelerator of its number."""
    _kind["cpu"] = device.type == "cpu"
    if device.type != "cpu" and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        torch.accelerator.set_device_index(device)


def join() -> Accelerator:
    """Meet the other processes (if any); call this early in each of them."""
    return Accelerator(
        cpu=not torch.accelerator.is_available() or _kind["cpu"],
        kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
    )


def count() -> int:
    """How many processes train together."""
    return int(join().num_processes)


def is_follower() -> bool:
    """Whether this process was launched to help another one."""
    return int(os.environ.get("RANK", "0")) > 0


def send(task: Any) -> None:
    """Process 0: hand a task to the others; nothing happens if there are none."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        join()
        broadcast_object_list([task], from_process=0)


def dismiss() -> None:
    """Process 0, at the end of the run: let the others go."""
    send(None)


def follow(work: Callable[[Any], None]) -> None:
    """Every other process: do what process 0 sends until it dismisses us."""
    join()
    while True:
        received: list[Any] = [None]
        broadcast_object_list(received, from_process=0)
        if received[0] is None:
            return
        try:
            work(received[0])
        except CompressError:  # the same numbers fail in process 0, which tells and ends the run
            return


def add(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, the same in each of them."""
    total: Tensor = accelerator.reduce(tensor, "sum")
    return total


@contextmanager
def together() -> Iterator[None]:
    """Work that all processes do at the same time.

    Raises:
        ResourceError: another process is gone (KI17).
    """
    try:
        yield
    except RuntimeError as error:
        if count() == 1 or not (isinstance(error, DistError) or "gloo" in str(error)):
            raise
        raise ResourceError(
            "a process that helped in training is gone",
            code="KI17",
            why=f"{str(error).rpartition('] ')[2].partition('. ')[0]}. What was committed before "
            "is on disk.",
            fix="look at what ended it (memory?) and run the same command again: it goes on",
        ) from error


def portable(state: ModelState) -> ModelState:
    """The same state in a form that can be sent (its read-only views become plain dicts)."""
    known = state.checkpoint
    plain = replace(known, tensors=dict(known.tensors), sizes=dict(known.sizes))
    return replace(state, checkpoint=plain)
