"""Sparse targets and the teacher's cache: as good as online, exactly keyed, never half read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.errors import Interrupted, RecipeError
from compressor.modeling.checkpoint import open_checkpoint
from compressor.modeling.state import ModelState
from compressor.modeling.whole import WholeModel
from compressor.recipe import parse_recipe
from compressor.stages import teacher_cache
from compressor.stages.distill_costs import teacher_cache_bytes
from compressor.stages.teacher_cache import CacheKey, TeacherCache
from tests.fixtures_stages import Bench, short_distillation, units

Models = Callable[[str], Path]


@pytest.fixture
def short(tmp_path: Path) -> dict[str, Any]:
    return short_distillation(tmp_path) | {"student": {"num_hidden_layers": 1}}


def distilled(model: Path, folder: Path, keys: dict[str, Any], **more: Any) -> dict[str, Any]:
    bench = Bench(model, folder)
    facts: dict[str, Any] = bench.apply(bench.original, "distill", **keys, **more).facts
    return facts


def test_training_from_the_cache_is_training_online(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any]
) -> None:
    model, teacher = tiny_models("llama"), {"targets": "top_k", "count": 16}
    online = distilled(model, tmp_path / "a", short, teacher=teacher)
    kept = {**teacher, "cache": str(tmp_path / "cache")}
    cached = distilled(model, tmp_path / "b", short, teacher=kept)
    assert cached["losses"] == pytest.approx(online["losses"], rel=2e-3)
    assert cached["kl_before"] == pytest.approx(online["kl_before"], rel=1e-5)
    assert cached["kl_after"] == pytest.approx(online["kl_after"], rel=1e-3)


def test_few_samples_of_the_teacher_teach(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any]
) -> None:
    teacher = {"targets": "sampled", "count": 32, "cache": str(tmp_path / "cache")}
    facts = distilled(tiny_models("llama"), tmp_path / "run", short, teacher=teacher)
    assert facts["kl_after"] < facts["kl_before"]


def test_codes_learn_from_a_cache_too(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any]
) -> None:
    bench = Bench(tiny_models("llama"), tmp_path / "run")
    state = bench.apply(bench.original, "quantize", scheme="W2A16", group_size=32).state
    teacher = {"targets": "top_k", "count": 16, "cache": str(tmp_path / "cache")}
    keys = short | {"student": None, "train": "codes", "learning_rate": 1e-3}
    facts = bench.apply(state, "distill", **keys, teacher=teacher).facts
    assert facts["kl_after"] < facts["kl_before"]


def test_a_second_run_does_not_ask_the_teacher_again(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = {"targets": "top_k", "count": 8, "cache": str(tmp_path / "cache")}
    first = distilled(tiny_models("llama"), tmp_path / "a", short, teacher=teacher)
    monkeypatch.setattr(TeacherCache, "fill", None)
    second = distilled(tiny_models("llama"), tmp_path / "b", short, teacher=teacher)
    assert first == second


@pytest.mark.parametrize("change", ["temperature", "count", "seq_len", "targets"])
def test_another_key_is_another_cache(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any], change: str
) -> None:
    teacher = {"targets": "top_k", "count": 8, "cache": str(tmp_path / "cache")}
    distilled(tiny_models("llama"), tmp_path / "a", short, teacher=teacher)
    changes = {"temperature": 2.0, "data": short["data"].model_copy(update={"seq_len": 20})}
    known = {"count": 9, "targets": "sampled"}
    teacher |= {k: v for k, v in known.items() if k == change}
    keys = short | {
        k: v for k, v in changes.items() if change in (k, "seq_len" if k == "data" else k)
    }
    distilled(tiny_models("llama"), tmp_path / "b", keys, teacher=teacher)
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("damage", ["flip", "missing", "done"])
def test_a_damaged_cache_is_filled_again(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any], damage: str
) -> None:
    teacher = {"targets": "top_k", "count": 8, "cache": str(tmp_path / "cache")}
    first = distilled(tiny_models("llama"), tmp_path / "a", short, teacher=teacher)
    rows = next((tmp_path / "cache").rglob("rows-*.safetensors"))
    wanted = rows.read_bytes()
    if damage == "flip":
        rows.write_bytes(wanted[:-1] + bytes([wanted[-1] ^ 1]))
    elif damage == "missing":
        rows.unlink()
    else:
        (rows.parent / "done.json").write_text("[")
    second = distilled(tiny_models("llama"), tmp_path / "b", short, teacher=teacher)
    assert first == second
    assert rows.read_bytes() == wanted


def test_a_run_stopped_while_the_teacher_is_asked_goes_on(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_cache, "ROWS_PER_FILE", 5)
    teacher = {"targets": "top_k", "count": 8, "cache": str(tmp_path / "cache")}
    keys = short | {"teacher": teacher}
    bench = Bench(tiny_models("llama"), tmp_path / "a")
    with pytest.raises(Interrupted):
        bench.apply(bench.original, "distill", stop_after=2, index=1, **keys)
    files = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("rows-*")}
    assert len(files) == 2
    bench.apply(bench.original, "distill", index=1, **keys)
    later = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("rows-*")}
    assert files.items() <= later.items()
    distilled(tiny_models("llama"), tmp_path / "b", keys | {"teacher": teacher})
    assert units(tmp_path / "a") == units(tmp_path / "b")


@pytest.mark.parametrize("targets", ["top_k", "sampled"])
def test_the_plan_foretells_the_bytes_of_the_cache(
    tiny_models: Models, tmp_path: Path, targets: str
) -> None:
    teacher = {"targets": targets, "count": 8, "cache": str(tmp_path / "cache")}
    data = {"num_samples": 9, "seq_len": 24}
    stages = [{"kind": "distill", "data": data, "teacher": teacher}, {"kind": "pack"}]
    model = tiny_models("llama")
    body = {"name": "x", "model": {"path": str(model)}, "output": "out", "stages": stages}
    state = ModelState.of_checkpoint(open_checkpoint(model))
    foretold = teacher_cache_bytes(parse_recipe(json.dumps(body)), state)
    key = CacheKey("t", "r", (9, 24), 1, targets, 8, 1.0, 0)
    cache = TeacherCache(str(tmp_path / "cache"), key)
    tokens = torch.randint(3, 320, (9, 24), generator=torch.Generator().manual_seed(0))
    cache.fill(WholeModel(state), tokens, lambda index, total: None)
    files = list(cache.folder.glob("*.safetensors"))
    assert foretold < sum(f.stat().st_size for f in files) <= foretold + 250 * len(files)


def test_targets_and_hidden_states_are_those_of_their_row(
    tiny_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_cache, "ROWS_PER_FILE", 3)
    teacher = WholeModel(ModelState.of_checkpoint(open_checkpoint(tiny_models("llama"))))
    tokens = torch.randint(3, 320, (11, 8), generator=torch.Generator().manual_seed(0))
    cache = TeacherCache(str(tmp_path), CacheKey("t", "r", (11, 8), 4, "top_k", 5, 1.0, 0))
    cache.fill(teacher, tokens, lambda index, total: None)
    numbers = torch.tensor([6, 0, 3])
    with torch.no_grad():
        wanted = teacher.head(teacher.hidden_states(tokens[numbers])[0].flatten(0, 1))
    found = cache.read(numbers, torch.device("cpu"))
    assert torch.equal(found.ids, wanted.topk(5, dim=-1).indices)
    held_out = cache.held_out(torch.tensor([7, 8, 10]), torch.device("cpu"))
    assert torch.allclose(held_out, teacher.hidden_states(tokens[[7, 8, 10]])[0], atol=1e-5)


@pytest.mark.parametrize("cache", ["none", "somewhere"])
def test_a_count_that_leaves_no_rest_is_refused(
    tiny_models: Models, tmp_path: Path, short: dict[str, Any], cache: str
) -> None:
    cache = cache if cache == "none" else str(tmp_path / cache)
    teacher = {"targets": "top_k", "count": 320, "cache": cache}
    with pytest.raises(RecipeError, match="leaves nothing"):
        distilled(tiny_models("llama"), tmp_path / "run", short, teacher=teacher)
