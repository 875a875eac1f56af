"""Decides which models are in memory: loads on demand within one ledger of bytes, and who goes when that is full. Facts
and `now` in, decisions out. Owns the ledger and the queue of requests before each model; moves no byte.

                  Load                   loaded                       drained, Unload
     cold -----------------> loading -------------> ready <-> yielding -----------------> unloading
      ^  ^                      |                                                             |
      |  '----- load_failed ----'                                                             |
      '------------------------------- unloaded, its KV perhaps kept -------------------------'

    the budget   | weights, activations, KV of A | of C | KV kept of B |     free     |

Models that requests wait for are loaded one after the other, the one whose oldest request came first before the others.
Room is made from kept KV if that is enough, else from the models that were used least recently, idle ones first. A busy
one yields: it takes no more requests and goes when it has none. It yields at once, or, to swap less often, when the
oldest request has waited `patience_s`. So with N models a request waits at most

    patience_s + N x (longest answer + longest unload + longest load)

for its model: only models with an older request are loaded before, and each of them then takes all that wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from headrace.core.config import format_bytes


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of one model. `kv_least` serves one request of full length; more than `kv_wanted` would never be used."""

    weights: int
    activations: int
    kv_least: int
    kv_wanted: int
    process: int = 0  # of the process that holds them, if that is another one for each model

    @property
    def fixed(self) -> int:
        return self.weights + self.activations + self.process

    @property
    def spare(self) -> int:
        """What the next process may take more than the last: no two are of the same size."""
        return self.process // 8


@dataclass(frozen=True, slots=True)
class Terms:
    """What is asked for one model: `sizes` as estimated from its file."""

    sizes: Sizes
    keep_alive_s: float = math.inf  # unused for so long, it goes even if nobody wants the room
    pinned: bool = False  # never goes


class State(StrEnum):
    COLD = "cold"
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"


@dataclass(frozen=True, slots=True)
class Admit:
    """These requests may go to their model now."""

    name: str
    tickets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """Answer with `loaded` or `load_failed`."""

    name: str
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class Unload:
    """Answer with `unloaded`."""

    name: str
    keep_kv: bool  # False: it is not to be trusted


@dataclass(frozen=True, slots=True)
class Drop:
    """Give back the KV that was kept of a model, before the next decision."""

    name: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """These requests cannot be served."""

    name: str
    tickets: tuple[int, ...]
    error: str


Decision = Admit | Load | Unload | Drop | Refuse


@dataclass(slots=True)
class _Model:
    name: str
    terms: Terms
    sizes: Sizes  # measured once it was loaded
    keep_alive_s: float
    last_used_s: float
    state: State = State.COLD
    kv: int = 0  # of what is in memory or on its way there
    kept: int = 0  # bytes that the KV of a cold model takes
    kept_kv: int = 0  # the size that it has when the model is loaded again
    broken: bool = False  # takes no more requests
    dismissed: bool = False  # goes when it has no requests
    in_flight: int = 0
    waiting: dict[int, float] = field(default_factory=dict)  # ticket -> arrival, oldest first

    @property
    def charge(self) -> int:
        """Bytes of the budget."""
        return self.kept if self.state is State.COLD else self.sizes.fixed + self.kv

    @property
    def since_s(self) -> float:
        """When the oldest of its waiting requests came."""
        return next(iter(self.waiting.values()), math.inf)

    @property
    def leaves_s(self) -> float:
        """When it goes although nobody wants its room."""
        if self.state is not State.READY or self.in_flight:
            return math.inf
        if self.broken:
            return -math.inf
        if self.terms.pinned or self.waiting:
            return math.inf
        return -math.inf if self.dismissed else self.last_used_s + self.keep_alive_s


