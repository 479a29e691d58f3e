"""Evaluate: the *saved* artifact against the original, paired on the same tokens.

Both models are loaded from disk, the artifact with its packed kernels: what is measured is what
will be served.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import compressor
from compressor.data import TokenRows, one_document_a_row, token_rows
from compressor.errors import CheckpointError, GateError, RecipeError, Where
from compressor.modeling.device import CPU
from compressor.modeling.hub import resolve_model
from compressor.modeling.load import LoadedModel, load_model
from compressor.recipe import DataConfig, EvaluateConfig
from compressor.recipe import Gate as GateConfig
from compressor.resources import resource_dir
from compressor.stages.contamination import check_contamination
from compressor.stages.context import StageContext, StageReport
from compressor_eval import tasks as task_metrics
from compressor_eval.bos import probe_bos
from compressor_eval.divergence import Comparison, compare, decode_worst
from compressor_eval.gate import Gate, judge, tier
from compressor_eval.report import ReportData, write_report

SAMPLE_PROMPT_TOKENS = 48
SAMPLE_NEW_TOKENS = 48
MAX_SAMPLES = 100


def apply(config: EvaluateConfig, context: StageContext) -> StageReport:
    """Measure, judge, and leave everything the report needs in the facts."""
    if not context.run.is_done("evaluation"):
        overlap, warnings = check_contamination(config.data, context)
        facts = evaluate_models(config, context.source, context.artifact, device=context.device)
        facts |= {"contamination": overlap, "notes": [*facts["data"]["notes"], *warnings]}
        context.run.commit_meta("evaluation", facts)
    facts = context.run.meta("evaluation")
    context.run.progress({"unit": "evaluation", "index": 1, "total": 1})
    state = replace(context.state, trail=(*context.state.trail, "evaluate"))
    return StageReport(state, facts)


def evaluate_pair(
    base: str,
    artifact: Path,
    config: EvaluateConfig,
    out_dir: Path,
    *,
    device: torch.device = CPU,
) -> dict[str, Any]:
    """`compress eval`: compare two folders, write the report into `out_dir`, judge by the gate.

    Raises:
        RecipeError: the gate asks for a repair.
        GateError: the gate failed or could not be decided (the report is written first).
    """
    if config.gate is not None and config.gate.on_fail == "repair":
        raise RecipeError(
            "a finished artifact can be judged, but not repaired",
            code="RC17",
            where=config.where("gate.on_fail"),
            fix="use on_fail: repair in a recipe with a quantize stage",
        )
    facts = evaluate_models(config, resolve_model(base).path, Path(artifact), device=device)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_report(
        ReportData(
            title=f"{Path(artifact).name} against {Path(base).name}",
            base=Path(base).name,
            version=compressor.__version__,
            verdict=facts["verdict"],
            tier=facts["summary"]["tier"],
            comparison=facts["comparison"],
            bos=facts["bos"],
            data=f"{', '.join(config.data.names)}, digest {facts['data']['digest'][:12]}",
            tasks=facts["tasks"],
            worst=facts["worst"],
            notes=facts["data"]["notes"],
        ),
        out_dir,
    )
    check_gate(facts, out_dir)
    return {**facts["summary"], "verdict": facts["verdict"]["status"], "evaluation": facts}


def check_gate(facts: dict[str, Any], kept_at: Path) -> None:
    """Raise GateError unless the verdict is "pass" or there is no gate."""
    verdict = facts["verdict"]
    if verdict["status"] in ("pass", "none"):
        return
    missed = [r for r in verdict["reasons"] if r["status"] == verdict["status"]]
    text = "; ".join(f"{r['metric']} {r['value']} (limit {r['limit']})" for r in missed)
    raise GateError(
        f"quality gate: {verdict['status']}: {text}",
        code="GATE",
        where=Where(str(kept_at)),
        why="The output is complete and verified, but does not meet the limits of the recipe.",
        fix="allow more bits, calibrate or distill longer, or change the gate",
    )


def evaluate_models(
    config: EvaluateConfig, original: Path, artifact: Path, *, device: torch.device = CPU
) -> dict[str, Any]:
    """All measurements of one pair, as plain data without times."""
    base = load_model(original, packed=False, device=str(device))
    model = load_model(artifact, packed=True, device=str(device))
    rows = evaluation_rows(config.data, base)
    comparison = compare(base.model, model.model, rows.tokens, mask=rows.mask)
    bos = probe_bos(
        base.model,
        rows.tokens,
        base.tokenizer.bos_token_id,
        mask=rows.mask,
        tokenizer=base.tokenizer,
    )
    tasks = _tasks(config, base, model)
    verdict = judge(comparison, tasks, _gate(config.gate))
    return {
        "summary": summary(comparison) | {"tier": tier(comparison)},
        "comparison": comparison.as_json(),
        "worst": decode_worst(comparison, base.tokenizer),
        "bos": bos.as_json(),
        "tasks": task_metrics.as_json(tasks),
        "verdict": verdict.as_json(),
        "data": {
            "digest": rows.digest,
            "notes": list(rows.notes),
            "source": ", ".join(config.data.names),
        },
        "prompts": [
            row[real][:SAMPLE_PROMPT_TOKENS].tolist()
            for row, real in zip(rows.tokens[:MAX_SAMPLES], rows.mask[:MAX_SAMPLES], strict=True)
        ],
        "kernels": model.kernels,
        "bytes": _sizes(base, model),
    }


def summary(comparison: Comparison) -> dict[str, float]:
    """The handful of numbers that fit a table row."""
    return {
        "num_tokens": comparison.num_tokens,
        "base_perplexity": comparison.base_perplexity,
        "perplexity": comparison.perplexity,
        "perplexity_ratio": comparison.perplexity_ratio,
        "kl_mean": comparison.kl_mean,
        "kl_p99": comparison.kl_p99,
        "top1_agreement": comparison.top1_agreement,
    }


def evaluation_rows(config: DataConfig, base: LoadedModel) -> TokenRows:
    """Token rows of the evaluation text, cut with the original's tokenizer."""
    if base.tokenizer is None:
        raise CheckpointError(
            "the original has no tokenizer, so text cannot be evaluated",
            code="CK37",
            where=Where(str(base.checkpoint.path)),
            fix="copy tokenizer.json and tokenizer_config.json into the folder",
        )
    text_config = base.model.config.get_text_config()
    rows = token_rows(
        config,
        base.tokenizer,
        vocab_size=text_config.vocab_size,
        max_positions=getattr(text_config, "max_position_embeddings", None),
    )
    return one_document_a_row(rows)


