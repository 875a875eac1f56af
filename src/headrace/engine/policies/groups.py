"""Offline batches with common prefixes: requests that share one run one after the other, so that it is computed once
and stays in memory just as long as it is needed. Owns the grouping of the batch that waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from headrace.core.config import EngineSettings
from headrace.core.events import Event, Finished
from headrace.core.types import BlockKey, RequestId
from headrace.engine.policies.joints import RequestView

_RANKS = 1 << 32  # of one batch


class PrefixGroups:
    """BatchLLM's global prefix groups (Zheng et al., MLSys 2026): all who wait form a batch; requests with the same
    prefix form a group, groups run one after the other, decode-heavy ones first, so that later prompts ride along with
    long decodes: by sum of output tokens / sum of prompt tokens with the prefix counted once, descending.

    Use it with the admission `conservative` or `past-future` and a large `max_running`: that is its memory-centric
    batching. Who arrives later waits for the next batch, which is formed when nobody of this one waits any more.

    The bound: nobody overtakes a whole batch. Within one, there is none but its end.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._block_tokens = settings.block_tokens
        self._batch = 0
        self._keys: dict[RequestId, int] = {}

    def observe(self, event: Event) -> None:
        if isinstance(event, Finished):
            self._keys.pop(event.request_id, None)

    def survey(self, requests: Sequence[RequestView], now: float) -> None:
        waiting = [one for one in requests if not one.running]
        if waiting and not any(one.request.id in self._keys for one in waiting):
            self._batch += 1
            for at, one in enumerate(_ranked(waiting, self._block_tokens)):
                self._keys[one.request.id] = self._batch * _RANKS + at

    def __call__(self, request: RequestView, now: float) -> float:
        return self._keys.get(request.request.id, (self._batch + 1) * _RANKS)


def _ranked(requests: Sequence[RequestView], block_tokens: int) -> list[RequestView]:
    """Group after group, each in the given order."""
    chosen = prefix_groups({one.request.id: one.request.block_keys for one in requests})
    groups: dict[BlockKey | RequestId, list[RequestView]] = {}
    for one in requests:
        key, _ = chosen.get(one.request.id, (one.request.id, 0))
        groups.setdefault(key, []).append(one)
    tokens = {one.request.id: one.prompt_tokens for one in requests}

    def decode_share(members: Sequence[RequestView]) -> float:
        _, blocks = chosen.get(members[0].request.id, (None, 0))
        prompt = sum(tokens[one.request.id] for one in members) - (len(members) - 1) * blocks * block_tokens
        return sum(one.limit_tokens - one.prompt_tokens for one in members) / max(prompt, 1)

    return [one for members in sorted(groups.values(), key=decode_share, reverse=True) for one in members]


def prefix_groups(chains: Mapping[RequestId, Sequence[BlockKey]]) -> dict[RequestId, tuple[BlockKey, int]]:
    """One prefix for each request that shares one: (its last key, its blocks), such that most blocks are saved.

    A key names everything before it, so the chains are a tree of keys. To take a node n as one group saves
    (requests below n - 1) * depth(n) blocks; otherwise its children are groups of their own. The better of the two,
    from the leaves to the root, in one pass over the keys (MaximizeReuse).
    """
    count = Counter(key for chain in chains.values() for key in chain)
    depth: dict[BlockKey, int] = {}
    parent: dict[BlockKey, BlockKey | None] = {}
    for chain in chains.values():
        for at, key in enumerate(chain):
            depth[key], parent[key] = at + 1, chain[at - 1] if at else None
    below: Counter[BlockKey | None] = Counter()  # blocks that the children save
    taken = set()
    for key in sorted(depth, key=depth.__getitem__, reverse=True):
        alone = (count[key] - 1) * depth[key]
        if alone >= max(below[key], 1):
            taken.add(key)
        below[parent[key]] += max(alone, below[key])
    first = {name: next((key for key in chain if key in taken), None) for name, chain in chains.items()}
    return {name: (key, depth[key]) for name, key in first.items() if key is not None}