class Residence:
    """`budget` in bytes, or infinite; `patience_s` is 0 for the least latency, more for fewer swaps."""

    def __init__(
        self,
        models: Mapping[str, Terms],
        budget: float,
        patience_s: float = 0.0,
        keep_kv: bool = True,
        now: float = 0.0,
    ) -> None:
        self.budget = budget
        self._keep_kv = keep_kv
        self._patience_s = patience_s
        self._models = {
            name: _Model(name, terms, terms.sizes, terms.keep_alive_s, now) for name, terms in models.items()
        }
        self._yielding: frozenset[str] = frozenset()
        self._tickets = 0

    # -- facts ---------------------------------------------------------------------------------------------------------

    def enter(self, name: str, now: float) -> int | None:
        """A request comes. None: it may go to its model at once; else a ticket to wait with."""
        model = self._models[name]
        if self._takes(model) and not model.waiting:
            self._begin(model, 1, now)
            return None
        self._tickets += 1
        model.waiting[self._tickets] = now
        return self._tickets

    def withdraw(self, name: str, ticket: int) -> None:
        """A request waits no more; unknown tickets are ignored."""
        self._models[name].waiting.pop(ticket, None)

    def leave(self, name: str, now: float) -> None:
        """A request that had been let in has ended."""
        model = self._models[name]
        model.in_flight -= 1
        model.last_used_s = now

    def keep(self, name: str, seconds: float, now: float) -> None:
        """From now on a model stays so long when it is unused. 0 is for once: it goes when it has no requests."""
        model = self._models[name]
        model.last_used_s = now
        if seconds > 0:
            model.keep_alive_s, model.dismissed = seconds, False
        else:
            model.dismissed = model.state is not State.COLD

    def broke(self, name: str) -> None:
        """A model in memory serves nobody any more."""
        self._models[name].broken = True

    def excess(self, name: str, measured: Sizes, kv: int) -> str | None:
        """Why a model that has been loaded cannot stay: it is larger than it seemed, and more than the budget has."""
        model = self._models[name]
        total = self.used - model.charge + measured.fixed + kv
        if total <= self.budget:
            return None
        found, expected = format_bytes(measured.fixed), format_bytes(model.sizes.fixed)
        return (
            f"{name} takes {found} without KV, where {expected} were expected;"
            f" with {format_bytes(kv)} of KV and what else is loaded that makes"
            f" {format_bytes(total)} of the {format_bytes(self.budget)} for all models"
        )

    def loaded(self, name: str, measured: Sizes, kv: int, now: float) -> None:
        """A load is over; `excess` has found nothing against it."""
        model = self._models[name]
        model.sizes, model.state, model.last_used_s = measured, State.READY, now
        model.kv, model.kept, model.kept_kv = kv, 0, 0
        model.broken = False
        self._yielding -= {name}

    def misjudged(self, name: str, measured: Sizes) -> None:
        """A model was larger than expected and had to go again. It comes back when what it was measured to need is
        free, and if that can never be, those who wait are refused."""
        model = self._models[name]
        model.state, model.kv, model.kept, model.kept_kv = State.COLD, 0, 0, 0
        surprise = max(0, measured.process - model.sizes.process)
        model.sizes = replace(measured, process=measured.process + surprise // 8)

    def load_failed(self, name: str) -> tuple[int, ...]:
        """A load has failed, and nothing of the model is left. Returns whom that concerns: those who wait now. The next
        one tries again."""
        model = self._models[name]
        model.state, model.kv, model.kept, model.kept_kv = State.COLD, 0, 0, 0
        failed = tuple(model.waiting)
        model.waiting.clear()
        return failed

    def unloaded(self, name: str, kept: int) -> None:
        """A model is out of memory but for `kept` bytes of its KV."""
        model = self._models[name]
        model.kept, model.kept_kv = kept, model.kv if kept else 0
        model.state, model.kv = State.COLD, 0
        model.broken = model.dismissed = False
        self._yielding -= {name}

    # -- decisions -----------------------------------------------------------------------------------------------------

    def decide(self, now: float) -> Decision | None:
        """The next thing to do, or None. Ask again after every decision that was carried out and after every fact."""
        moving = any(model.state in (State.LOADING, State.UNLOADING) for model in self._models.values())
        # whoever can be let in is let in before the model may be taken away, and again where nobody yields any more
        return self._admit(now) or (None if moving else self._move(now)) or self._admit(now)

    def wake_s(self, now: float) -> float:
        """When `decide` has more to say without any further fact; infinite for never."""
        patience = [model.since_s + self._patience_s for model in self._models.values() if model.state is State.COLD]
        times = [*patience, *(model.leaves_s for model in self._models.values())]
        return min((at for at in times if at > now), default=math.inf)

    def _admit(self, now: float) -> Admit | None:
        for model in self._models.values():
            if model.waiting and self._takes(model):
                tickets = tuple(model.waiting)
                model.waiting.clear()
                self._begin(model, len(tickets), now)
                return Admit(model.name, tickets)
        return None

    def _move(self, now: float) -> Load | Unload | Drop | Refuse | None:
        """What changes the ledger; nothing else is doing so."""
        self._yielding = frozenset()
        broken = [model for model in self._models.values() if model.broken and model.leaves_s <= now]
        if broken:
            return self._unload(broken[0])
        wanted = [model for model in self._models.values() if model.state is State.COLD and model.waiting]
        if wanted:
            return self._room(min(wanted, key=lambda model: model.since_s), now)
        over = [model for model in self._models.values() if model.leaves_s <= now]
        return self._unload(over[0]) if over else None

    def _room(self, model: _Model, now: float) -> Load | Unload | Drop | Refuse | None:
        """The next step towards a model in memory."""
        most = self.budget - sum(one.charge for one in self._others(model) if one.terms.pinned)
        if model.sizes.fixed + model.sizes.kv_least > most:
            tickets = tuple(model.waiting)
            model.waiting.clear()
            return Refuse(model.name, tickets, self._too_large(model, most))
        if model.kept and model.sizes.fixed + model.kept_kv > most:
            return self._drop(model)
        kv = model.kept_kv or int(min(self.share(model.name), most - model.sizes.fixed))
        lacking = model.sizes.fixed + kv - (self.budget - self.used + model.kept)
        if lacking <= 0:
            model.state, model.kv = State.LOADING, kv
            return Load(model.name, kv)
        kept = [one for one in self._others(model) if one.kept]
        lacking_models = lacking - sum(one.kept for one in kept)
        if lacking_models <= 0:
            return self._drop(min(kept, key=lambda one: one.last_used_s))
        return self._evict(self._victims(model, lacking_models), now >= model.since_s + self._patience_s)

    def _victims(self, model: _Model, lacking: float) -> list[_Model]:
        """Whose memory together is enough: idle ones, the least recently used first, then busy ones; none in vain."""
        ready = [one for one in self._others(model) if one.state is State.READY and not one.terms.pinned]
        chosen: list[_Model] = []
        for one in sorted(ready, key=lambda one: (one.in_flight > 0, one.last_used_s)):
            if sum(each.charge for each in chosen) < lacking:
                chosen.append(one)
        for one in chosen[::-1]:
            if sum(each.charge for each in chosen) - one.charge >= lacking:
                chosen.remove(one)
        return chosen

    def _evict(self, victims: list[_Model], at_once: bool) -> Unload | None:
        """A busy one that may still go on keeps the others from going in vain."""
        if not at_once and any(one.in_flight for one in victims):
            return None
        self._yielding = frozenset(one.name for one in victims)
        idle = [one for one in victims if not one.in_flight]
        return self._unload(idle[0]) if idle else None

    def _unload(self, model: _Model) -> Unload:
        model.state = State.UNLOADING
        return Unload(model.name, self._keep_kv and not model.broken)

    def _drop(self, model: _Model) -> Drop:
        model.kept = model.kept_kv = 0
        return Drop(model.name)

    def _takes(self, model: _Model) -> bool:
        return model.state is State.READY and not model.broken and model.name not in self._yielding

    def _begin(self, model: _Model, requests: int, now: float) -> None:
        model.in_flight += requests
        model.last_used_s, model.dismissed = now, False

    def _others(self, model: _Model) -> Iterable[_Model]:
        return (one for one in self._models.values() if one is not model)

    # -- the ledger ----------------------------------------------------------------------------------------------------

    @property
    def used(self) -> int:
        """Bytes in memory, or on their way in or out."""
        return sum(model.charge for model in self._models.values())

    def charge(self, name: str) -> int:
        return self._models[name].charge

    def kept(self, name: str) -> int:
        return self._models[name].kept

    def state(self, name: str) -> State:
        return self._models[name].state

    def yielding(self, name: str) -> bool:
        return name in self._yielding

    def pinned(self, name: str) -> bool:
        return self._models[name].terms.pinned

    def waiting(self, name: str) -> int:
        return len(self._models[name].waiting)

    def in_flight(self, name: str) -> int:
        return self._models[name].in_flight

    def leaves_s(self, name: str) -> float:
        """When a model in memory goes if nobody uses it; infinite for never."""
        model = self._models[name]
        return math.inf if model.terms.pinned else max(model.last_used_s + model.keep_alive_s, model.last_used_s)

    def share(self, name: str) -> float:
        """KV of one model. What the largest models that fit together leave of the budget is divided evenly among all
        models, in memory or not, so that the KV of those that are not can stay; what one of them cannot use goes to the
        others, and each has at least what one request of full length needs. Some is left to no one: a process that is
        larger than last time takes that, and not KV that was kept."""
        sizes = sorted((model.sizes for model in self._models.values()), key=lambda one: -one.fixed)
        least = sum(one.kv_least for one in sizes)
        fixed, spare = sizes[0].fixed, sizes[0].spare
        for one in sizes[1:]:
            if fixed + one.fixed + least <= self.budget:
                fixed, spare = fixed + one.fixed, spare + one.spare
        left = self.budget - fixed
        left -= min(spare, max(0, left - least))
        wanting, even = len(sizes), 0.0
        for one in sorted(sizes, key=lambda one: one.kv_wanted):
            even = left / wanting
            left -= min(even, one.kv_wanted)
            wanting -= 1
        mine = self._models[name].sizes
        return max(mine.kv_least, min(mine.kv_wanted, even))

    def _too_large(self, model: _Model, most: float) -> str:
        sizes = model.sizes
        parts = ((sizes.weights, "weights"), (sizes.activations, "activations"), (sizes.kv_least, "KV for one request"))
        needs = ", ".join(f"{format_bytes(count)} of {what}" for count, what in parts)
        needs += f", {format_bytes(sizes.process)} of its process" if sizes.process else ""
        total = format_bytes(sizes.fixed + sizes.kv_least)
        return (
            f"{model.name} needs {total} ({needs}) and can have at most {format_bytes(max(0, most))}"
            f" of the {format_bytes(self.budget)} for all models; give --memory more, or lower --max-context or"
            " --max-running"
        )

    def check(self) -> None:
        """Nothing is promised twice, and nobody waits before an open door."""
        models = self._models.values()
        assert self.used <= self.budget, "more is in memory than the budget has"
        assert sum(model.state in (State.LOADING, State.UNLOADING) for model in models) <= 1, "two models move at once"
        for model in models:
            assert model.in_flight >= 0, "more requests have left than came"
            assert not model.in_flight or model.state is State.READY, "a model that is not ready has requests"
            assert not model.kept or model.state in (State.COLD, State.LOADING), "KV in memory is kept as well"
            assert model.kv == 0 or model.state is not State.COLD, "a cold model has KV that is not kept"
            assert bool(model.kept) == bool(model.kept_kv), "kept KV has no size"
            assert list(model.waiting.values()) == sorted(model.waiting.values()), "a later one overtook"
        assert all(self._models[name].state is not State.COLD for name in self._yielding)
