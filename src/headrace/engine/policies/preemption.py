"""Who yields: to a running request that finds no block, or to a waiting one that may not start. What it has computed is
computed again, or copied back if the replica has a host tier (see `engine.tiers`).
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.engine.policies.joints import RequestView
from headrace.engine.policies.ordering import level

MOST_PREEMPTIONS = 3  # how often a request may have yielded and still be asked to yield to one that waits


def last_arrived(behind: Sequence[RequestView], needy: RequestView) -> RequestView | None:
    """The last in the ordering, to a running request only: who waits, waits until somebody has finished (vLLM)."""
    return behind[-1] if needy.running else None


def lower_level(behind: Sequence[RequestView], needy: RequestView) -> RequestView | None:
    """The last in the ordering; for one that waits, the last of those with less priority that have not yielded
    MOST_PREEMPTIONS times. With the ordering `priority` this is a priority that really preempts.

    The bounds: `behind` holds only those whom the needy precedes, which with ageing is only for so long (see
    `ordering.priority`), and work is thrown away for waiting requests at most MOST_PREEMPTIONS times per request.
    """
    if needy.running:
        return behind[-1]
    yielding = (one for one in reversed(behind) if level(one) < level(needy) and one.preemptions < MOST_PREEMPTIONS)
    return next(yielding, None)


def swap(behind: Sequence[RequestView], needy: RequestView) -> RequestView | None:
    """The last in the ordering, to whoever precedes it (FastSwitch): with priorities that change, the best that fit run
    and the others wait with their KV on the host. Without a host tier each switch is computed again.

    The bound: who waits is bounded as its ordering says. A request yields to waiting ones at most MOST_PREEMPTIONS
    times more than it drew tokens, so however priorities change, everybody comes to an end.
    """
    if needy.running:
        return behind[-1]
    drawn = ((one, one.known_tokens - one.prompt_tokens) for one in reversed(behind))
    return next((one for one, tokens in drawn if one.preemptions < MOST_PREEMPTIONS + tokens), None)
