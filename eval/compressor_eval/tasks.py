"""Accuracy per item through lm-eval for two models, and the paired tests between them.

Tasks are names of lm-eval's own, names of files in the tasks folder, or `mc:FILE.jsonl` for
multiple-choice items of one's own. Letters: n items, b = items only the original gets right,
c = items only the compressed model gets right; flips = (b + c) / n show change that accuracies,
which only see c - b, hide (Dutta et al. 2024, arXiv 2407.09141).
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

import compressor
from compressor.errors import DataError, UnsupportedError, UsageError, Where
from compressor.resources import resource_dir
from compressor_eval import statistics
from compressor_eval.statistics import Interval

_METRICS = ("acc", "exact_match", "acc_norm")  # the first a task has counts as being right
_OWN_PREFIX = "mc:"


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One model on one task; correct[i] belongs to item doc_ids[i]."""

    name: str
    metric: str
    doc_ids: list[int]
    correct: list[bool]
    metrics: dict[str, float]  # every aggregate lm-eval reports

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct) if self.correct else math.nan


TaskResults = dict[str, TaskResult]


@dataclass(frozen=True, slots=True)
class TaskComparison:
    """Two models on the same items."""

    num_items: int
    base_accuracy: float
    accuracy: float
    delta: float  # accuracy - base_accuracy
    delta_ci: Interval
    lost: int  # b
    won: int  # c
    flips: float
    p_value: float  # exact McNemar, two-sided
    p_holm: float  # adjusted for the number of tasks
    recovery: float  # accuracy / base_accuracy
    recovery_ci: Interval
    minimum_detectable_effect: float  # accuracy change these items would show 4 times out of 5

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data: numbers that are not finite become null."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include_path: Path | None = None,
) -> TaskResults:
    """Run tasks through lm_eval.simple_evaluate, offline, and keep every item's outcome.

    Args:
        model: causal model in evaluation mode, called as model(input_ids=...).logits.
        limit: the first so many items of each task.
        include_path: folder with more lm-eval task files.

    Raises:
        UnsupportedError: lm-eval is not installed. UsageError: unknown task.
        DataError: a task's data is missing, malformed or not in the offline cache.
    """
    lm_eval = _import_lm_eval()
    from compressor_eval.harness import CompressorLM

    with tempfile.TemporaryDirectory() as cache, _offline():
        chosen = [_task_config(name, Path(cache)) for name in tasks]
        named = [c for c in chosen if isinstance(c, str)]
        manager = lm_eval.tasks.TaskManager(include_path=include_path, include_defaults=bool(named))
        _check_names(named, manager)
        try:
            found = lm_eval.simple_evaluate(
                model=CompressorLM(model, tokenizer),
                tasks=chosen,
                limit=limit,
                task_manager=manager,
                bootstrap_iters=0,
            )
        except (ConnectionError, FileNotFoundError) as error:
            raise _not_cached(error) from error
    return {name: _task_result(name, found) for name in found["samples"]}


def _import_lm_eval() -> Any:
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise UnsupportedError(
            "evaluation tasks need the package lm-eval, which is not installed",
            why="tasks are scored by the harness that others use, not by one of our own",
            fix='pip install "compressor[eval]"',
        ) from error
    return lm_eval


