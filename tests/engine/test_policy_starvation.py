"""Nobody starves: under a flood that an ordering prefers, and that never ends, a request is served within the bound
that the ordering states. Most floods do delay it, so that the bound is what ends its wait. Filler, the lowest priority
level, is work that nobody waits for: it has no bound, and its tests are those of the batch policies.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from engine_rig import Rig, make_request

from headrace.core.types import SLO, FinishReason, Overloaded
from headrace.engine.policies.deadlines import LONGEST_S, PATIENCE_S
from headrace.engine.policies.switching import LEVELS
from headrace.engine.policy import AGEING_S, ORDERINGS, PREEMPTIONS, PRIORITY_LEVELS

STEP_S = 2.0  # of the rig
HASTY = {"slo": SLO(ttft_s=0.5)}
DUE_S = LONGEST_S + 2 * PATIENCE_S
BOUND_S: dict[str, float] = {  # of later arrivals that may overtake
    "fcfs": 0.0,
    "priority": 2 * PRIORITY_LEVELS * AGEING_S,
    "shortest-prompt": 1.0,  # its prompt over AGEING_TOKENS_PER_S
    "vtc": 200.0,  # in tokens: 2 * max(prompt, 2 * memory) = 128 here, at two and more tokens a second
    "drr": 200.0,  # one round: a quantum of 512 tokens and a request
    "edd": LONGEST_S,
    "eddc": DUE_S,
    "mdd": DUE_S,
    "mddc": DUE_S,
    "urgency": DUE_S,
    "prefix-groups": 0.0,
    "random": LEVELS * AGEING_S,
    "markov": LEVELS * AGEING_S,
}
DELAYED = {"priority", "edd", "eddc", "mdd", "mddc", "urgency"}  # by this flood, for long


def wait_s(ordering: str, preemption: str = "last-arrived") -> float:
    """How long a request with nothing to hurry for waits, one place for all, with newcomers in every step."""
    rig = Rig(16, 8, ordering=ordering, preemption=preemption, max_running=1, max_queue_requests=12, context=40)
    rig.add(make_request("first", [1] * 4, 2, tenant="a", arrival_s=0.0))
    rig.step()
    rig.add(make_request("victim", [2] * 4, 30, tenant="b", priority=1 - PRIORITY_LEVELS, arrival_s=rig.now))
    begun_s = rig.now
    for number in range(int(1.1 * max(BOUND_S.values()) / STEP_S)):
        if rig.tokens("victim"):
            break
        more: dict[str, Any] = {"priority": PRIORITY_LEVELS, "tenant": "a", "arrival_s": rig.now, **HASTY}
        with suppress(Overloaded):
            rig.add(make_request(str(number), [3] * 4, 1, **more))
        rig.step()
    assert rig.tokens("victim"), f"{ordering} starves"
    waited_s = rig.now - begun_s
    rig.drain()
    assert rig.finish("victim") is FinishReason.LENGTH
    return waited_s


def test_every_ordering_states_its_bound() -> None:
    assert BOUND_S.keys() == ORDERINGS.keys()


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_nobody_waits_beyond_the_bound(ordering: str) -> None:
    waited_s = wait_s(ordering)
    assert waited_s <= BOUND_S[ordering] + 20 * STEP_S  # the queue in front of it is served, too
    assert (waited_s > 300.0) == (ordering in DELAYED)


@pytest.mark.parametrize("preemption", PREEMPTIONS)
def test_a_priority_that_preempts_keeps_the_same_bound(preemption: str) -> None:
    assert 1900.0 < wait_s("priority", preemption) <= BOUND_S["priority"] + 20 * STEP_S
