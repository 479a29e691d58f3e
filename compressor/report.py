"""From the facts of the stages to the model card and the report inside the artifact.

Both are written after the manifest and are not listed in it: the report holds times.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import compressor
from compressor.artifact.card import CardData, render_card
from compressor.artifact.formats import LayerFormat
from compressor.modeling.families import EXPERT
from compressor.modeling.state import ModelState
from compressor.recipe import EvaluateConfig, Recipe
from compressor.stages.evaluate import samples
from compressor_eval.report import ReportData, write_report

Facts = Mapping[str, Mapping[str, Any]]
PARETO = "pareto.json"


class Outcome:
    """The facts of all stages of a finished run, asked for by kind."""

    def __init__(self, facts: Facts, seconds: Mapping[str, float]) -> None:
        self.facts = facts
        self.seconds = seconds

    def last(self, kind: str) -> Mapping[str, Any]:
        """The facts of the last stage of a kind; empty if there was none."""
        found = [f for name, f in self.facts.items() if name.partition("-")[2] == kind]
        return found[-1] if found else {}

    def notes(self) -> list[str]:
        """Every fallback and warning, with its stage."""
        return [f"{name}: {n}" for name, f in self.facts.items() for n in f.get("notes", [])]


def write_outcome(
    recipe: Recipe, outcome: Outcome, state: ModelState, folder: Path, *, command: str, text: str
) -> dict[str, Any]:
    """Write README.md, report.html and report.json into the artifact; returns the summary.

    Args:
        recipe: of the run; `text` is the same as it went into the artifact.
        outcome: facts and times of the stages.
        state: the model after the last stage.
        folder: the artifact.
        command: the command line.
    """
    formats = layer_formats(state)
    card = _card(recipe, outcome, formats, command)
    (folder / "README.md").write_text(render_card(card), encoding="utf-8")
    front = outcome.last("quantize").get("front")
    if front:
        (folder / PARETO).write_text(json.dumps(front, indent=1) + "\n", encoding="utf-8")
    write_report(_report(recipe, outcome, state, folder, command=command, text=text), folder)
    return summary(outcome, formats)


def layer_formats(state: ModelState) -> dict[tuple[int, str], LayerFormat | None]:
    """The format of every linear by block position and block-relative name; None = dense."""
    found: dict[tuple[int, str], LayerFormat | None] = {}
    for position, ref in enumerate(state.blocks):
        for linear, fmt in ref.meta.get("formats", {}).items():
            found[position, linear] = LayerFormat.from_json(fmt)
    return found


def summary(outcome: Outcome, formats: Mapping[Any, LayerFormat | None]) -> dict[str, Any]:
    """The numbers of the closing table."""
    pack, evaluation = outcome.last("pack"), outcome.last("evaluate")
    out: dict[str, Any] = {
        "original_bytes": pack.get("original_bytes"),
        "artifact_bytes": pack.get("weight_bytes"),
        "quantized_layers": len(formats),
    }
    out |= evaluation.get("summary", {})
    for name, task in evaluation.get("tasks", {}).items():
        out[f"task {name}"] = task.get("accuracy")
    out["seconds"] = round(sum(outcome.seconds.values()), 1)
    return {k: v for k, v in out.items() if v is not None}


def _card(
    recipe: Recipe,
    outcome: Outcome,
    formats: Mapping[tuple[int, str], LayerFormat | None],
    command: str,
) -> CardData:
    pack, evaluation = outcome.last("pack"), outcome.last("evaluate")
    counts: dict[tuple[str, str], int] = {}
    for (_, linear), fmt in formats.items():
        key = (_kind(linear), fmt.label if fmt else "dense")
        counts[key] = counts.get(key, 0) + 1
    return CardData(
        name=recipe.name,
        base_model=shown_source(recipe.model.path),
        command=command,
        version=compressor.__version__,
        schemes=[{"layers": f"{n} x {k}", "scheme": s} for (k, s), n in counts.items()],
        original_bytes=pack.get("original_bytes", 0),
        artifact_bytes=pack.get("weight_bytes", 0),
        calibration=_calibration(outcome),
        metrics=evaluation.get("comparison", {}),
        tasks=evaluation.get("tasks", {}),
        verdict=evaluation.get("verdict", {}).get("status", ""),
        limitations=outcome.notes(),
        has_kernels=bool(pack.get("kernels", {}).get("digest")),
    )


def shown_source(path: str) -> str:
    """A model's source as it may be shown: hub ids whole, folders by name."""
    return Path(path).name if Path(path).exists() else path


def _report(
    recipe: Recipe, outcome: Outcome, state: ModelState, folder: Path, *, command: str, text: str
) -> ReportData:
    evaluation = outcome.last("evaluate")
    return ReportData(
        title=recipe.name,
        base=shown_source(recipe.model.path),
        version=compressor.__version__,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        verdict=evaluation.get("verdict", {}),
        tier=evaluation.get("summary", {}).get("tier", ""),
        comparison=evaluation.get("comparison", {}),
        bos=evaluation.get("bos", {}),
        data=_data(recipe, outcome),
        tasks=evaluation.get("tasks", {}),
        sizes=_sizes(outcome),
        layers=_layers(state),
        sensitivity=_sensitivity(outcome),
        predictions=_predictions(outcome),
        front=_front(outcome),
        samples=_samples(recipe, outcome, state, folder),
        worst=evaluation.get("worst", ()),
        stages=_stages(outcome),
        notes=outcome.notes(),
        environment=_environment(evaluation),
        command=command,
        recipe=text,
    )


