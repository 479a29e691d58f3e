"""The training loop of distillation: one global batch a step, the same in any number of processes.

    loss = (1 - c) T^2 KL(teacher || student) + c CE + h MSE(hidden)        means over tokens

Everything a step needs follows from its number: rows (a permutation for each epoch, drawn from the
seed), learning rate (warm-up, then cosine or warm-up-stable-decay). So a run that goes on from a
checkpoint takes the very steps it would have taken. Processes share each batch row by row and add
their gradients, weighted with their tokens; one process gets the same sums.

Pruned weights stay exactly zero: their gradients are zeroed before the norm is taken, the weights
after each step. Candidates for the best state are judged on held-out rows as they would be stored,
rounded to the stored dtype, and the state before the first step is one of them. Parameters that
are exported (scales, codes) are always computed with as they would be stored.

Legend: B rows in a batch, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compressor.algorithms.distillation import chunked_forward_kl, cross_entropy, hidden_mse
from compressor.errors import DataError, NumericError
from compressor.modeling.whole import Slot, WholeModel
from compressor.recipe import DistillConfig
from compressor.stages import processes

TOKENS_PER_MICRO_BATCH = 4096
SCALE_RATE = 20.0  # log-scales move in relative steps; they take a larger rate than weights
LATENT_RATE = 20.0  # positions in grid steps; KL after GPTQ: 5 .0336, 20 .0324, frozen .0344
BETAS = (0.9, 0.95)
DECAY_SHARE = 0.2  # of a warm-up-stable-decay schedule
EXPLOSION = 10.0  # a loss this many times the first one (at least 1 nat) is a divergence
HELD_OUT_SHARE, MAX_HELD_OUT = 8, 32
CHUNK = 512


@dataclass(slots=True)
class Progress:
    """Where training is; all of it goes into a checkpoint.

    losses: of the steps since the last checkpoint. validation: [step, held-out KL] pairs.
    """

    step: int = 0
    first_loss: float = 0.0
    best_step: int = 0
    best_kl: float = math.inf
    losses: list[float] = field(default_factory=list)
    validation: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Pupils:
    """Teacher and student in memory, what of the student learns, and which blocks correspond.

    pairs: for each block of the student the teacher's block with the output it should match.
    """

    teacher: WholeModel
    student: WholeModel
    slots: list[Slot]
    pairs: list[int]


class Training:
    """Optimizer and progress over one student; `run` yields at checkpoints through a callback."""

    def __init__(self, config: DistillConfig, pupils: Pupils, tokens: Tensor, *, seed: int) -> None:
        """Prepare; nothing is computed.

        Args:
            config: of the stage.
            pupils: both models; the parameters of the slots get gradients from now on.
            tokens: int64 [N, T]; the last rows are held out.
            seed: of the order of rows.
        """
        self.config, self.pupils, self.seed = config, pupils, seed
        self.accelerator = processes.join()
        held_out = _held_out(len(tokens), config)
        self.rows, self.held_out = tokens[:-held_out], tokens[-held_out:]
        self.progress = Progress()
        self.best = {slot.key: slot.stored() for slot in pupils.slots}
        self.parameters: list[nn.Parameter] = [s.parameter for s in pupils.slots]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(_groups(pupils.slots), betas=BETAS, weight_decay=0.0)

    def run(self, save: Callable[[bool], None], report: Callable[[float], None]) -> None:
        """Train to the last step.

        Args:
            save: called with True at checkpoints, with False before a divergence is raised.
            report: called with the loss after each step.

        Raises:
            NumericError: the loss is not finite or explodes (NU10).
        """
        if not self.progress.validation:
            self._validate()
        while self.progress.step < self.config.steps:
            loss = self._step(save)
            done = self.progress.step == self.config.steps
            if done or self.progress.step % self.config.checkpoint_steps == 0:
                self._validate()
                save(True)
                self.progress.losses = []
            report(loss)

    def _step(self, save: Callable[[bool], None]) -> float:
        step = self.progress.step
        chosen = self.rows[batch_rows(step, self.config.batch_size, len(self.rows), self.seed)]
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward(chosen)
        self._share_gradients()
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip))
        self.progress.first_loss = self.progress.first_loss if step else loss
        limit = EXPLOSION * max(self.progress.first_loss, 1.0)
        if not math.isfinite(loss) or not math.isfinite(norm) or loss > limit:
            save(False)
            raise self._diverged(loss, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * learning_rate(step, self.config)
        self.optimizer.step()
        self._zero_pruned()
        self.progress.step += 1
        self.progress.losses.append(loss)
        return loss

    def _backward(self, chosen: Tensor) -> float:
        """Gradients of this process's share of the batch; the loss of the whole batch."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = chosen[rank::world]
        total = torch.zeros((), dtype=torch.float64, device=self.pupils.student.device)
        for part in _micro_batches(mine):
            share = len(part) / len(chosen)
            with self.accelerator.autocast():
                loss = self._loss(part) * share
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return float(self.accelerator.reduce(total, "sum"))

    def _loss(self, tokens: Tensor) -> Tensor:
        config, (teacher, student) = self.config, (self.pupils.teacher, self.pupils.student)
        wanted = teacher.hidden_states(tokens)
        seen = student.hidden_states(tokens, grad=True)
        loss = torch.zeros((), device=student.device)
        if config.ce_weight < 1:
            kl = self._divergence(seen[-1], wanted[-1], config.temperature)
            loss = loss + (1 - config.ce_weight) * kl
        if config.ce_weight > 0:
            loss = loss + config.ce_weight * _next_token_loss(student, seen[-1], tokens)
        if config.hidden_weight > 0:
            parts = [hidden_mse(s, wanted[i]) for s, i in zip(seen, self.pupils.pairs, strict=True)]
            loss = loss + config.hidden_weight * torch.stack(parts).mean()
        return loss

    def _divergence(self, seen: Tensor, wanted: Tensor, temperature: float) -> Tensor:
        heads = self.pupils.student.head, self.pupils.teacher.head
        return chunked_forward_kl(
            seen, wanted, *heads, temperature=temperature, tokens_per_chunk=CHUNK
        )

    def _share_gradients(self) -> None:
        """Zero the gradients of pruned weights; add those of all processes."""
        for slot in self.pupils.slots:
            if slot.parameter.grad is None:  # an expert that no token of this process reached
                slot.parameter.grad = torch.zeros_like(slot.parameter)
            if slot.keep is not None:
                slot.parameter.grad.mul_(slot.keep)
        if self.accelerator.num_processes > 1:
            flat = torch.cat([_gradient(p).flatten() for p in self.parameters])
            flat = self.accelerator.reduce(flat, "sum")
            parts = torch.split(flat, [p.numel() for p in self.parameters])
            for parameter, part in zip(self.parameters, parts, strict=True):
                parameter.grad = part.view_as(parameter)

    @torch.no_grad()
    def _zero_pruned(self) -> None:
        for slot in self.pupils.slots:
            if slot.keep is not None:
                slot.parameter.mul_(slot.keep)

    @torch.no_grad()
    def _validate(self) -> None:
        """Held-out KL of the student as it would be stored; keep it if it is the best so far."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        device = self.pupils.student.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        with _as_stored(self.pupils.slots):
            for part in _micro_batches(self.held_out[rank::world]):
                wanted = self.pupils.teacher.hidden_states(part)[-1]
                seen = self.pupils.student.hidden_states(part)[-1]
                total += self._divergence(seen, wanted, 1.0).double() * len(part)
        kl = float(self.accelerator.reduce(total, "sum")) / len(self.held_out)
        progress = self.progress
        progress.validation.append([progress.step, kl])
        if kl < progress.best_kl:
            progress.best_step, progress.best_kl = progress.step, kl
            self.best = {slot.key: slot.stored() for slot in self.pupils.slots}

    def _diverged(self, loss: float, norm: float) -> NumericError:
        progress = self.progress
        return NumericError(
            f"training diverged at step {progress.step + 1}: loss {loss:g}, gradient norm {norm:g}",
            code="NU10",
            where=self.config.where("learning_rate"),
            why=f"The state after step {progress.step} is kept, and the best one (step "
            f"{progress.best_step}, held-out KL {progress.best_kl:.4g}).",
            fix=f"lower learning_rate (now {self.config.learning_rate:g}) or add warmup_steps",
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything that `restore` needs besides `progress`."""
        found = {f"best/{key}": t for key, t in self.best.items()}
        for slot in self.pupils.slots:
            found[f"value/{slot.key}"] = slot.parameter.detach()
            for name in ("exp_avg", "exp_avg_sq"):
                moment = self.optimizer.state[slot.parameter].get(name)
                zeros = torch.zeros_like(slot.parameter)
                found[f"{name}/{slot.key}"] = zeros if moment is None else moment
        return found

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], progress: Progress) -> None:
        """Go on from a checkpoint."""
        self.progress = progress
        self.best = {slot.key: tensors[f"best/{slot.key}"] for slot in self.pupils.slots}
        for slot in self.pupils.slots:
            slot.parameter.copy_(tensors[f"value/{slot.key}"])
            moments = {n: tensors[f"{n}/{slot.key}"] for n in ("exp_avg", "exp_avg_sq")}
            state: dict[str, Any] = {
                n: t.clone().to(slot.parameter.device) for n, t in moments.items()
            }
            state["step"] = torch.tensor(float(progress.step))
            if progress.step:
                self.optimizer.state[slot.parameter] = state