def samples(original: Path, artifact: Path, prompts: list[list[int]]) -> list[dict[str, str]]:
    """Greedy continuations of the same prompts by both models, side by side."""
    base, model = load_model(original, packed=False), load_model(artifact, packed=True)
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        texts = {}
        for name, loaded in (("base", base), ("model", model)):
            out = loaded.model.generate(
                ids, max_new_tokens=SAMPLE_NEW_TOKENS, do_sample=False, pad_token_id=0
            )
            texts[name] = loaded.tokenizer.decode(out[0, len(prompt) :])
        rows.append({"prompt": base.tokenizer.decode(prompt), **texts})
    return rows


def _tasks(
    config: EvaluateConfig, base: LoadedModel, model: LoadedModel
) -> dict[str, task_metrics.TaskComparison]:
    if not config.tasks:
        return {}
    path = resource_dir("tasks")
    results = [
        task_metrics.run_tasks(
            m.model, m.tokenizer, config.tasks, limit=config.task_limit, include_path=path
        )
        for m in (base, model)
    ]
    return task_metrics.compare_tasks(*results)


def _gate(config: GateConfig | None) -> Gate:
    return Gate() if config is None else Gate(**config.limits())


def _sizes(base: LoadedModel, model: LoadedModel) -> dict[str, int]:
    return {
        "original_weights": base.weight_bytes,
        "resident_weights": model.weight_bytes,
        "resident_quantized": model.resident_bytes,
        "packed_quantized": model.packed_bytes,
    }
