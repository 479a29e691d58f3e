"""Tokens a second and peak memory of distillation, against a plain loop over transformers' models.

    OMP_NUM_THREADS=1 python -m benchmarks distill_speed [--vocabularies 4096 32768] [--out FILE]

Random Llamas in fp32 (speed does not depend on what they say): a teacher, and a student of half its
blocks. The plain loop is the usual one (TRL's GKD trainer without its data handling): both models
give all logits, `F.kl_div` of their log-softmax, `backward`, clipping, AdamW. Same weights, same
rows, same loss at the first step (checked). Each run is a process of its own; the programs take
turns, `--repetitions` times. Seconds are those of the processor (one thread, so it matters little
what else the machine does), medians over steps. Memory is the highest resident size, and what of it
is beyond both models and the optimizer's state.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

LEARNING_RATE, CLIP = 1e-4, 1.0
PROGRAMS = ("plain", "ours", "ours-cached")


def main(arguments: list[str]) -> None:
    """Measure everything and write one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks distill_speed")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4096, 32768, 131072])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/distill-speed.json"))
    options = parser.parse_args(arguments)
    if options.job is not None:
        sys.stdout.write(json.dumps(_job(json.loads(options.job))) + "\n")
        return
    sizes = {n: getattr(options, n) for n in ("rows", "length", "steps", "repetitions")}
    body: dict[str, Any] = sizes | {"threads": os.environ.get("OMP_NUM_THREADS", "")}
    body["load_before"] = os.getloadavg()[0]
    body["vocabularies"] = {}
    for vocabulary in options.vocabularies:
        body["vocabularies"][vocabulary] = _compared(vocabulary, sizes)
        body["load_after"] = os.getloadavg()[0]
        options.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(body, indent=1) + "\n")


def _compared(vocabulary: int, sizes: dict[str, int]) -> dict[str, Any]:
    """All programs in turns on one vocabulary."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in PROGRAMS}
    with tempfile.TemporaryDirectory() as folder:
        _models(Path(folder), vocabulary)
        for _ in range(sizes["repetitions"]):
            for name in PROGRAMS:
                job = sizes | {"program": name, "folder": folder, "vocabulary": vocabulary}
                command = [sys.executable, "-m", "benchmarks", "distill_speed"]
                ran = subprocess.run(
                    [*command, "--job", json.dumps(job)], check=True, capture_output=True, text=True
                )
                found[name].append(json.loads(ran.stdout.strip().splitlines()[-1]))
    rows = {
        name: {key: round(median(run[key] for run in runs), 4) for key in runs[0]}
        for name, runs in found.items()
    }
    assert abs(rows["ours"]["first_loss"] - rows["plain"]["first_loss"]) < 1e-3, "not the same work"
    for name in PROGRAMS[1:]:
        pairs = zip(found[name], found["plain"], strict=True)
        ratio = median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs)
        rows[name]["speed_ratio"] = round(ratio, 3)
    return rows


def _models(folder: Path, vocabulary: int) -> None:
    for name, layers in (("teacher", 4), ("student", 2)):
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=704,
            num_attention_heads=8,
            num_key_value_heads=4,
            num_hidden_layers=layers,
            tie_word_embeddings=True,
        )
        torch.manual_seed(layers)
        LlamaForCausalLM(config).save_pretrained(folder / name)


def _job(job: dict[str, Any]) -> dict[str, float]:
    """Seconds and memory of one program in this process."""
    generator = torch.Generator().manual_seed(0)
    count = job["rows"] * job["steps"] + 8  # the last ones are held out by ours
    tokens = torch.randint(3, job["vocabulary"], (count, job["length"]), generator=generator)
    run = _plain if job["program"] == "plain" else _ours
    losses, times, loaded = run(job, tokens)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    step = median(later - earlier for earlier, later in itertools.pairwise(times))
    return {
        "first_loss": losses[0],
        "tokens_per_s": job["rows"] * job["length"] / step,
        "peak_mb": peak / 1e6,
        "beyond_models_mb": (peak - loaded) / 1e6,
    }


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _plain(job: dict[str, Any], tokens: torch.Tensor) -> tuple[list[float], list[float], int]:
    """The usual loop; losses, times after each step, resident bytes with models and moments."""
    from compressor.recipe import DistillConfig
    from compressor.stages.schedule import batch_rows
    from compressor.stages.training import held_out_rows

    trained = len(tokens) - held_out_rows(len(tokens), DistillConfig(kind="distill"))
    folder = Path(job["folder"])
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder / n, dtype=torch.float32)
        for n in ("teacher", "student")
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    losses, times, loaded = [], [], 0
    for step in range(job["steps"]):
        batch = tokens[batch_rows(step, job["rows"], trained, 0)]
        with torch.no_grad():
            wanted = functional.log_softmax(teacher(batch).logits, dim=-1)
        found = functional.log_softmax(student(batch).logits, dim=-1)
        loss = functional.kl_div(found, wanted, log_target=True, reduction="sum") / batch.numel()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
        times.append(time.process_time())
        del found, wanted, loss
        loaded = loaded or _resident()
    return losses, times, loaded


def _ours(job: dict[str, Any], tokens: torch.Tensor) -> tuple[list[float], list[float], int]:
    """The training of the distill stage."""
    from compressor.modeling.checkpoint import open_checkpoint
    from compressor.modeling.state import ModelState
    from compressor.modeling.whole import WholeModel
    from compressor.recipe import DistillConfig
    from compressor.stages.objective import Objective, Pupils
    from compressor.stages.teacher_cache import TeacherCache, key_of
    from compressor.stages.training import Callbacks, Training, held_out_rows

    folder, count = Path(job["folder"]), job["steps"]
    config = DistillConfig(
        kind="distill", steps=count, warmup_steps=0, batch_size=job["rows"],
        learning_rate=LEARNING_RATE, gradient_clip=CLIP, checkpoint_steps=count,
    )  # fmt: skip
    states = [ModelState.of_checkpoint(open_checkpoint(folder / n)) for n in ("teacher", "student")]
    cache = None
    if job["program"] == "ours-cached":
        kept = {"targets": "top_k", "count": 64, "cache": str(folder / "cache")}
        config = DistillConfig.model_validate(
            config.model_dump(exclude_unset=True) | {"teacher": kept}
        )
        key = key_of(config, "", tokens, held_out=held_out_rows(len(tokens), config), seed=0)
        cache = TeacherCache(config.teacher.cache, key)
        if not cache.is_whole():
            cache.fill(WholeModel(states[0]), tokens, lambda index, total: None)
    teacher = WholeModel(states[0], with_blocks=cache is None)
    student = WholeModel(states[1])
    objective = Objective(
        config, Pupils(teacher, student, student.slots, [1, 3]), cache=cache, seed=0
    )
    losses: list[float] = []
    times: list[float] = []
    resident: list[int] = []

    def report(facts: dict[str, float]) -> None:
        losses.append(facts["loss"])
        times.append(time.process_time())
        resident.append(_resident())

    Training(objective, tokens, seed=0).run(Callbacks(save=lambda tensors: None, report=report))
    return losses, times[:-1], resident[0]  # the last step ends in a validation
