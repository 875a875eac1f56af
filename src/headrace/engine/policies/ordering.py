"""Who is next, by what the request itself says: arrival and priority. Keys that never change; see `fairness`,
`deadlines` and `groups` for orderings that look at others, at the clock or at what was served.
"""

from __future__ import annotations

from headrace.engine.policies.joints import RequestView

AGEING_S = 10.0  # how much earlier one level of priority makes a request look
PRIORITY_LEVELS = 100  # priorities beyond plus or minus this count as this


def fcfs(request: RequestView, now: float) -> float:
    """First come, first served. Preempted requests keep their place.

    The bound: nobody who arrives later goes first.
    """
    return request.request.arrival_s


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