@contextmanager
def _offline() -> Iterator[None]:
    """Keep datasets and the hub client from the network (cached data or nothing), and the harness
    from asking git for the commit of the working folder: elsewhere git complains."""
    import datasets.config
    import huggingface_hub.constants
    import lm_eval.evaluator

    switches: list[tuple[Any, str, Any]] = [
        (datasets.config, "HF_HUB_OFFLINE", True),
        (datasets.config, "HF_DATASETS_OFFLINE", True),
        (huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        (lm_eval.evaluator, "get_git_commit_hash", lambda: None),
    ]
    before = [getattr(module, name) for module, name, _ in switches]
    for module, name, value in switches:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(switches, before, strict=True):
            setattr(module, name, value)


def _task_config(name: str, cache: Path) -> str | dict[str, Any]:
    """A task of ours as a config with its data files resolved; any other name as it is."""
    if name.startswith(_OWN_PREFIX):
        path = Path(name.removeprefix(_OWN_PREFIX))
        config = _read_yaml(resource_dir("tasks") / "next_sentence_mc.yaml")
        config["task"] = f"mc_{path.stem}"
    else:
        file = resource_dir("tasks") / f"{Path(name).name}.yaml"
        if not file.is_file():
            return name
        config = _read_yaml(file)
        path = _data_path(config["dataset_kwargs"]["data_files"]["test"], name)
    _check_items(path)
    config["dataset_kwargs"] = {"data_files": {"test": str(path)}, "cache_dir": str(cache)}
    return config


def _read_yaml(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML

    return dict(YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")))


def _data_path(listed: str, task: str) -> Path:
    """Where a shipped task's data lies: inside the installed package `compressor`."""
    if not listed.startswith("compressor/"):
        raise UsageError(
            f"the task {task} needs a file of yours", fix='write "mc:path/to/items.jsonl"'
        )
    return Path(compressor.__file__).parent / listed.removeprefix("compressor/")


def _check_items(path: Path) -> None:
    """Refuse a multiple-choice file that is missing or malformed, with its line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(
            f"cannot read the task's items: {error.strerror}",
            code="CA01",
            where=Where(file=str(path)),
        ) from error
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8", code="CA07", where=Where(file=str(path))) from error
    if not any(line.strip() for line in lines):
        raise DataError("the task has no items", code="CA02", where=Where(file=str(path)))
    for number, line in enumerate(lines, 1):
        if line.strip():
            _check_item(line, Where(file=str(path), line=number))


def _check_item(line: str, where: Where) -> None:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise DataError(f"not JSON: {error}", code="CA05", where=where) from error
    choices = item.get("choices") if isinstance(item, dict) else None
    right = item.get("answer") if isinstance(item, dict) else None
    fits = (
        isinstance(choices, list)
        and all(isinstance(c, str) and c for c in choices)
        and type(right) is int
        and 0 <= right < len(choices)
        and isinstance(item.get("context"), str)
    )
    if not fits:
        raise DataError(
            "not a multiple-choice item",
            code="CA06",
            where=where,
            fix='write {"context": "...", "choices": ["...", "..."], "answer": 0}',
        )


def _check_names(names: Sequence[str], manager: Any) -> None:
    unknown = [n for n in names if n not in manager.all_tasks]
    if unknown:
        shipped = sorted(p.stem for p in resource_dir("tasks").glob("*.yaml"))
        raise UsageError(
            f"unknown task {unknown[0]!r}",
            why=f"neither lm-eval nor this package has it (ours: {', '.join(shipped)})",
            fix="see `lm-eval ls tasks`, or write mc:path/to/items.jsonl",
        )


def _not_cached(error: Exception) -> DataError:
    return DataError(
        f"a task's data set is not in the local cache: {str(error).splitlines()[0]}",
        code="CA16",
        why="evaluation never uses the network",
        fix="download it first, for example with `lm-eval run --limit 1` on a machine with network",
    )


def _task_result(name: str, found: dict[str, Any]) -> TaskResult:
    """Per-item outcomes of one task, in the order of its items; the first filter counts."""
    samples = found["samples"][name]
    first = samples[0]["filter"] if samples else None
    samples = sorted((s for s in samples if s["filter"] == first), key=lambda s: s["doc_id"])
    metric = next((m for m in _METRICS if samples and m in samples[0]), "")
    aggregates = {
        key.split(",")[0]: float(value)
        for key, value in found["results"][name].items()
        if isinstance(value, (int, float)) and "_stderr" not in key
    }
    return TaskResult(
        name=name,
        metric=metric,
        doc_ids=[int(s["doc_id"]) for s in samples] if metric else [],
        correct=[bool(s[metric] >= 0.5) for s in samples] if metric else [],
        metrics=aggregates,
    )


def compare_tasks(base: TaskResults, model: TaskResults) -> dict[str, TaskComparison]:
    """Pair both models' outcomes item by item; several tasks also get the entry "pooled".

    Tasks without a right-or-wrong outcome per item (such as perplexities) are left out.

    Raises:
        UsageError: the two runs did not answer the same items.
    """
    pairs: dict[str, tuple[list[bool], list[bool]]] = {}
    for name, result in base.items():
        other = model.get(name)
        if other is None or other.doc_ids != result.doc_ids or other.metric != result.metric:
            raise UsageError(f"task {name}: the two runs did not answer the same items")
        if result.correct:
            pairs[name] = (result.correct, other.correct)
    p_values = [statistics.mcnemar(*_discordant(*pair)) for pair in pairs.values()]
    adjusted = dict(zip(pairs, statistics.holm(p_values), strict=True))
    if len(pairs) > 1:
        first, second = ([c for pair in pairs.values() for c in pair[i]] for i in (0, 1))
        pairs["pooled"] = (first, second)
    return {name: _compare(*pair, adjusted.get(name)) for name, pair in pairs.items()}


def _discordant(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int]:
    """(b, c): items only the first, and only the second gets right."""
    pairs = list(zip(first, second, strict=True))
    return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)


def _compare(first: list[bool], second: list[bool], p_holm: float | None) -> TaskComparison:
    n, right = len(first), sum(first)
    lost, won = _discordant(first, second)
    p_value = statistics.mcnemar(lost, won)
    flips = (lost + won) / n
    return TaskComparison(
        num_items=n,
        base_accuracy=right / n,
        accuracy=sum(second) / n,
        delta=(won - lost) / n,
        delta_ci=statistics.accuracy_difference(lost, won, n),
        lost=lost,
        won=won,
        flips=flips,
        p_value=p_value,
        p_holm=p_value if p_holm is None else p_holm,
        recovery=sum(second) / right if right else math.nan,
        recovery_ci=statistics.recovery_interval(first, second),
        minimum_detectable_effect=statistics.minimum_detectable_effect(max(flips, 1 / n), n),
    )


def as_json(results: Mapping[str, TaskComparison]) -> dict[str, Any]:
    """Comparisons as plain JSON data, by task name."""
    return {name: result.as_json() for name, result in results.items()}
