"""What a step of distillation minimises, and what is measured on held-out rows.

    loss = (1 - c) divergence(teacher, student) + c CE + h MSE(hidden) + a relations(q, k, v)

Divergence and CE are means over tokens, taken from the heads a chunk of tokens at a time; a token
that the batch does not count adds nothing. The teacher is asked (`teacher`), or was asked before
(`TeacherCache`). Hidden states of each block of the student are compared with those of the
teacher's block it stands for, through a learned matrix where widths differ; relations of queries,
keys and values with those of the last block. Neither is part of what is stored.

Legend: B rows in a batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.algorithms.distillation import (
    Divergence,
    attention_relation,
    chunked_sum,
    hidden_mse,
    token_cross_entropy,
)
from compressor.algorithms.divergence import kl_tokens, top1_agreement
from compressor.algorithms.sparse_logits import Target, token_losses, top_k
from compressor.modeling.whole import Slot, WholeModel
from compressor.recipe import DistillConfig
from compressor.stages.teacher_cache import TeacherCache

CPU_CHUNK, CHUNK = 1 << 22, 1 << 25  # logits at once: 16 MB in fp32, which malloc keeps for reuse
LEAST_TOKENS = 128  # at once: each chunk costs a sum of two gradients of the head

Teach = Callable[[slice], Target]


@dataclass(frozen=True, slots=True)
class Pupils:
    """Teacher and student in memory, what of the student learns, and which blocks correspond.

    pairs: for each block of the student the teacher's block with the output it should match.
    """

    teacher: WholeModel
    student: WholeModel
    slots: list[Slot]
    pairs: list[int]


@dataclass(frozen=True, slots=True)
class Batch:
    """tokens int64 [B, T]; numbers [B] of the training rows; counted: bool [B, T], None = all."""

    tokens: Tensor
    numbers: Tensor
    counted: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, rows: slice) -> Batch:
        """Some of the rows."""
        counted = None if self.counted is None else self.counted[rows]
        return Batch(self.tokens[rows], self.numbers[rows], counted)

    def split(self, tokens: int) -> Iterator[Batch]:
        """Parts of at most so many tokens, at least one row each."""
        size = max(1, tokens // self.tokens.shape[1])
        return (self.part(slice(i, i + size)) for i in range(0, len(self), size))


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Means over held-out tokens. acceptance: of drafts sampled from the student, 1 - |p - q| / 2;
    agreement: of greedy drafts."""

    kl: float
    acceptance: float
    agreement: float


