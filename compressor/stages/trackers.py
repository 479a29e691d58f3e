"""Curves of a training in TensorBoard, trackio or W&B, through accelerate's trackers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from compressor.errors import UnsupportedError
from compressor.recipe import DistillConfig

PROJECT = "compressor"
Track = Callable[[dict[str, float], int], None]


@contextmanager
def tracking(config: DistillConfig, folder: Path) -> Iterator[Track]:
    """A function that takes numbers and the step they belong to; files go below the folder.

    Raises:
        UnsupportedError: the package of a tracker is not installed (CK26).
    """
    known = [str(name) for name in get_available_trackers()]
    for name in config.trackers:
        if name not in known:
            raise UnsupportedError(
                f"{name} is not installed",
                code="CK26",
                where=config.where("trackers"),
                fix=f"pip install {name}, or remove it from trackers",
            )
    if not config.trackers:
        yield lambda facts, step: None
        return
    accelerator = Accelerator(log_with=list(config.trackers), project_dir=folder)
    settings = {k: v for k, v in config.model_dump().items() if isinstance(v, int | float | str)}
    accelerator.init_trackers(PROJECT, config=settings)
    try:
        yield lambda facts, step: accelerator.log(facts, step=step)
    finally:
        for tracker in accelerator.trackers:  # not end_training: it ends the process group too
            tracker.finish()
