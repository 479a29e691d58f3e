"""Named sets of tasks, data sizes and limits, read from the suites folder."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from compressor.errors import UsageError, Where
from compressor.resources import resource_dir
from compressor_eval.gate import Gate


@dataclass(frozen=True, slots=True)
class Suite:
    """What to measure, and the limits that make it pass."""

    name: str
    description: str
    num_samples: int  # rows of evaluation text
    seq_len: int
    tasks: list[str]
    task_limit: int | None
    gate: Gate


def suite_names() -> list[str]:
    """The suites that ship."""
    return sorted(p.stem for p in resource_dir("suites").glob("*.yaml"))


def load_suite(name: str) -> Suite:
    """Read a suite by name; unknown names and unknown keys are refused."""
    from ruamel.yaml import YAML

    if name not in suite_names():
        raise UsageError(f"unknown suite {name!r}", fix=f"use one of {', '.join(suite_names())}")
    path = resource_dir("suites") / f"{name}.yaml"
    values = dict(YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")))
    limits = values.pop("gate", {})
    _check_keys(values, {f.name for f in fields(Suite)} - {"name", "gate"}, path.name)
    _check_keys(limits, {f.name for f in fields(Gate)}, path.name)
    return Suite(name=name, gate=Gate(**limits), **values)


def _check_keys(values: dict[str, Any], known: set[str], file: str) -> None:
    unknown = sorted(set(values) - known)
    if unknown:
        raise UsageError(f"unknown key {unknown[0]!r} in a suite", where=Where(file=file))