class Objective:
    """The loss of a batch, and the parameters it needs besides the student's."""

    def __init__(
        self, config: DistillConfig, pupils: Pupils, *, cache: TeacherCache | None, seed: int
    ) -> None:
        self.config, self.pupils, self.cache = config, pupils, cache
        self.divergence = Divergence(config.loss, config.beta, config.temperature)
        self.projections = _projections(config, pupils, seed)
        self.device = pupils.student.device
        vocabulary = pupils.student.skeleton.model.config.get_text_config().vocab_size
        numbers = CPU_CHUNK if self.device.type == "cpu" else CHUNK
        self.tokens_per_chunk = max(LEAST_TOKENS, numbers // vocabulary)

    def loss(self, batch: Batch) -> Tensor:
        """Scalar, with a graph."""
        config, student, pairs = self.config, self.pupils.student, self.pupils.pairs
        relates, compares = config.attention_weight > 0, config.hidden_weight > 0
        with ExitStack() as stack:
            seen = stack.enter_context(student.projections(-1)) if relates else {}
            states = student.hidden_states(
                batch.tokens,
                wanted=range(len(pairs)) if compares else (-1,),
                grad=True,
                recompute=config.gradient_checkpointing,
            )
        teach, theirs, known = self._ask_teacher(batch)
        loss = self._of_heads(states[-1].flatten(0, 1), batch, teach)
        if compares:
            pairings = zip(self._projected(states), theirs, strict=True)
            parts = [hidden_mse(mine, wanted) for mine, wanted in pairings]
            loss = loss + config.hidden_weight * torch.stack(parts).mean()
        if relates:
            loss = loss + config.attention_weight * _relations(seen, known, self._most_heads())
        return loss

    def _ask_teacher(self, batch: Batch) -> tuple[Teach, list[Tensor], dict[str, Tensor]]:
        """Targets by rows of tokens, hidden states to compare, q, k and v of the last block."""
        if self.cache is not None:
            target = self.cache.read(batch.numbers, self.device)
            return lambda rows: target[rows], [], {}
        config, teacher = self.config, self.pupils.teacher
        wanted = self.pupils.pairs if config.hidden_weight > 0 else []
        with ExitStack() as stack:
            relates = config.attention_weight > 0
            seen = stack.enter_context(teacher.projections(-1)) if relates else {}
            *states, last = teacher.hidden_states(batch.tokens, wanted=[*wanted, -1])
        hidden = last.flatten(0, 1)

        def teach(rows: slice) -> Target:
            with torch.no_grad():
                logits = teacher.head(hidden[rows])
                if config.teacher.targets == "full":
                    return logits
                return top_k(logits, config.teacher.count, self.divergence)

        return teach, states, seen

    def _of_heads(self, hidden: Tensor, batch: Batch, teach: Teach) -> Tensor:
        """Divergence and cross-entropy of hidden states [BT, D]."""
        student, part_of_ce = self.pupils.student, self.config.ce_weight
        tokens = batch.tokens.to(self.device)
        counted = torch.ones_like(tokens) if batch.counted is None else batch.counted
        weights = counted.to(self.device, hidden.dtype).flatten() / tokens.numel()
        following = tokens.roll(-1, dims=1).flatten()
        follows = torch.ones_like(tokens, dtype=hidden.dtype)
        follows[:, -1] = 0  # the last token of a row is followed by nothing
        follows = follows.flatten() / follows.sum().clamp(min=1)

        def loss_of(part: Tensor, rows: slice) -> Tensor:
            logits = student.head(part)
            losses = token_losses(logits, teach(rows), self.divergence)
            loss = (1 - part_of_ce) * (losses * weights[rows]).sum()
            if part_of_ce:
                losses = token_cross_entropy(logits, following[rows])
                loss = loss + part_of_ce * (losses * follows[rows]).sum()
            return loss

        return chunked_sum(
            loss_of,
            hidden,
            shared=student.head_parameters(),
            tokens_per_chunk=self.tokens_per_chunk,
        )

    def _projected(self, states: list[Tensor]) -> list[Tensor]:
        if not self.projections:
            return states
        return [s @ self.projections[f"projection/{i}"] for i, s in enumerate(states)]

    def _most_heads(self) -> int:
        config = self.pupils.student.skeleton.model.config.get_text_config()
        return int(config.num_attention_heads)

    @torch.no_grad()
    def held_out_sums(self, batch: Batch) -> Tensor:
        """Sums over the tokens of a batch: KL at temperature 1, accepted drafts, agreement [3]."""
        student, teacher = self.pupils.student, self.pupils.teacher
        seen = student.hidden_states(batch.tokens)[0].flatten(0, 1)
        if self.cache is not None:
            wanted = self.cache.held_out(batch.numbers, self.device).flatten(0, 1)
        else:
            wanted = teacher.hidden_states(batch.tokens)[0].flatten(0, 1)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        parts = (torch.split(x, self.tokens_per_chunk) for x in (seen, wanted))
        for mine, theirs in zip(*parts, strict=True):
            z, t = student.head(mine), teacher.head(theirs)
            accepted = 1 - Divergence("total_variation").of_logits(z, t)
            found = kl_tokens(t, z), accepted, top1_agreement(t, z)
            sums += torch.stack([x.double().sum() for x in found])
        return sums


def _projections(config: DistillConfig, pupils: Pupils, seed: int) -> dict[str, nn.Parameter]:
    """Matrices [D of the student, D of the teacher] where widths differ, orthogonal at first."""
    sizes = [
        model.skeleton.model.config.get_text_config().hidden_size
        for model in (pupils.student, pupils.teacher)
    ]
    if config.hidden_weight == 0 or sizes[0] == sizes[1]:
        return {}
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for i in range(len(pupils.pairs)):
        matrix = nn.init.orthogonal_(torch.empty(sizes), generator=generator)
        found[f"projection/{i}"] = nn.Parameter(matrix.to(pupils.student.device))
    return found


def _relations(student: dict[str, Tensor], teacher: dict[str, Tensor], most: int) -> Tensor:
    """Mean over q, k and v, each cut into as many slices as fit both widths, at most `most`."""
    parts = []
    for name, mine in student.items():
        widths = mine.shape[-1], teacher[name].shape[-1]
        heads = max(r for r in range(1, most + 1) if not any(w % r for w in widths))
        parts.append(attention_relation(mine, teacher[name], heads=heads))
    return torch.stack(parts).mean()