def _data(recipe: Recipe, outcome: Outcome) -> str:
    """Which text judged the model, how much of it was seen before, and which text calibrated it."""
    evaluation = outcome.last("evaluate")
    stages = [s for s in recipe.stages if isinstance(s, EvaluateConfig)]
    if not stages or not evaluation:
        return ""
    data = stages[-1].data
    digest = evaluation["data"]["digest"][:12]
    source = ", ".join(map(shown_source, data.names))
    told = [f"{source} {data.split or ''}: rows of {data.seq_len} tokens, digest {digest}"]
    if seen := evaluation.get("contamination"):
        told.append(
            f"{seen['contaminated_rows']} of {seen['num_rows']} rows stand in the calibration or "
            f"training text, {seen['identical_rows']} of them letter for letter"
        )
    calibration = _calibration(outcome)
    return "; ".join([*told, *([f"calibrated on {calibration}"] if calibration else [])])


def _calibration(outcome: Outcome) -> str:
    """Rows, packing, seed, sources with their documents and unknown tokens, digest."""
    facts = outcome.last("calibrate")
    if not facts:
        return ""
    rows, data = facts["rows"], facts["data"]
    seed = "" if data["seed"] is None else f", seed {data['seed']}"
    sources = [
        f"{shown_source(s['source'])} ({s['num_rows']} rows of {s['num_documents']} documents, "
        f"{s['unknown_share']:.2%} unknown tokens)"
        for s in facts["sources"]
    ]
    told = f"{rows[0]} rows of {rows[1]} tokens ({data['packing']}{seed}) from {', '.join(sources)}"
    return f"{told}, digest {facts['digest'][:12]}"


def _sizes(outcome: Outcome) -> list[dict[str, Any]]:
    pack = outcome.last("pack")
    after = pack.get("components", {})
    before = pack.get("original_components", {})
    return [
        {"component": n, "original_bytes": before.get(n, 0), "artifact_bytes": after.get(n, 0)}
        for n in dict.fromkeys([*before, *after])
    ]


def _layers(state: ModelState) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    from compressor.stages.selection import block_linears

    formats = layer_formats(state)
    if not formats:
        return rows
    for target in block_linears(state.skeleton()):
        fmt = formats.get((target.position, target.linear))
        bits = fmt.bits_per_weight(target.shape) if fmt else 16.0
        row = {"layer": target.position, "kind": _kind(target.linear)}
        if not rows or rows[-1] | {"bits": 0} != row | {"bits": 0}:
            rows.append(row | {"bits": bits})
    return rows


def _kind(linear: str) -> str:
    match = EXPERT.match(linear)
    return f"experts.{match['leaf']}" if match else linear


def _sensitivity(outcome: Outcome) -> list[dict[str, Any]]:
    allocation = outcome.last("quantize").get("allocation") or {}
    labels = allocation.get("labels", {})
    scores = allocation.get("scores", {})
    rows = [
        {"unit": u, "score": max(row.values()), "scheme": labels.get(u, "")}
        for u, row in scores.items()
        if row
    ]
    return sorted(rows, key=lambda r: r["score"], reverse=True)


def _predictions(outcome: Outcome) -> list[dict[str, Any]]:
    quantize = outcome.last("quantize")
    allocation = quantize.get("allocation") or {}
    measured = quantize.get("measured", {})
    weights = allocation.get("num_weights", 0)
    return [
        {
            "label": name + (" (kept)" if quantize.get("kept") == name else ""),
            "average_bits": 8 * size / weights if weights else None,
            "predicted_kl": allocation["predicted"].get(name),
            "measured_kl": measured.get(name),
        }
        for name, size in allocation.get("bytes", {}).items()
    ]


def _front(outcome: Outcome) -> dict[str, Any]:
    """`pareto.json` without the formats: what the drawing needs."""
    front = outcome.last("quantize").get("front") or {}
    kept = ("bytes", "average_bits", "additive_kl", "predicted_kl", "measured_kl", "name")
    rows = {
        key: [{k: row[k] for k in kept if k in row} for row in front.get(key, [])]
        for key in ("points", "uniform", "measured")
    }
    name = outcome.last("quantize").get("kept")
    return rows | {"kept": name} if front else {}


def _samples(
    recipe: Recipe, outcome: Outcome, state: ModelState, folder: Path
) -> list[dict[str, str]]:
    prompts = outcome.last("evaluate").get("prompts", [])[: recipe.samples]
    return samples(state.checkpoint.path, folder, prompts) if prompts else []


def _stages(outcome: Outcome) -> list[dict[str, Any]]:
    rows = []
    for name, facts in outcome.facts.items():
        plain = {k: v for k, v in facts.items() if isinstance(v, int | float) and v is not None}
        row: dict[str, Any] = {"stage": name, "seconds": outcome.seconds.get(name)}
        rows.append(row | {"held_out_kl": plain.get("held_out_kl")})
    return rows


def _environment(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    import transformers

    return {
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "kernels": evaluation.get("kernels", {}),
    }
