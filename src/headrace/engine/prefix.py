"""Finds the block that holds a given content: block key -> block. A key names a block's tokens and all before them
(`core.keys`), so a run of matching keys is a shared prefix. Owns the two-way map; knows no requests, no tokens and no
reference counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.core.step import Block
from headrace.core.types import BlockKey


class PrefixIndex:
    """A key names at most one block, and a block has at most one key."""

    def __init__(self) -> None:
        self._block: dict[BlockKey, Block] = {}
        self._key: dict[Block, BlockKey] = {}

    def __len__(self) -> int:
        return len(self._block)

    def match(self, keys: Sequence[BlockKey], first: int, last: int) -> list[Block]:
        """The blocks of the longest run of known keys that starts at keys[first] and ends before keys[last]."""
        find, run = self._block.get, []
        for at in range(first, min(last, len(keys))):
            block = find(keys[at])
            if block is None:
                break
            run.append(block)
        return run

    def insert(self, key: BlockKey, block: Block) -> bool:
        """Name a block. False if another block already has that name: the newcomer stays private."""
        if key in self._block:
            return False
        assert block not in self._key, "a block cannot have two keys"
        self._block[key] = block
        self._key[block] = key
        return True

    def find(self, key: BlockKey) -> Block | None:
        return self._block.get(key)

    def holds(self, block: Block) -> bool:
        return block in self._key

    def forget(self, block: Block) -> None:
        """A block without a key is none of our business."""
        key = self._key.pop(block, None)
        if key is not None:
            del self._block[key]

    def check(self) -> None:
        assert {block: key for key, block in self._block.items()} == self._key, "the two directions disagree"
