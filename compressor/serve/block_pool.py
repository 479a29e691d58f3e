"""Blocks of the key-value pool: who uses which, which are free, which hold a known prefix.

A block holds the keys and values of `block_size` consecutive tokens in every layer. A full block
can be published under the digest of all tokens up to its end; a later prompt that starts with the
same tokens takes it instead of computing it again. Free blocks stand in a queue, least recently
used first; a published block keeps its digest while it waits there and loses it when handed out.

Invariant (`check`): every block is either free or has exactly as many references as it has owners;
digest -> block is one to one.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Reference-counted blocks with a prefix index."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks in use, 0 to 1."""
        return 1.0 - self.num_free / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known prefix (not yet taken)."""
        found: list[int] = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_of(self, blocks: Iterable[int]) -> int:
        """How many of these blocks wait in the free queue."""
        return sum(block in self._free for block in blocks)

    def take(self, blocks: Iterable[int]) -> None:
        """Add one owner to each of these matched blocks."""
        for block in blocks:
            self._free.pop(block, None)
            self._references[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks of unknown content; None, and no change, when too few are free."""
        if count > self.num_free:
            return None
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
            self._forget(block)
        return blocks

    def publish(self, block: int, digest: bytes) -> None:
        """Make a full, computed block findable; the first block with a digest keeps it."""
        if self.prefix_cache and digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def release(self, blocks: Sequence[int]) -> None:
        """Take one owner away; the tail of a prefix is reused before its head."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._digest_of:
                    self._free.move_to_end(block, last=False)

    def forget_all(self) -> None:
        """Drop every known prefix (blocks in use stay in use)."""
        for block in list(self._digest_of):
            self._forget(block)

    def check(self, owners: Iterable[Sequence[int]]) -> None:
        """Assert the invariant against the block tables of all live sequences."""
        counts = Counter(block for table in owners for block in table)
        for block, references in enumerate(self._references):
            assert references == counts[block], f"block {block}: {references} != {counts[block]}"
            assert (references == 0) == (block in self._free), f"block {block} lost or used twice"
        assert len(self._block_of) == len(self._digest_of)
        for digest, block in self._block_of.items():
            assert self._digest_of[block] == digest

    def _forget(self, block: int) -> None:
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]
