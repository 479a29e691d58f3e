"""Compression on another device than the CPU: the same artifact, and clear words when it fails."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from compressor import pipeline
from compressor.errors import ResourceError, UnsupportedError, UsageError
from compressor.modeling.device import choose_device
from compressor.stages import processes
from compressor_kernels import native
from tests.fixtures_pipeline import data, execute, recipe, text_file
from tests.pretend_device import DEVICE, pretended

PACK = {"kind": "pack", "kernels_archs": []}
PRUNE = {"kind": "prune", "sparsity": 0.5}


def _quantize(**changes: Any) -> dict[str, Any]:
    made = {"kind": "quantize", "scheme": "W4A16", "group_size": 32, "engines": ["ours"], **changes}
    return {key: value for key, value in made.items() if value is not None}


def _narrow(**width: float) -> dict[str, Any]:
    return {"kind": "prune", "width": width}


def _scale(method: str, **changes: Any) -> dict[str, Any]:
    return {"kind": "transform", "method": method, **changes}


CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "quantize": ("llama", [_quantize()]),
    "data free": ("llama", [_quantize(effort="fast")]),
    "floats and ranges": ("llama", [_quantize(scheme="NVFP4", group_size=None, kv_cache="fp8")]),
    "learned": ("llama", [_quantize(effort="high", learning={"steps": 2})]),
    "mixture": ("llama", [_quantize(budget={"average_bits": 6.0}, candidates=["W4A16", "W8A16"])]),
    "experts": ("mixtral", [_quantize()]),
    "masks, then width": ("llama", [PRUNE, _narrow(mlp=0.5), _quantize()]),
    "depth, then training": (
        "llama",
        [{"kind": "prune", "depth": 0.5}, {"kind": "distill", "steps": 2, "batch_size": 2}],
    ),
    "scales": ("llama", [_scale("awq", group_size=32), _quantize()]),
    "rotation": ("llama", [_scale("rotate"), _quantize(head="W8A16")]),
}


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Codes to the bit; trained weights as far as gradients summed in another order allow."""
    if first.is_floating_point():
        return torch.allclose(first.float(), second.float(), rtol=1e-3, atol=1e-4)
    return torch.equal(first, second)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.mark.parametrize("case", CASES)
def test_another_device_gives_the_same_artifact(
    case: str, tiny_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, work = CASES[case]
    known = data(text_file(tmp_path / "text.jsonl"), 4)
    work = [{**s, "data": known} if s["kind"] == "distill" else s for s in work]
    judge = {"kind": "evaluate", "data": known}
    stages = [{"kind": "calibrate", "data": known}, *work, PACK, judge]
    monkeypatch.setattr(native, "library", lambda: None)  # C sums in another order
    with sdpa_kernel(SDPBackend.MATH):  # what attention is elsewhere
        there = recipe(tiny_models(model), tmp_path / "cpu", stages=stages)
        want = execute(there, device="cpu")
    monkeypatch.setattr(pipeline, "choose_device", lambda name: DEVICE)
    monkeypatch.setattr(processes, "compute_on", lambda device: None)
    with pretended(monkeypatch):
        here = recipe(tiny_models(model), tmp_path / "there", stages=stages)
        got = execute(here)
    first, second = _tensors(want.output), _tensors(got.output)
    assert first.keys() == second.keys()
    assert [n for n in first if not _same(first[n], second[n])] == []
    assert got.summary["kl_mean"] == pytest.approx(want.summary["kl_mean"], rel=1e-4)


def test_a_tensor_that_was_forgotten_on_the_cpu_is_noticed(monkeypatch: pytest.MonkeyPatch):
    with pretended(monkeypatch) as device:
        x = torch.ones(3, device=device)
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(3)


def test_without_an_accelerator_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert choose_device() == choose_device("cpu") == torch.device("cpu")


def test_with_an_accelerator_auto_is_the_present_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    there = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: there)
    assert choose_device() == choose_device("cuda") == torch.device("cuda:1")
    assert choose_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(UnsupportedError, match=r"cuda:2 is not there.*'cuda:1'"):
        choose_device("cuda:2")


def test_a_device_that_nobody_knows_is_a_usage_error():
    with pytest.raises(UsageError, match="no such device"):
        choose_device("gpu")


def test_a_device_of_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="cuda is not there"):
        choose_device("cuda")


def _failing(monkeypatch: pytest.MonkeyPatch, error: Exception, times: int) -> list[int]:
    """The calibrate stage fails that often; gives the tokens at once of each attempt."""
    apply, seen = pipeline.STAGES["calibrate"], []

    def attempt(config: Any, context: Any) -> Any:
        seen.append(context.tokens_per_batch)
        if len(seen) <= times:
            raise error
        return apply(config, context)

    monkeypatch.setitem(pipeline.STAGES, "calibrate", attempt)
    return seen


def test_short_memory_halves_the_micro_batches(
    tiny_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
):
    seen = _failing(monkeypatch, torch.OutOfMemoryError("no room"), 2)
    with caplog.at_level(logging.WARNING):
        execute(recipe(tiny_models("llama"), tmp_path))
    assert seen == [2048, 1024, 512]
    assert "out of memory on cpu; 512 tokens at once" in caplog.text


@pytest.mark.parametrize(
    ("error", "code", "attempts"),
    [
        (torch.OutOfMemoryError("no room"), "RE07", 4),
        (torch.AcceleratorError("launch failed"), "RE08", 1),
    ],
)
def test_a_device_that_gives_up_ends_the_run_with_one_clear_error(
    error: Exception, code: str, attempts: int, tiny_models: Any, tmp_path: Path, monkeypatch: Any
):
    seen = _failing(monkeypatch, error, 99)
    with pytest.raises(ResourceError) as caught:
        execute(recipe(tiny_models("llama"), tmp_path))
    assert caught.value.code == code
    assert len(seen) == attempts
    assert "--device cpu" in caught.value.fix


def test_a_run_does_not_go_on_with_another_device(tiny_models: Any, tmp_path: Path, monkeypatch):
    made = recipe(tiny_models("llama"), tmp_path)
    _failing(monkeypatch, torch.AcceleratorError("gone"), 1)
    with pytest.raises(ResourceError):
        execute(made)
    monkeypatch.setattr(pipeline, "choose_device", lambda name: DEVICE)
    monkeypatch.setattr(processes, "compute_on", lambda device: None)
    with pytest.raises(Exception, match="device"):
        execute(made)
