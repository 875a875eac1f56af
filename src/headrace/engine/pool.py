"""Counts who holds each KV block, and decides which block is taken next: free ones first, then the cached one that is
worth least (`cached`). Owns the reference counts and both free lists; knows block ids only, never requests or tokens.
Which blocks have a name worth keeping is the prefix index's business: the pool asks it, and tells it of evictions.

         allocate                          release, has a key
  free ------------> held (references > 0) -------------------> cached, least recently released first
    ^                 |              ^                            |                   |
    '-----------------'              '------- share --------------'                   |
      release, no key                ^                                                |
                                     '------- allocate: evicted, its key forgotten ---'
"""

from __future__ import annotations

from collections.abc import Iterable

from headrace.core.step import Block
from headrace.engine.cached import Cached
from headrace.engine.prefix import PrefixIndex


class Pool:
    """`blocks` KV blocks with reference counts. Every operation is O(1) per block."""

    def __init__(self, blocks: int, index: PrefixIndex) -> None:
        self.blocks = blocks
        self.free = blocks  # blocks nobody holds; the cached ones among them still have content worth finding
        self._index = index
        self._references = [0] * blocks
        self._free = list(range(blocks - 1, -1, -1))  # a stack: low numbers first
        self._cached = Cached(blocks)

    @property
    def used(self) -> int:
        return self.blocks - self.free

    @property
    def cached(self) -> int:
        """Held by nobody, with content worth finding."""
        return len(self._cached)

    def free_for(self, owner: str) -> int:
        """Of the free blocks, those that no other owner's floor in the cache is made of."""
        return self.free - self._cached.kept(owner)

    def held(self, block: Block) -> bool:
        return self._references[block] > 0

    def only(self, blocks: Iterable[Block]) -> int:
        """How many of these have one holder."""
        references = self._references
        return sum(references[block] == 1 for block in blocks)

    def allocate(self) -> Block:
        """A block of its own for the caller, content undefined. Ask `free` first; raises IndexError when it is 0."""
        if self._free:
            block = self._free.pop()
        elif self._cached:
            block = self._cached.take()
            self._index.forget(block)
        else:
            raise IndexError("no block is free")
        self.free -= 1
        self._references[block] = 1
        return block

    def take(self, count: int) -> list[Block]:
        """What so many calls of `allocate` would return."""
        free = self._free
        if count > len(free):
            return [self.allocate() for _ in range(count)]
        taken = free[len(free) - count :]
        del free[len(free) - count :]
        self.free -= count
        taken.reverse()
        for block in taken:
            self._references[block] = 1
        return taken

    def share(self, block: Block) -> None:
        """One more holder of a block that is held or cached."""
        if not self._references[block]:
            self._cached.remove(block)
            self.free -= 1
        self._references[block] += 1

    def release(self, blocks: Iterable[Block], owner: str = "") -> None:
        """One holder less of each. Give a request's blocks last first: what is released first is evicted first, and a
        block is useless without those before it. `owner` is on whose account those that are worth keeping are kept."""
        references, named, free = self._references, self._index.holds, self._free.append
        kept: list[Block] = []
        for block in blocks:
            left = references[block] = references[block] - 1
            if not left:
                self.free += 1
                if named(block):
                    kept.append(block)
                else:
                    free(block)
        if kept:
            self._cached.add(kept, owner)

    def release_own(self, blocks: list[Block]) -> None:
        """As `release`, for blocks that have no name and no other holder; in the order given."""
        for block in blocks:
            self._references[block] = 0
        self._free += blocks
        self.free += len(blocks)

    def forget(self, block: Block) -> None:
        """The content of a block is not what its key says: nobody may find it any more."""
        self._index.forget(block)
        if block in self._cached:
            self._cached.remove(block)
            self._free.append(block)

    def check(self) -> None:
        """Every block is free, cached or held, exactly one of them; cached means unheld with a key."""
        free, cached = set(self._free), set(self._cached)
        self._cached.check()
        assert len(free) == len(self._free), "a block is free twice"
        assert self.free == len(free) + len(cached), "the count of free blocks is off"
        assert not free & cached, "a block is free and cached"
        assert all(count >= 0 for count in self._references), "a block was released more often than taken"
        unheld = {block for block, count in enumerate(self._references) if not count}
        assert unheld == free | cached, "a block is lost, or held and free"
        assert all(map(self._index.holds, cached)), "a cached block has no key"
        assert not any(map(self._index.holds, free)), "a free block has a key"

    def check_held(self, tables: Iterable[Iterable[Block]]) -> None:
        """The reference counts are exactly what these block tables hold."""
        counted = [0] * self.blocks
        for table in tables:
            for block in table:
                counted[block] += 1
        assert counted == self._references, "reference counts and block tables disagree"
