"""The training loop of distillation: one global batch a step, the same in any number of processes.

Everything a step needs follows from its number (`schedule`) and the parameters: so a run that goes
on from a checkpoint takes the very steps it would have taken. Processes share each batch row by row
and add their gradients, weighted with their tokens; one process gets the same sums.

Pruned weights stay exactly zero: their gradients are zeroed before the norm is taken, the weights
after each step. Candidates for the best state are judged on held-out rows as they would be stored,
rounded to the stored dtype, and the state before the first step is one of them. Parameters that
are exported (scales, codes) are always computed with as they would be stored.

A loss that is not finite, or `spike_factor` times the median of the last steps, ends in `Spike`:
whoever runs the training goes back to the last checkpoint and on with other rows at half the rate.

Legend: B rows in a batch, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import DataError, NumericError
from compressor.modeling.whole import Slot, whole_tensor
from compressor.recipe import DistillConfig
from compressor.stages import processes
from compressor.stages.objective import Batch, HeldOut, Objective, Pupils
from compressor.stages.on_policy import with_own_rows
from compressor.stages.schedule import batch_rows, learning_rate
from compressor.stages.sharding import clip_gradients, is_sharded, shaped_like

SCALE_RATE = 20.0  # log-scales move in relative steps; they take a larger rate than weights
LATENT_RATE = 20.0  # positions in grid steps; KL after GPTQ: 5 .0336, 20 .0324, frozen .0344
ADAPTER_RATE = 10.0  # KL of half depth at 1e-3: x 3 .599, x 10 .514, x 30 no better than the start
BETAS = (0.9, 0.95)
RECENT = 32  # steps whose median loss is the usual one
LEAST_USUAL = 0.1  # nats: below, a batch may well be ten times the median
HELD_OUT_SHARE, MAX_HELD_OUT = 8, 32
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(slots=True)
class Progress:
    """Where training is; all of it goes into a checkpoint.

    losses: of the steps since the last checkpoint. recent: of the last steps. validation: [step,
    held-out KL] pairs. best: what was measured at the best step. spikes: steps that were undone.
    """

    step: int = 0
    first_loss: float = 0.0
    best_step: int = 0
    best_kl: float = math.inf
    best: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    validation: list[list[float]] = field(default_factory=list)
    spikes: list[int] = field(default_factory=list)


class Spike(Exception):
    """The loss of a step is far from the ones before it; the parameters are those before it."""

    def __init__(self, step: int, loss: float, norm: float) -> None:
        super().__init__(step)
        self.step, self.loss, self.norm = step, loss, norm


@dataclass(frozen=True, slots=True)
class Callbacks:
    """What the process that writes does: `save` after a validation, with the tensors to go on from,
    `report` after every step."""

    save: Callable[[dict[str, Tensor]], None]
    report: Callable[[dict[str, float]], None]


class Training:
    """Optimizer and progress over one student."""

    def __init__(self, objective: Objective, tokens: Tensor, *, seed: int) -> None:
        """Prepare; nothing is computed.

        Args:
            objective: with both models; the parameters of its slots get gradients from now on.
            tokens: int64 [N, T]; the last rows are held out.
            seed: of the order of rows.
        """
        self.objective, self.seed = objective, seed
        self.config, self.pupils = objective.config, objective.pupils
        self.accelerator = processes.join()
        self.held_out_count = held_out_rows(len(tokens), self.config)
        self.tokens = tokens
        self.rows = tokens[: len(tokens) - self.held_out_count]
        self.progress = Progress()
        self.best = {slot.key: slot.stored() for slot in self.pupils.slots}
        self.trained: dict[str, nn.Parameter] = {s.key: s.parameter for s in self.pupils.slots}
        self.trained |= objective.projections
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        groups = _groups(self.pupils.slots, list(objective.projections.values()))
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)

    def run(self, callbacks: Callbacks) -> None:
        """Train to the last step, or until held-out KL stops falling.

        Raises:
            Spike: the loss is not finite or explodes.
        """
        progress = self.progress
        if not progress.validation:
            self._validate()
        while progress.step < self.config.steps and not self._is_stuck():
            facts = self._step()
            done = progress.step == self.config.steps
            if done or progress.step % self.config.checkpoint_steps == 0:
                self._validate()
                callbacks.save(self.tensors())
                progress.losses = []
            callbacks.report(facts)

    def _is_stuck(self) -> bool:
        """Whether the last `patience` validations brought nothing better."""
        if self.config.patience is None:
            return False
        later = [step for step, _ in self.progress.validation if step > self.progress.best_step]
        return len(later) >= self.config.patience

    def _step(self) -> dict[str, float]:
        progress, config = self.progress, self.config
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward(self._batch())
        self._share_gradients()
        norm = clip_gradients(self.trained.values(), config.gradient_clip)
        progress.first_loss = progress.first_loss if progress.step else loss
        if not math.isfinite(loss) or not math.isfinite(norm) or loss > self._most_loss():
            raise Spike(progress.step, loss, norm)
        rate = learning_rate(progress.step, config) * 0.5 ** len(progress.spikes)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * rate
        self.optimizer.step()
        self._zero_pruned()
        progress.step += 1
        progress.losses.append(loss)
        progress.recent = [*progress.recent, loss][-RECENT:]
        return {"loss": loss, "gradient_norm": norm, "learning_rate": rate}

    def _most_loss(self) -> float:
        """Beyond this a loss is a spike."""
        progress = self.progress
        usual = median(progress.recent) if progress.recent else progress.first_loss
        usual = min(max(usual, LEAST_USUAL), max(progress.first_loss, 1.0))
        return self.config.spike_factor * usual

    def _batch(self) -> Batch:
        """This process's share of the step's rows; some of them the student's own."""
        step, size = self.progress.step, self.config.batch_size
        seed = self.seed + len(self.progress.spikes)
        numbers = batch_rows(step, size, len(self.rows), seed)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = slice(rank, None, world)
        batch = Batch(self.rows[numbers], numbers)
        if self.config.on_policy is None:
            return batch.part(mine)
        return with_own_rows(
            self.pupils.student, batch, self.config, step=step, seed=seed, mine=mine
        )

    def _backward(self, batch: Batch) -> float:
        """Gradients of this process's share of the batch; the loss of the whole batch."""
        device = self.pupils.student.device
        is_low = self.config.precision == "bfloat16"
        total = torch.zeros((), dtype=torch.float64, device=device)
        for part in batch.split(self.config.micro_batch_tokens):
            share = len(part) / self.config.batch_size
            with torch.autocast(device.type, torch.bfloat16, enabled=is_low):
                loss = self.objective.loss(part) * share
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return float(processes.add(self.accelerator, total))

    def _share_gradients(self) -> None:
        """Zero the gradients of pruned weights; add those of all processes."""
        for parameter in self.trained.values():
            if parameter.grad is None:  # an expert that no token of this process reached
                parameter.grad = torch.zeros_like(parameter)
        for slot in self.pupils.slots:
            if slot.keep is not None:
                _gradient(slot.parameter).mul_(slot.keep)
        if self.accelerator.num_processes > 1:
            parameters = [p for p in self.trained.values() if not is_sharded(p)]
            flat = torch.cat([_gradient(p).flatten() for p in parameters])
            flat = processes.add(self.accelerator, flat)
            parts = torch.split(flat, [p.numel() for p in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.grad = part.view_as(parameter)

    @torch.no_grad()
    def _zero_pruned(self) -> None:
        for slot in self.pupils.slots:
            if slot.keep is not None:
                slot.parameter.mul_(slot.keep)

    @torch.no_grad()
    def _validate(self) -> None:
        """Measure the student as it would be stored; keep it if it is the best so far."""
        mine = torch.arange(len(self.rows), len(self.tokens))
        is_shared = self.config.sharding == "none"  # else all processes run all blocks together
        if is_shared:
            mine = mine[self.accelerator.process_index :: self.accelerator.num_processes]
        sums = torch.zeros(3, dtype=torch.float64, device=self.pupils.student.device)
        with _as_stored(self.pupils.slots):
            for part in Batch(self.tokens[mine], mine).split(self.config.micro_batch_tokens):
                sums += self.objective.held_out_sums(part)
        count = self.held_out_count * self.tokens.shape[1]
        sums = processes.add(self.accelerator, sums) if is_shared else sums
        found = HeldOut(*(sums / count).tolist())
        progress = self.progress
        progress.validation.append([progress.step, found.kl])
        if found.kl < progress.best_kl:
            progress.best_step, progress.best_kl = progress.step, found.kl
            progress.best = {"acceptance": found.acceptance, "agreement": found.agreement}
            self.best = {slot.key: slot.stored() for slot in self.pupils.slots}

    def diverged(self, spike: Spike) -> NumericError:
        """The error when no retry is left."""
        progress = self.progress
        return NumericError(
            f"training diverged at step {spike.step + 1}: loss {spike.loss:g}, gradient norm "
            f"{spike.norm:g}",
            code="NU10",
            where=self.config.where("learning_rate"),
            why=f"It went back and on with half the rate {len(progress.spikes)} times. The state "
            f"after step {progress.step} is kept, and the best one (step {progress.best_step}, "
            f"held-out KL {progress.best_kl:.4g}).",
            fix=f"lower learning_rate (now {self.config.learning_rate:g}) or add warmup_steps",
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything that `restore` needs besides `progress`."""
        found = {f"best/{key}": t for key, t in self.best.items()}
        for key, parameter in self.trained.items():
            found[f"value/{key}"] = whole_tensor(parameter.detach())
            for name in MOMENTS:
                moment = self.optimizer.state[parameter].get(name)
                known = torch.zeros_like(parameter) if moment is None else moment
                found[f"{name}/{key}"] = whole_tensor(known)
        return found

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], progress: Progress) -> None:
        """Go on from a checkpoint."""
        self.progress = progress
        self.best = {slot.key: tensors[f"best/{slot.key}"] for slot in self.pupils.slots}
        for key, parameter in self.trained.items():
            parameter.copy_(shaped_like(tensors[f"value/{key}"], parameter))
            state: dict[str, Any] = {
                n: shaped_like(tensors[f"{n}/{key}"].clone(), parameter) for n in MOMENTS
            }
            state["step"] = torch.tensor(float(progress.step))
            if progress.step:
                self.optimizer.state[parameter] = state


def held_out_rows(count: int, config: DistillConfig) -> int:
    """How many of the last rows measure and teach nothing.

    Raises:
        DataError: there is only one row (CA03).
    """
    if count < 2:
        raise DataError(
            "distillation needs at least two rows: one of them measures and teaches nothing",
            code="CA03",
            where=config.where("data"),
            fix="raise data.num_samples",
        )
    return max(1, min(MAX_HELD_OUT, count // HELD_OUT_SHARE))


def _groups(slots: list[Slot], others: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameters by their rate; sharded ones apart, as the optimizer's loops do not mix them."""
    rates = {"scale": SCALE_RATE, "latent": LATENT_RATE, "adapter": ADAPTER_RATE}
    kinds: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, False): others}
    for slot in slots:
        kind = rates.get(slot.kind, 1.0), is_sharded(slot.parameter)
        kinds.setdefault(kind, []).append(slot.parameter)
    return [{"params": mine, "rate": rate} for (rate, _), mine in kinds.items() if mine]


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "filled by the caller"
    return parameter.grad


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


__all__ = ["SCALE_RATE", "Callbacks", "Progress", "Pupils", "Spike", "Training", "held_out_rows"]
