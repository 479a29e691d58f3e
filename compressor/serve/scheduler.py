"""Which tokens run in the next step: continuous batching with one budget for decode and prefill.

There is one notion, the token. Each step has room for `max_num_batched_tokens` of them. First come
the sequences that need one token (decode, so nobody's stream stalls), then prefills under way, then
new ones in order of arrival, cut into chunks that fit (Sarathi-Serve, Agrawal et al. 2024, section
4). When blocks run out, the youngest running sequence gives its blocks back and is computed again
later (recompute preemption; vLLM, Kwon et al. 2023, section 4.5). No tensors here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from compressor.serve.block_pool import BlockPool
from compressor.serve.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Tokens `start .. start+count-1` of a sequence run in this step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.count

    @property
    def samples(self) -> bool:
        """True when the logits of the last token choose a new one."""
        return self.stop == len(self.sequence.tokens)


@dataclass(slots=True)
class SchedulerStats:
    """Counters since the start."""

    num_preemptions: int = 0
    prefix_queries: int = 0  # tokens looked up
    prefix_hits: int = 0  # tokens found


class Scheduler:
    """Waiting and running sequences over one block pool.

    Args:
        token_budget: tokens per step.
        max_num_seqs: sequences that run at once.
        cache_root: start of every digest chain; two models never share one.
        max_logit_rows: logit rows a step may ask for beside the sampled ones (prompt
            log-probabilities are wide: one row is the whole vocabulary).
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        token_budget: int,
        max_num_seqs: int,
        cache_root: bytes = b"",
        max_logit_rows: int = 256,
    ) -> None:
        self.pool = pool
        self.token_budget = token_budget
        self.max_num_seqs = max_num_seqs
        self.cache_root = cache_root
        self.max_logit_rows = max_logit_rows
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.stats = SchedulerStats()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def live(self) -> Iterator[Sequence]:
        """All unfinished sequences."""
        yield from self.running
        yield from self.waiting

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of this length can ever run."""
        return self.pool.blocks_for(num_tokens) <= self.pool.num_blocks

    def schedule(self) -> list[Scheduled]:
        """The next step's work; every scheduled token has a block."""
        step = _Step(self)
        decodes = [s for s in self.running if s.num_remaining == 1]
        prefills = [s for s in self.running if s.num_remaining > 1]
        for sequence in decodes + prefills:
            if step.budget > 0 and sequence not in step.preempted:
                step.grow(sequence)
        while not step.preempted and self.waiting and len(self.running) < self.max_num_seqs:
            if step.budget <= 0 or not self._admit(self.waiting[0]):
                break
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            if not step.grow(sequence):
                break
        return list(step.items.values())

    def advance(self, item: Scheduled) -> None:
        """The step ran: its keys and values are in the pool, full blocks may be shared."""
        sequence = item.sequence
        first = item.start // self.pool.block_size
        sequence.num_computed = item.stop
        full = item.stop // self.pool.block_size
        if self.pool.prefix_cache and full > first:
            digests = sequence.hashes_upto(full, self.pool.block_size, self.cache_root)
            for index in range(first, full):
                self.pool.publish(sequence.block_table[index], digests[index])

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out and free its blocks (finished, failed or aborted)."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._free(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Give the blocks back; the sequence waits first in line and is computed again."""
        self.running.remove(sequence)
        self._free(sequence)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self.stats.num_preemptions += 1

    def check(self) -> None:
        """Assert the pool's invariant and that nobody's blocks are too few."""
        self.pool.check(s.block_table for s in self.live())
        for sequence in self.live():
            assert len(sequence.block_table) >= self.pool.blocks_for(sequence.num_computed)
        assert not any(s.block_table for s in self.waiting)

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        sequence.block_table = []

    def _admit(self, sequence: Sequence) -> bool:
        """Start a waiting sequence from the longest known prefix, if all of it fits now."""
        size = self.pool.block_size
        hit: list[int] = []
        if self.pool.prefix_cache and not sequence.wants_prompt_logprobs:
            # One query token must remain, so the hit ends before the last token.
            limit = (len(sequence.tokens) - 1) // size
            hit = self.pool.match(sequence.hashes_upto(limit, size, self.cache_root))
        new = self.pool.blocks_for(len(sequence.tokens)) - len(hit)
        if new + self.pool.num_free_of(hit) > self.pool.num_free:
            return False
        self.pool.take(hit)
        sequence.block_table = hit
        sequence.num_computed = len(hit) * size
        if sequence.first_scheduled is None:
            sequence.num_cached = sequence.num_computed
            sequence.first_scheduled = time.monotonic()
        self.stats.prefix_queries += len(sequence.tokens)
        self.stats.prefix_hits += sequence.num_computed
        return True


class _Step:
    """One step under construction: what is in it, what is left of the budgets, who fell out."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.budget = scheduler.token_budget
        self.rows = scheduler.max_logit_rows
        self.items: dict[str, Scheduled] = {}
        self.preempted: set[Sequence] = set()

    def grow(self, sequence: Sequence) -> bool:
        """Schedule the next tokens of a running sequence; False when it had to be preempted."""
        start = sequence.num_computed
        count = min(sequence.num_remaining, self.budget)
        if sequence.wants_prompt_logprobs:
            count = min(count, self.rows)
        if count == 0:
            return True
        if not self._reserve(sequence, start + count):
            return False
        self.items[sequence.request_id] = Scheduled(sequence, start, count)
        self.budget -= count
        self.rows -= len(sequence.prompt_rows(start, start + count))
        return True

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        pool = self.scheduler.pool
        missing = pool.blocks_for(num_tokens) - len(sequence.block_table)
        while missing > 0:
            blocks = pool.allocate(missing)
            if blocks is not None:
                sequence.block_table.extend(blocks)
                break
            victim = self.scheduler.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.preempted.add(victim)
        self.scheduler.preempt(victim)
        item = self.items.pop(victim.request_id, None)
        if item is not None:
            self.budget += item.count
            self.rows += len(victim.prompt_rows(item.start, item.stop))
