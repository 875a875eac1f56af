"""Fair shares among tenants: who is next is whose tenant was served least. Two orderings, each the owner of its
tenants' accounts. Serving costs a tenant one unit per prompt token computed and two per token drawn (VTC's weights),
divided by the tenant's weight; what is computed again after a preemption is not its fault and costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from headrace.core.config import EngineSettings
from headrace.core.events import Admitted, Arrived, Decoded, Drew, Event, Finished, Preempted
from headrace.core.types import HeadraceError, RequestId
from headrace.engine.policies.joints import RequestView

PROMPT_COST, OUTPUT_COST = 1, 2  # of one token
QUANTUM = 512  # cost that a tenant of weight 1 may cause in one round of deficit round robin
SAVED = 2048  # cost that a tenant of weight 1 who asked for less than its share may have saved for its next requests
REMEMBERED_TENANTS = 10_000  # whose accounts are kept although they have no request here
_SCALE = 1 << 20  # accounts are integers in these parts of a token: sums are exact in any order


def weights_of(settings: EngineSettings) -> dict[str, float]:
    """`tenant_weights` as numbers; raises HeadraceError."""
    weights = {}
    for part in filter(None, (part.strip() for part in settings.tenant_weights.split(","))):
        name, _, text = part.rpartition("=")
        try:
            weights[name] = float(text)
        except ValueError:
            weights[name] = 0.0
        if not name or not 1e-3 <= weights[name] <= 1e3:
            raise HeadraceError(f"tenant_weights has {part!r}; write name=weight, with weights from 0.001 to 1000")
    return weights


class Tenants:
    """Which tenant each live request is of, and what those who wait will cost their tenant when they start."""

    def __init__(self) -> None:
        self.of: dict[RequestId, str] = {}
        self.live: dict[str, int] = {}  # requests of each tenant
        self.weights: dict[str, float] = {}  # of those who have some, as their last request says
        self.waiting: dict[str, dict[RequestId, int]] = {}  # in order; only tenants with somebody who waits

    def arrived(self, event: Arrived) -> str:
        tenant = self.of[event.request_id] = event.request.tenant if event.request else ""
        self.live[tenant] = self.live.get(tenant, 0) + 1
        self.weights[tenant] = event.request.weight if event.request else 1.0
        self.waiting.setdefault(tenant, {})[event.request_id] = event.prompt_tokens * PROMPT_COST
        return tenant

    def preempted(self, event: Preempted) -> None:
        self.waiting.setdefault(self.of[event.request_id], {})[event.request_id] = 0

    def started(self, request_id: RequestId) -> int:
        """Who waited waits no more. Returns what the start was to cost."""
        waiting = self.waiting.get(tenant := self.of[request_id], {})
        cost = waiting.pop(request_id, 0)
        if not waiting:
            self.waiting.pop(tenant, None)
        return cost

    def finished(self, event: Finished) -> None:
        self.started(event.request_id)
        tenant = self.of.pop(event.request_id)
        self.live[tenant] -= 1
        if not self.live[tenant]:
            del self.live[tenant], self.weights[tenant]

    def drew(self, event: Drew | Decoded) -> Iterator[tuple[str, int]]:
        """Tokens that tenants drew. Who finished before the event is nobody any more, and drew nothing."""
        if isinstance(event, Decoded):
            return ((self.of[row.request_id], event.run.steps) for row in event.rows if row.request_id in self.of)
        pairs = zip(event.request_ids, event.tokens, strict=True)
        return ((self.of[name], tokens) for name, tokens in pairs if name in self.of)

    def ahead(self) -> Iterator[tuple[RequestId, str, int]]:
        """Everybody who waits, with the cost of those of the same tenant before it."""
        for tenant, waiting in self.waiting.items():
            before = 0
            for request_id, cost in waiting.items():
                yield request_id, tenant, before
                before += cost

    def forget(self, accounts: dict[str, int], keep_highest: bool) -> None:
        """When there are too many, drop the accounts of absent tenants who lose least by it."""
        if len(accounts) > 2 * REMEMBERED_TENANTS:
            absent = sorted((tenant for tenant in accounts if tenant not in self.live), key=accounts.__getitem__)
            for tenant in absent[:-REMEMBERED_TENANTS] if keep_highest else absent[REMEMBERED_TENANTS:]:
                del accounts[tenant]


class TokenCounter:
    """Virtual token counter (Sheng et al., Fairness in Serving Large Language Models, OSDI 2024): each tenant has a
    counter of the cost it caused, and the tenant with the lowest one is next. One who comes back after an absence is
    lifted almost to the lowest of those who wait: SAVED below it at most, so that nobody saves up for long. (The paper
    lifts to the lowest. Then two requests that come together are served at half the device's speed beside a flood,
    although their tenant asked for nothing before: its first tokens come three times as late as alone.) Who was never
    here has saved nothing.

    A request waits behind the cost of its tenant's earlier ones as if they had started, so that a step that admits
    several keeps the shares too. Running requests stand at their tenant's counter: who had most yields first.

    The bound (their theorem 4.4): between two tenants that both have somebody waiting, the costs caused differ by at
    most 2 * max(longest prompt, 2 * tokens of memory) since both wait, and SAVED more, so a request waits at most until
    every other tenant has gone so far ahead of its own.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._weights = weights_of(settings)
        self._tenants = Tenants()
        self._counters: dict[str, int] = {}
        self._last = ""  # the tenant who was the last to leave the queue
        self._tags: dict[RequestId, int] = {}

    def counter(self, tenant: str) -> float:
        """Cost so far over weight, in tokens."""
        return self._counters.get(tenant, 0) / _SCALE

    def observe(self, event: Event) -> None:
        tenants = self._tenants
        match event:
            case Decoded() | Drew():
                for tenant, tokens in tenants.drew(event):
                    self._charge(tenant, tokens * OUTPUT_COST)
            case Arrived():
                self._lift(event.request.tenant if event.request else "")
                tenants.arrived(event)
                tenants.forget(self._counters, keep_highest=True)
            case Admitted():
                self._last = tenants.of[event.request_id]
                self._charge(self._last, max(0, tenants.started(event.request_id) - event.cached_tokens * PROMPT_COST))
            case Preempted():
                tenants.preempted(event)
            case Finished():
                tenants.finished(event)

    def survey(self, requests: Sequence[RequestView], now: float) -> None:
        self._tags = {
            request_id: self._counters[tenant] + self._scaled(tenant, before)
            for request_id, tenant, before in self._tenants.ahead()
        }

    def __call__(self, request: RequestView, now: float) -> float:
        tag = None if request.running else self._tags.get(request.request.id)
        return self._counters.get(request.request.tenant, 0) if tag is None else tag

    def _lift(self, tenant: str) -> None:
        counters, waiting = self._counters, self._tenants.waiting
        if tenant in waiting:
            return
        lowest = min((counters[other] for other in waiting), default=counters.get(self._last, 0))
        counters[tenant] = max(counters[tenant], lowest - SAVED * _SCALE) if tenant in counters else lowest

    def _charge(self, tenant: str, cost: int) -> None:
        self._counters[tenant] += self._scaled(tenant, cost)

    def _scaled(self, tenant: str, cost: int) -> int:
        return cost * round(_SCALE / (self._weights.get(tenant) or self._tenants.weights.get(tenant, 1.0)))


