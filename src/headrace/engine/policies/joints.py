"""What policies see and what they answer: the joints, the read-only views they get, and the two methods that a
policy may have beside its call. Decides nothing.

A policy is a function, or an object with `__call__` for one that remembers. Such an object belongs to one scheduler and
learns in two ways, each a method it may have or not:

    observe(event)          every fact of its scheduler, in order, before any other observer hears of it
    survey(requests, now)   an ordering only: all live requests in order of arrival, just before they are sorted anew

What it remembers must follow from these and its calls alone, so that the same events replay to the same plans.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple, Protocol

from headrace.core.types import Request


class RequestView(Protocol):
    """What a policy may know about one request. It is the scheduler's live object: read it, don't keep it."""

    @property
    def request(self) -> Request: ...

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def known_tokens(self) -> int:
        """Prompt and output so far."""
        ...

    @property
    def computed_tokens(self) -> int: ...

    @property
    def pending_tokens(self) -> int:
        """Tokens after the computed ones that are on their way through the layers."""
        ...

    @property
    def limit_tokens(self) -> int:
        """The most prompt and output it may come to."""
        ...

    @property
    def held_blocks(self) -> int: ...

    @property
    def cached_blocks(self) -> int:
        """For the request that asks for admission: blocks of its prefix that running requests hold already."""
        ...

    @property
    def running(self) -> bool:
        """Admitted, and not preempted since."""
        ...

    @property
    def queued_s(self) -> float: ...

    @property
    def preemptions(self) -> int: ...

    def token_ids(self, start: int, end: int) -> Sequence[int] | None:
        """Tokens [start, end) of prompt and output; None if some of them are not known."""
        ...


class PoolView(NamedTuple):
    """The KV memory at the moment one request asks for admission."""

    total_blocks: int
    free_blocks: int  # held by nobody, cached ones included, but for what other tenants keep in the cache at least
    block_tokens: int
    promised_blocks: int  # of the free ones, what running requests need for tokens they know but have not computed
    reserved_blocks: int  # what running requests would hold at their longest if they shared nothing
    running: Sequence[RequestView]

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)


class BatchView(NamedTuple):
    """Everybody who could be in this step, each group in the order of the ordering."""

    now: float
    token_budget: int
    decoding: Sequence[RequestView]  # one token behind
    prefilling: Sequence[RequestView]  # running, with more to catch up
    waiting: Sequence[RequestView]  # not admitted, or preempted
    fillers: int = 0  # how many of all these are of the lowest priority level
    overtaking: Sequence[RequestView] = ()  # who prefills and who waits and precedes one of them; empty: none of these


class DraftView(NamedTuple):
    """Who could go on by more than one token in this step."""

    decoding: Sequence[RequestView]
    context_tokens: int  # the sum of what they have computed
    token_room: int  # of the budget, when each of them has its one token
    behind: bool  # others would compute what drafts leave of the budget


class Draft(NamedTuple):
    """A guess of what follows a request's known tokens."""

    token_ids: tuple[int, ...]
    evidence: int  # for how many known tokens this has followed before; 0: it is no more than a guess


class Share(NamedTuple):
    """A wish: compute these requests, in this order, with at most `tokens` altogether. Who waits asks for admission;
    the first who is refused ends the share, so that nobody overtakes. `whole` requests start only if all their missing
    tokens fit, or if the step is empty.

    With a `cohort`, those for whom `tokens` are too few go through some of the layers instead of all of them: up to so
    many tokens together, by as many layers in each step as fit, where a token through n of L layers counts n / L. Who
    has begun like this has `pending_tokens`, and whatever share names it next, it is these that go on."""

    requests: Sequence[RequestView]
    tokens: int
    whole: bool = False
    cohort: int = 0


Ordering = Callable[[RequestView, float], float]  # (request, now) -> key: smaller goes first, ties by arrival
Admission = Callable[[RequestView, PoolView], bool]
BatchFormer = Callable[[BatchView], Generator[Share, int, None]]  # yields wishes, receives the tokens they got

# (those behind it in order, the needy) -> who yields. Asked when a running request finds no block: None is then the
# last of them. Asked as well when the first that waits (`needy.running` is false) may not start: None is nobody.
Preemption = Callable[[Sequence[RequestView], RequestView], RequestView | None]

# (request, how many tokens at most) -> a guess of them, or of fewer. Asked only for those whom the controller wants to
# know about, and not in every step.
Drafter = Callable[[RequestView, int], Draft | None]

# Which of the guesses are worth computing: (request, the tokens to verify), in the order in which memory is to be found
# for them. `policies.goodput` says what they are worth.
SpecController = Callable[[DraftView, Drafter], Sequence[tuple[RequestView, tuple[int, ...]]]]
