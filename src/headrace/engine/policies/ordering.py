"""Who is next, by what the request itself says: arrival and priority. Keys that never change; see `fairness`,
`deadlines` and `groups` for orderings that look at others, at the clock or at what was served.
"""

from __future__ import annotations

from headrace.engine.policies.joints import RequestView

AGEING_S = 10.0  # how much earlier one level of priority makes a request look
AGEING_TOKENS_PER_S = 1000.0  # how much shorter a prompt looks for each second that it waits
PRIORITY_LEVELS = 100  # priorities beyond plus or minus this count as this


_AFTER_ALL_S = 1e12  # later than anybody ever arrives


def fcfs(request: RequestView, now: float) -> float:
    """First come, first served. Preempted requests keep their place. Filler comes after all others.

    The bound: nobody who arrives later goes first.
    """
    return request.request.arrival_s + _AFTER_ALL_S * is_filler(request)


def is_filler(request: RequestView) -> bool:
    """Whether it is of the lowest priority level: work that nobody waits for, such as a batch."""
    return level(request) == -PRIORITY_LEVELS


def level(request: RequestView) -> int:
    """Its priority within the levels there are."""
    return max(-PRIORITY_LEVELS, min(PRIORITY_LEVELS, request.request.priority))


def priority(request: RequestView, now: float) -> float:
    """Larger priority first, then arrival; waiting makes up for priority at one level per AGEING_S seconds.

    Effective priority grows as p + waited / AGEING_S, and between two requests the clock cancels out, so the order is
    fixed at arrival. The bound: nobody who arrives more than (q - p) * AGEING_S later with priority q goes first, so at
    most 2 * PRIORITY_LEVELS * AGEING_S seconds of later arrivals ever overtake a request.
    """
    return request.request.arrival_s - level(request) * AGEING_S


def shortest_prompt(request: RequestView, now: float) -> float:
    """The shortest prompt first, with ageing (Nexus's queue, arXiv:2507.06608): prompt - waited * AGEING_TOKENS_PER_S,
    where the clock cancels out as in `priority`, so the order is fixed at arrival. The rate is chosen here.

    The bound: nobody overtakes who arrives more than prompt tokens / AGEING_TOKENS_PER_S seconds later.
    """
    return request.request.arrival_s + request.prompt_tokens / AGEING_TOKENS_PER_S
