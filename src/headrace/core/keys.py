"""Block keys: the name of a full KV block is a hash of its tokens and of the key before it.

Two requests may share a block exactly when their keys are equal, so everything that changes the KV content (model,
format, adapter) and everything that must not be shared (tenant) goes into the salt the chain starts from.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from headrace.core.types import BlockKey

_KEY_BYTES = 16  # a collision would show one request another's memory: 2**-64 at four billion blocks


def first_key(salt: bytes) -> BlockKey:
    """The key that stands before the first block."""
    return int.from_bytes(blake2b(salt, digest_size=_KEY_BYTES, person=b"headrace").digest(), "little")


def next_key(previous: BlockKey, token_ids: Sequence[int]) -> BlockKey:
    """Key of the block that holds `token_ids` after the block named `previous`."""
    content = previous.to_bytes(_KEY_BYTES, "little") + array("q", token_ids).tobytes()
    return int.from_bytes(blake2b(content, digest_size=_KEY_BYTES).digest(), "little")


def block_keys(token_ids: Sequence[int], block_tokens: int, salt: bytes) -> tuple[BlockKey, ...]:
    """Keys of every full block of `token_ids`, in order; a partial last block has none."""
    keys: list[BlockKey] = []
    key = first_key(salt)
    for end in range(block_tokens, len(token_ids) + 1, block_tokens):
        key = next_key(key, token_ids[end - block_tokens : end])
        keys.append(key)
    return tuple(keys)
