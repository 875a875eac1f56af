"""Ordering x Admission x BatchFormer x Preemption: who is next, who may start, what a step computes, who yields. And
Drafter x SpecController: what may be drawn next, and how much of that is worth computing.

The dicts name the policies there are, and a third party passes its own instead of a name. Policies choose, the
scheduler guarantees: whatever they say, blocks are never overdrawn, nobody is planned twice in a step, and the first
request in the ordering progresses. `policies.joints` says what they see, docs/write-a-policy.md how to write one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from headrace.core.config import EngineSettings
from headrace.core.events import Event
from headrace.core.types import HeadraceError, RequestId
from headrace.engine.policies.admission import WATERMARK, free_blocks, reserve_all
from headrace.engine.policies.batch import chunked, filling, layered, orca, prefill_first, splitfuse, static
from headrace.engine.policies.budget import StepBudget
from headrace.engine.policies.deadlines import Due, edd, eddc, mdd, mddc, slack
from headrace.engine.policies.fairness import DeficitRoundRobin, TokenCounter
from headrace.engine.policies.future import FuturePeak, Oracle, PastFuture, aggressive, conservative
from headrace.engine.policies.goodput import Always, Goodput, no_drafts
from headrace.engine.policies.groups import PrefixGroups
from headrace.engine.policies.joints import (
    Admission,
    BatchFormer,
    BatchView,
    Draft,
    Drafter,
    DraftView,
    Ordering,
    PoolView,
    Preemption,
    RequestView,
    Share,
    SpecController,
)
from headrace.engine.policies.lanes import LANES, Predict, SharePolicy
from headrace.engine.policies.lookup import Lookup
from headrace.engine.policies.ordering import AGEING_S, PRIORITY_LEVELS, fcfs, is_filler, priority, shortest_prompt
from headrace.engine.policies.preemption import MOST_PREEMPTIONS, last_arrived, lower_level, swap
from headrace.engine.policies.switching import PriorityTrace, markov_priority, random_priority

__all__ = [
    "ADMISSIONS",
    "AGEING_S",
    "BATCHES",
    "CONTROLLERS",
    "DRAFTERS",
    "LANES",
    "LANE_STEP_TOKENS",
    "LEAST_STEP_TOKENS",
    "MOST_PREEMPTIONS",
    "MOST_STEP_TOKENS",
    "ORACLE",
    "ORDERINGS",
    "PREEMPTIONS",
    "PRIORITY_LEVELS",
    "WATERMARK",
    "Admission",
    "Always",
    "BatchFormer",
    "BatchView",
    "DeficitRoundRobin",
    "Draft",
    "DraftView",
    "Drafter",
    "Due",
    "FuturePeak",
    "Goodput",
    "Lookup",
    "Oracle",
    "Ordering",
    "PastFuture",
    "Policies",
    "PoolView",
    "Preemption",
    "PrefixGroups",
    "PriorityTrace",
    "RequestView",
    "Share",
    "SpecController",
    "StepBudget",
    "TokenCounter",
    "aggressive",
    "choose",
    "chunked",
    "conservative",
    "edd",
    "eddc",
    "fcfs",
    "filling",
    "free_blocks",
    "is_filler",
    "last_arrived",
    "layered",
    "lower_level",
    "mdd",
    "mddc",
    "orca",
    "prefill_first",
    "priority",
    "reserve_all",
    "shortest_prompt",
    "slack",
    "splitfuse",
    "static",
    "swap",
    "token_budget",
]

LANE_STEP_TOKENS = 8192  # where nobody's next token waits for prompts
LEAST_STEP_TOKENS = 128  # a device too slow for the target still shares each pass over the weights among so many

MOST_STEP_TOKENS = 2048  # that a live replica has memory for, whatever the target allows

P = TypeVar("P")
Make = Callable[[EngineSettings], P]  # a policy for one scheduler


def _just(policy: P) -> Make[P]:
    """Of one that remembers nothing, all schedulers may have the same."""
    return lambda settings: policy


ORDERINGS: Mapping[str, Make[Ordering]] = {
    "fcfs": _just(fcfs),
    "priority": _just(priority),
    "shortest-prompt": _just(shortest_prompt),
    "vtc": TokenCounter,
    "drr": DeficitRoundRobin,
    "edd": _just(edd),
    "eddc": partial(Due, eddc),
    "mdd": partial(Due, mdd),
    "mddc": partial(Due, mddc),
    "urgency": partial(Due, slack),
    "prefix-groups": PrefixGroups,
    "random": random_priority,
    "markov": markov_priority,
}
ADMISSIONS: Mapping[str, Make[Admission]] = {
    "free-blocks": _just(free_blocks),
    "reserve-all": _just(reserve_all),
    "past-future": PastFuture,
    "conservative": _just(conservative),
    "aggressive": _just(aggressive),
}
BATCHES: Mapping[str, Make[BatchFormer]] = {
    "chunked": _just(chunked),
    "prefill-first": _just(prefill_first),
    "splitfuse": _just(splitfuse),
    "orca": _just(orca),
    "static": _just(static),
    "filling": _just(filling),
    "layered": _just(layered),
}
DRAFTERS: Mapping[str, Make[Drafter | None]] = {"off": _just(None), "lookup": Lookup}
CONTROLLERS: Mapping[str, Make[SpecController]] = {"goodput": Goodput, "always": Always}
PREEMPTIONS: Mapping[str, Make[Preemption]] = {
    "last-arrived": _just(last_arrived),
    "priority": _just(lower_level),
    "swap": _just(swap),
}
ORACLE = "oracle"  # an admission for those who know the lengths of answers

# Functions, or the types of objects. The settled are orderings whose keys never change: sorted once, on arrival.
SETTLED: tuple[object, ...] = (fcfs, priority, shortest_prompt, edd)
PATIENT: tuple[object, ...] = (last_arrived,)  # preemptions that never name anybody for a request that waits

# Who decide the same again while the same requests decode, nobody arrives and free blocks only become fewer: the
# simulator may then take many steps at once. Leave a policy out that looks at the clock or at how far others are. Where
# nobody could start anyway, only the batch former must be among these.
_BATCHES = (chunked, prefill_first, splitfuse, orca, static, filling, layered)
REPEATABLE: tuple[object, ...] = (free_blocks, reserve_all, aggressive, *_BATCHES, last_arrived, lower_level)


@dataclass(frozen=True, slots=True)
class Policies:
    """One choice of each, for one scheduler. `dataclasses.replace(choose(settings), ordering=mine)` plugs in a function
    of your own."""

    ordering: Ordering
    admission: Admission
    batch: BatchFormer
    preemption: Preemption
    drafter: Drafter | None = None  # None: nobody drafts
    controller: SpecController = no_drafts
    shares: SharePolicy | None = None  # of two lanes; None: one lane
    budget: StepBudget | None = None  # None: the scheduler's `token_budget`, and every token counts as one

    def listeners(self) -> list[Callable[[Event], None]]:
        """The `observe` of those who have one; once of an object that is several of them."""
        first: tuple[Any, ...] = (self.ordering, self.admission, self.batch, self.preemption)
        own = {id(one): one for one in (*first, self.drafter, self.controller, self.shares, self.budget)}
        return [one.observe for one in own.values() if hasattr(one, "observe")]

    def survey(self, requests: Sequence[RequestView], now: float) -> None:
        """Let the ordering look at all requests, if it wants to, before it is asked for keys."""
        if hasattr(self.ordering, "survey"):
            self.ordering.survey(requests, now)

    @property
    def settled(self) -> bool:
        """Whether requests keep the keys they get on arrival."""
        return _among(self.ordering, SETTLED)

    @property
    def patient(self) -> bool:
        """Whether who waits can only start in memory and places that are free."""
        return _among(self.preemption, PATIENT)

    def repeatable(self, *, startable: bool) -> bool:
        """Whether a step in which all just decode would be decided the same again, with or without somebody who could
        start. Without, nobody asks about admission, and the order of those who decode makes no difference."""
        asked = (self.batch, self.admission, self.preemption) if startable else (self.batch,)
        settled = (self.settled or not startable) and self.drafter is None
        return all(_among(one, REPEATABLE) for one in asked) and settled


def _among(policy: object, some: Sequence[object]) -> bool:
    return any(policy is one or type(policy) is one for one in some)


def choose(
    settings: EngineSettings,
    lengths: Mapping[RequestId, int] | None = None,
    predict: Predict | None = None,
    step_s: tuple[float, float] | None = None,
    most_tokens: int = MOST_STEP_TOKENS,
) -> Policies:
    """The policies that the settings name, for one scheduler; raises HeadraceError that lists the names there are.
    `lengths` are the output tokens of live requests: a simulation knows them, and may compare with an oracle. `predict`
    is for those that divide the device by what steps would take. With `step_s`, what a step takes and each token of it,
    the token budget follows the steps, up to `most_tokens`, unless the settings fix it."""
    admissions = dict(ADMISSIONS)
    if lengths is not None:
        admissions[ORACLE] = _just(Oracle(lengths))
    follows = settings.token_budget is None and settings.lanes == "one"  # with two, nobody's next token waits
    return Policies(
        _named(ORDERINGS, settings.ordering, "ordering")(settings),
        _named(admissions, settings.admission, "admission")(settings),
        _named(BATCHES, settings.batch, "batch")(settings),
        _named(PREEMPTIONS, settings.preemption, "preemption")(settings),
        _named(DRAFTERS, settings.speculate, "speculate")(settings),
        _named(CONTROLLERS, settings.draft_control, "draft_control")(settings),
        _named(LANES, settings.lanes, "lanes")(settings, predict),
        StepBudget(settings.inter_token_ms / 1000, *step_s, most_tokens) if step_s and follows else None,
    )


def _named(policies: Mapping[str, P], name: str, setting: str) -> P:
    if name not in policies:
        raise HeadraceError(f"{setting} {name!r} is unknown; choose one of {', '.join(policies)}")
    return policies[name]


def token_budget(
    target_s: float, base_s: float, seconds_per_token: float, *, floor: int = 16, ceiling: int = 8192
) -> int:
    """The largest number of tokens whose step, predicted as base_s + tokens * seconds_per_token, stays within the
    inter-token target (Sarathi-Serve's choice of budget). Never below `floor`, or prompts would not move at all on a
    device that misses the target anyway; never above `ceiling`, which bounds the memory of activations."""
    if seconds_per_token <= 0:
        return ceiling
    return max(floor, min(ceiling, int((target_s - base_s) / seconds_per_token)))
