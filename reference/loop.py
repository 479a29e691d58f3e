"""The training loop that the base and the draft model share.

The budget is wall-clock time, not steps: the learning rate is a function of
`elapsed / limit`, so a slow machine trains on fewer tokens but still ends its decay: a short
warmup, then straight to zero (Bergsma et al. 2025). Hidden matrices use Muon, everything else
AdamW. A checkpoint is written every few minutes; a killed run goes on from the last one.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from reference.muon import Muon

log = logging.getLogger("reference")

_WARMUP = 0.02  # share of the time limit
_CHECKPOINT_EVERY_S = 300.0
_LOG_EVERY = 10  # steps

Loss = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]  # (model, [B, T] ids) -> scalar


@dataclass(frozen=True, slots=True)
class Plan:
    """What one training run may use, and where it writes."""

    limit_s: float
    model_folder: Path
    checkpoint: Path
    batch_size: int = 4
    context: int = 512
    muon_lr: float = 0.01
    adam_lr: float = 0.003
    max_steps: int | None = None
    seed: int = 0


@dataclass(slots=True)
class Progress:
    """How far a run is: steps, tokens, seconds, and (step, seconds, mean loss) rows."""

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)


def windows(streams: list[list[int]], bos: int, plan: Plan) -> Iterator[torch.Tensor]:
    """Endless batches [B, T] of packed documents; every window starts with the start token.

    Each epoch shuffles the documents, joins them to one stream, cuts it and shuffles the cuts,
    all from `plan.seed`, so that a resumed run can skip to where it was.
    """
    epoch = 0
    while True:
        rng = torch.Generator().manual_seed(plan.seed + epoch)
        order = torch.randperm(len(streams), generator=rng).tolist()
        stream = torch.tensor([token for index in order for token in streams[index]])
        cut = plan.context - 1
        count = len(stream) // cut
        rows = stream[: count * cut].view(count, cut)
        rows = rows[torch.randperm(count, generator=rng)]
        rows = torch.cat([torch.full((count, 1), bos), rows], dim=1)
        whole = count - count % plan.batch_size
        yield from rows[:whole].view(-1, plan.batch_size, plan.context)
        epoch += 1


def learning_rate_factor(share: float) -> float:
    """Factor in [0, 1] after `share` of the time limit: linear warmup, linear decay to zero."""
    if share < _WARMUP:
        return max(share / _WARMUP, 0.02)
    return max(0.0, (1.0 - share) / (1.0 - _WARMUP))


def optimizers(model: torch.nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the embedding and the norms."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, weight in model.named_parameters():
        (matrices if weight.ndim == 2 and "embed" not in name else rest).append(weight)
    muon = Muon(matrices, lr=plan.muon_lr)
    adam = torch.optim.AdamW(rest, lr=plan.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adam]


def autocast_dtype(device: torch.device) -> torch.dtype:
    """The faster of float32 and bfloat16 on this device, measured on one matrix product."""

    def seconds(dtype: torch.dtype) -> float:
        left, right = (torch.ones(512, 512, dtype=dtype, device=device) for _ in range(2))
        float((left @ right)[0, 0])
        start = time.perf_counter()
        float((left @ right @ right)[0, 0])
        return time.perf_counter() - start

    is_faster = 1.2 * seconds(torch.bfloat16) < seconds(torch.float32)
    return torch.bfloat16 if is_faster else torch.float32


def next_token_loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats per token, of [B, T] ids."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    streams: list[list[int]],
    loss: Loss,
    plan: Plan,
) -> Progress:
    """Train until the time is over, then write the model folder; returns the progress."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = autocast_dtype(device)
    log.info("device %s, compute in %s, %d threads", device, dtype, torch.get_num_threads())
    model.to(device).train()
    steppers = optimizers(model, plan)
    progress = restore(model, steppers, plan.checkpoint)
    batches = windows(streams, tokenizer.convert_tokens_to_ids("<|bos|>"), plan)
    for _ in range(progress.tokens // (plan.batch_size * plan.context)):
        next(batches)
    saved_at = progress.elapsed_s
    while progress.elapsed_s < plan.limit_s and progress.step != plan.max_steps:
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            value = loss(model, next(batches).to(device))
        _update(model, value, steppers, learning_rate_factor(progress.elapsed_s / plan.limit_s))
        _record(progress, value, time.perf_counter() - start, plan)
        if progress.elapsed_s - saved_at > _CHECKPOINT_EVERY_S:
            saved_at = progress.elapsed_s
            _checkpoint(model, steppers, progress, plan.checkpoint)
            export(model, tokenizer, progress, plan.model_folder)
    export(model, tokenizer, progress, plan.model_folder)
    return progress


def _update(
    model: torch.nn.Module,
    loss: torch.Tensor,
    steppers: list[torch.optim.Optimizer],
    factor: float,
) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for stepper in steppers:
        for group in stepper.param_groups:
            group["lr"] = group["peak_lr"] * factor
        stepper.step()
        stepper.zero_grad()


def _record(progress: Progress, loss: torch.Tensor, seconds: float, plan: Plan) -> None:
    progress.step += 1
    progress.tokens += plan.batch_size * plan.context
    progress.elapsed_s += seconds
    progress.recent.append(float(loss.detach()))
    if progress.step % _LOG_EVERY == 0:
        value = round(sum(progress.recent) / len(progress.recent), 4)
        progress.recent.clear()
        progress.curve.append((progress.step, round(progress.elapsed_s, 1), value))
        speed = progress.tokens / progress.elapsed_s
        log.info(
            "step %d, %.0f s, loss %.3f, %.0f tok/s",
            progress.step, progress.elapsed_s, value, speed,
        )  # fmt: skip


def _checkpoint(
    model: torch.nn.Module,
    steppers: list[torch.optim.Optimizer],
    progress: Progress,
    path: Path,
) -> None:
    state: dict[str, Any] = {
        "model": model.state_dict(),
        "optimizers": [stepper.state_dict() for stepper in steppers],
        "step": progress.step,
        "tokens": progress.tokens,
        "elapsed_s": progress.elapsed_s,
        "curve": progress.curve,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def restore(model: torch.nn.Module, steppers: list[torch.optim.Optimizer], path: Path) -> Progress:
    """Load the checkpoint at `path` if there is one; the progress says where to go on."""
    if not path.exists():
        return Progress()
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for stepper, saved in zip(steppers, state["optimizers"], strict=True):
        stepper.load_state_dict(saved)
    log.info("resume at step %d, %.0f s", state["step"], state["elapsed_s"])
    return Progress(state["step"], state["tokens"], state["elapsed_s"], state["curve"])


def export(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    progress: Progress,
    folder: Path,
) -> None:
    """Write an ordinary Hugging Face folder with bfloat16 weights, and the loss curve."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    curve = {
        "columns": ["step", "seconds", "loss_nats_per_token"],
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": round(progress.elapsed_s, 1),
        "rows": progress.curve,
    }
    (folder / "loss_curve.json").write_text(json.dumps(curve) + "\n", encoding="utf-8")
