"""Whether a waiting request may start, by the memory that is free now or that is reserved for the worst case; see
`future` for admission by predicted memory.
"""

from __future__ import annotations

from headrace.engine.policies.joints import PoolView, RequestView

WATERMARK = 0.01  # share of all blocks that admission leaves free, so that running requests can grow


def free_blocks(request: RequestView, pool: PoolView) -> bool:
    """All known tokens must fit into what is free, beside what is promised and the watermark (vLLM, 1 %)."""
    watermark = WATERMARK * pool.total_blocks
    missing = pool.blocks_for(request.known_tokens) - request.cached_blocks
    return missing + pool.promised_blocks + watermark <= pool.free_blocks


def reserve_all(request: RequestView, pool: PoolView) -> bool:
    """The longest it may become must fit beside the longest all others may become, so nobody is ever preempted (Orca).
    The last token drawn is never computed and needs no place."""
    return pool.blocks_for(request.limit_tokens - 1) + pool.reserved_blocks <= pool.total_blocks
