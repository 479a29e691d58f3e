"""The scheduler without a model: budgets, fairness, preemption, prefix hits, no leaked block."""

import random

import pytest

from compressor.serve.block_pool import BlockPool
from compressor.serve.scheduler import Scheduler
from compressor.serve.sequence import SamplingParams, Sequence


def make(num_blocks=16, *, budget=8, seqs=4, size=4, rows=256):
    pool = BlockPool(num_blocks, size)
    return Scheduler(pool, token_budget=budget, max_num_seqs=seqs, max_logit_rows=rows)


def request(name, length, *, first=0, **params):
    return Sequence(name, tuple(range(first, first + length)), SamplingParams(**params))


def run_step(scheduler, rng):
    """What the engine does, with random tokens."""
    items = scheduler.schedule()
    for item in items:
        scheduler.advance(item)
        rows = item.sequence.prompt_rows(item.start, item.stop)
        item.sequence.prompt_logprobs += [None] * len(rows)
        if item.samples:
            item.sequence.tokens.append(rng.randrange(5))
            if item.sequence.num_output >= item.sequence.params.max_tokens:
                scheduler.finish(item.sequence)
    scheduler.check()
    return items


def test_decodes_come_before_prefills():
    scheduler, rng = make(budget=4), random.Random(0)
    old = request("old", 2)
    scheduler.add(old)
    run_step(scheduler, rng)
    scheduler.add(request("new", 10, first=50))
    items = run_step(scheduler, rng)
    assert [(i.sequence.request_id, i.count) for i in items] == [("old", 1), ("new", 3)]


def test_no_step_is_larger_than_the_budget():
    scheduler, rng = make(budget=5), random.Random(0)
    for index in range(4):
        scheduler.add(request(str(index), 9, first=20 * index, max_tokens=3))
    while scheduler.has_work:
        assert 0 < sum(i.count for i in run_step(scheduler, rng)) <= 5


def test_a_full_prefix_hit_leaves_one_token_to_compute():
    scheduler, rng = make(), random.Random(0)
    scheduler.add(request("first", 8, max_tokens=1))
    run_step(scheduler, rng)
    scheduler.add(request("second", 8, max_tokens=1))
    (item,) = run_step(scheduler, rng)
    assert (item.start, item.count) == (4, 4)
    assert scheduler.stats.prefix_hits == 4


def test_the_youngest_is_preempted_and_finishes_later():
    scheduler, rng = make(num_blocks=6, budget=16, seqs=2), random.Random(0)
    old, young = request("old", 8, max_tokens=12), request("young", 8, first=40, max_tokens=12)
    scheduler.add(old)
    scheduler.add(young)
    finished = []
    for _ in range(60):
        finished += [i.sequence for i in run_step(scheduler, rng) if i.sequence.num_output == 12]
    assert finished == [old, young]
    assert scheduler.stats.num_preemptions > 0


def test_prompt_logprobs_limit_the_rows_of_a_step():
    scheduler, rng = make(budget=64, rows=6), random.Random(0)
    scheduler.add(request("echo", 20, max_tokens=1, prompt_logprobs=0))
    echo = scheduler.waiting[0]
    while echo.wants_prompt_logprobs:
        assert sum(i.count for i in run_step(scheduler, rng)) <= 6


def test_finishing_a_waiting_sequence_takes_it_out():
    scheduler = make(seqs=1)
    first, second = request("a", 4), request("b", 4)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.schedule()
    scheduler.finish(second)
    assert not scheduler.waiting
    scheduler.check()


@pytest.mark.parametrize("seed", range(20))
def test_random_traffic_ends_and_leaks_nothing(seed):
    rng = random.Random(seed)
    scheduler = make(rng.randrange(10, 20), budget=rng.randrange(4, 20), seqs=rng.randrange(1, 5))
    waiting = [
        request(
            str(i),
            rng.randrange(1, 20),
            first=rng.choice((0, 0, 30)),
            max_tokens=rng.randrange(1, 20),
            prompt_logprobs=rng.choice((None, None, 1)),
        )
        for i in range(15)
    ]
    for _ in range(2000):
        if waiting and rng.random() < 0.3:
            scheduler.add(waiting.pop())
        if rng.random() < 0.05 and (live := list(scheduler.live())):
            scheduler.finish(rng.choice(live))
            scheduler.check()
        run_step(scheduler, rng)
    assert not waiting
    assert not scheduler.has_work
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
