"""Which cached block goes next when one is needed: the one that was released longest ago, unless it is all that its
owner has. So who floods the cache evicts its own blocks, and whoever comes back finds what it had. Owns the order and
the owners' counts; knows block ids and owners' names only.

    oldest  [ a b a a b a a a a ]  youngest        with a share of two blocks each, all of b's are kept:
                                                   another round for each that is met, and the oldest of a's goes
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from headrace.core.step import Block

KEPT = 8  # one part in so many of the memory is divided among the owners
TURNS = 4  # how often the memory may have been filled since an owner used the cache until it has no share any more


class Cached:
    """Of `blocks` blocks, those that nobody holds and that are worth finding. Adding and removing are O(1) per block;
    so is taking, but for one more round of each block that is spared (CLOCK's second chance).

    The floor: an owner who adds something before others have added TURNS * `blocks` keeps a share, the same for all
    who do, however much others add. Blocks kept for others are no reason to start a request (`kept`), but whoever runs
    may take them when there is nothing else."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._owners: OrderedDict[Block, str] = OrderedDict()  # the oldest first
        self._counts: dict[str, int] = {}
        self._lately: OrderedDict[str, int] = OrderedDict()  # who added when, counted in blocks that anybody added
        self._added = 0

    def __len__(self) -> int:
        return len(self._owners)

    def __contains__(self, block: Block) -> bool:
        return block in self._owners

    def __iter__(self) -> Iterator[Block]:
        return iter(self._owners)

    def add(self, blocks: Sequence[Block], owner: str) -> None:
        """As the youngest, in this order."""
        for block in blocks:
            self._owners[block] = owner
        self._counts[owner] = self._counts.get(owner, 0) + len(blocks)
        self._added += len(blocks)
        self._lately[owner] = self._added
        self._lately.move_to_end(owner)
        while next(iter(self._lately.values())) <= self._added - TURNS * self._blocks:
            self._lately.popitem(last=False)

    def remove(self, block: Block) -> None:
        self._less(self._owners.pop(block))

    def take(self) -> Block:
        """The block that is worth least; raises KeyError if there is none."""
        share, spares = self._share, self.kept() < len(self._owners)
        while True:
            block, owner = self._owners.popitem(last=False)
            if not spares or owner not in self._lately or self._counts[owner] > share:
                self._less(owner)
                return block
            self._owners[block] = owner

    def kept(self, but: str | None = None) -> int:
        """How many blocks are all that their owners have, those of one owner not counted. O(owners)."""
        share, counts = self._share, self._counts
        return sum(min(counts.get(owner, 0), share) for owner in self._lately if owner != but)

    @property
    def _share(self) -> int:
        return self._blocks // (KEPT * max(1, len(self._lately)))

    def check(self) -> None:
        counts: dict[str, int] = {}
        for owner in self._owners.values():
            counts[owner] = counts.get(owner, 0) + 1
        assert counts == self._counts, "the owners' counts are off"

    def _less(self, owner: str) -> None:
        self._counts[owner] -= 1
        if not self._counts[owner]:
            del self._counts[owner]