class DeficitRoundRobin:
    """Deficit round robin (Shreedhar and Varghese, SIGCOMM 1995): tenants with somebody waiting take turns; each turn
    adds QUANTUM * weight to a tenant's credit, and its requests start while the credit pays for them. What they draw
    later is paid for afterwards, so credit may be negative, and debts outlast an empty queue while savings do not.

    The key of a request is how many turns of anybody come before its own: turns are counted, not taken, so a debt of a
    thousand rounds costs no time.

    The bound: a request starts after at most ceil((cost of its tenant's queue up to it + debt) / (QUANTUM * weight))
    rounds, and in a round each other tenant starts at most QUANTUM * weight and one request more.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._weights = weights_of(settings)
        self._tenants = Tenants()
        self._credit: dict[str, int] = {}
        self._ring: list[str] = []  # tenants with somebody waiting; it is the first one's turn
        self._keys: dict[RequestId, int] = {}

    def credit(self, tenant: str) -> float:
        """What its requests may cost before its turn is over, in tokens."""
        return self._credit.get(tenant, 0) / _SCALE

    def observe(self, event: Event) -> None:
        tenants = self._tenants
        match event:
            case Decoded() | Drew():
                for tenant, tokens in tenants.drew(event):
                    self._credit[tenant] -= tokens * OUTPUT_COST * _SCALE
            case Arrived():
                self._join(tenants.arrived(event))
                tenants.forget(self._credit, keep_highest=False)
            case Admitted():
                self._start(event)
            case Preempted():
                tenants.preempted(event)
                self._join(tenants.of[event.request_id])
            case Finished():
                tenant = tenants.of[event.request_id]
                tenants.finished(event)
                self._leave_if_empty(tenant)

    def survey(self, requests: Sequence[RequestView], now: float) -> None:
        places = {tenant: place for place, tenant in enumerate(self._ring)}
        self._keys = {}
        for tenant, waiting in self._tenants.waiting.items():
            place, total = places[tenant], 0
            for request_id, cost in waiting.items():
                total += cost
                self._keys[request_id] = self._rounds(tenant, place, total) * len(places) + place

    def __call__(self, request: RequestView, now: float) -> float:
        """Running requests precede all who wait, in order of arrival."""
        return -1 if request.running else self._keys.get(request.request.id, 0)

    def _quantum(self, tenant: str) -> int:
        return round(QUANTUM * _SCALE * (self._weights.get(tenant) or self._tenants.weights.get(tenant, 1.0)))

    def _rounds(self, tenant: str, place: int, cost: int) -> int:
        """How often the ring has gone round when the turn comes that pays for so much: whose turn it is has its
        quantum already, the others get one as the ring comes to them."""
        quanta = max(0, -((self._credit[tenant] - cost * _SCALE) // self._quantum(tenant)))
        return quanta if place == 0 else max(quanta, 1) - 1

    def _join(self, tenant: str) -> None:
        self._credit.setdefault(tenant, 0)
        if tenant not in self._ring:
            self._ring.append(tenant)
            if len(self._ring) == 1:
                self._credit[tenant] += self._quantum(tenant)

    def _start(self, event: Admitted) -> None:
        """Let the turns pass that come before this start, and pay for it."""
        tenant, ring = self._tenants.of[event.request_id], self._ring
        cost = max(0, self._tenants.started(event.request_id) - event.cached_tokens * PROMPT_COST)
        if not event.again:
            place = ring.index(tenant)
            rounds = self._rounds(tenant, place, cost)
            for at, other in enumerate(ring):
                self._credit[other] += (rounds + (0 < at <= place)) * self._quantum(other)
            self._ring = ring[place:] + ring[:place]
        self._credit[tenant] -= cost * _SCALE
        self._leave_if_empty(tenant)

    def _leave_if_empty(self, tenant: str) -> None:
        if tenant in self._tenants.waiting or tenant not in self._ring:
            return
        was_first = self._ring[0] == tenant
        self._ring.remove(tenant)
        self._credit[tenant] = min(0, self._credit[tenant])
        if was_first and self._ring:
            self._credit[self._ring[0]] += self._quantum(self._ring[0])
