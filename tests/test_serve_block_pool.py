"""The block pool: references, the free queue, the prefix index."""

import random

import pytest

from compressor.serve.block_pool import BlockPool


def test_allocating_more_than_is_free_changes_nothing():
    pool = BlockPool(3, 4)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    pool.check([])


def test_a_published_block_is_found_until_it_is_handed_out_again():
    pool = BlockPool(2, 4)
    blocks = pool.allocate(1)
    pool.publish(blocks[0], b"a")
    pool.release(blocks)
    assert pool.match([b"a", b"b"]) == blocks
    pool.allocate(2)
    assert pool.match([b"a"]) == []


def test_unpublished_free_blocks_are_used_before_known_prefixes():
    pool = BlockPool(3, 4)
    known, other = pool.allocate(1), pool.allocate(2)
    pool.publish(known[0], b"a")
    pool.release(known)
    pool.release(other)
    pool.allocate(2)
    assert pool.match([b"a"]) == known


def test_the_tail_of_a_prefix_is_evicted_before_its_head():
    pool = BlockPool(2, 4)
    blocks = pool.allocate(2)
    for block, digest in zip(blocks, (b"head", b"tail"), strict=True):
        pool.publish(block, digest)
    pool.release(blocks)
    pool.allocate(1)
    assert pool.match([b"head", b"tail"]) == blocks[:1]


def test_check_finds_a_lost_block():
    pool = BlockPool(2, 4)
    pool.allocate(1)
    with pytest.raises(AssertionError):
        pool.check([])


def test_random_traffic_keeps_the_invariant():
    rng, pool, tables = random.Random(0), BlockPool(8, 4), []
    for _ in range(500):
        hit = pool.match([bytes([rng.randrange(4)])])
        action = rng.random()
        if action < 0.4 and (new := pool.allocate(rng.randrange(1, 4))) is not None:
            tables.append(new)
            pool.publish(new[0], bytes([rng.randrange(4)]))
        elif action < 0.6 and hit:
            pool.take(hit)
            tables.append(hit)
        elif tables:
            pool.release(tables.pop(rng.randrange(len(tables))))
        pool.check(tables)