def learning_rate(step: int, config: DistillConfig) -> float:
    """The rate of step `step` (from 0): linear warm-up, then cosine to 0, or stable and decay."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    after = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * after))
    return config.learning_rate * min(1.0, (1 - after) / DECAY_SHARE)


def batch_rows(step: int, batch_size: int, num_rows: int, seed: int) -> Tensor:
    """Row numbers [B] of a step: epochs are permutations drawn from the seed, laid end to end."""
    begin = step * batch_size
    first, last = begin // num_rows, (begin + batch_size - 1) // num_rows
    order = []
    for epoch in range(first, last + 1):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        order.append(torch.randperm(num_rows, generator=generator))
    offset = begin - first * num_rows
    return torch.cat(order)[offset : offset + batch_size]


def _held_out(count: int, config: DistillConfig) -> int:
    if count < 2:
        raise DataError(
            "distillation needs at least two rows: one of them measures and teaches nothing",
            code="CA03",
            where=config.where("data"),
            fix="raise data.num_samples",
        )
    return max(1, min(MAX_HELD_OUT, count // HELD_OUT_SHARE))


def _groups(slots: list[Slot]) -> list[dict[str, Any]]:
    rates = {"scale": SCALE_RATE, "latent": LATENT_RATE}
    kinds: dict[float, list[nn.Parameter]] = {SCALE_RATE: [], LATENT_RATE: [], 1.0: []}
    for slot in slots:
        kinds[rates.get(slot.kind, 1.0)].append(slot.parameter)
    return [{"params": mine, "rate": rate} for rate, mine in kinds.items() if mine]


def _micro_batches(rows: Tensor) -> Iterator[Tensor]:
    size = max(1, TOKENS_PER_MICRO_BATCH // rows.shape[1])
    return iter(torch.split(rows, size)) if len(rows) else iter(())


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "filled by the caller"
    return parameter.grad


def _next_token_loss(student: WholeModel, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of the next tokens, with logits of one chunk at a time."""
    rows = hidden[:, :-1].flatten(0, 1)
    targets = tokens[:, 1:].flatten().to(student.device)

    def part(h: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(student.head(h), y) * len(y)

    total = torch.zeros((), device=student.device)
    for h, y in zip(torch.split(rows, CHUNK), torch.split(targets, CHUNK), strict=True):
        total = total + checkpoint(part, h, y, use_reentrant=False)
    return total / len(rows)


@contextmanager
def _as_stored(slots: list[Slot]) -> Iterator[None]:
    """Let dense parameters have the values they would be stored with (exported ones always do)."""
    rounded = [s for s in slots if s.export is None and s.dtype != torch.float32]
    exact = [s.parameter.detach().clone() for s in rounded]
    for slot in rounded:
        slot.parameter.data.copy_(slot.parameter.detach().to(slot.dtype))
    try:
        yield
    finally:
        for slot, value in zip(rounded, exact, strict=True):
            slot.parameter.data.copy_(value)
