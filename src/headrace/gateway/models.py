"""The models that a server writes with, by name: the one place where the name in a body becomes a model.

A model here is what answering needs at any moment, in memory or not: its service, its words, what compiles its grammars
and what may be told of it. Whether its weights are loaded is its service's business.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from headrace.core.metrics import Metrics
from headrace.core.ports import Residency, Resident, Service
from headrace.core.types import Usage
from headrace.gateway.card import Card
from headrace.gateway.chain import Call, Ended, Event, Handler, closing
from headrace.gateway.checks import Checks
from headrace.gateway.errors import Refused
from headrace.gateway.text import Text

A = TypeVar("A")
_TAG = ":latest"  # some clients put it behind a name that has no tag


@dataclass(frozen=True, slots=True)
class Model:
    """One of them. It owns its text and its checks; the service is its caller's."""

    name: str
    service: Service
    text: Text
    card: Card
    metrics: Metrics = field(default_factory=Metrics)
    checks: Checks | None = None  # what compiles grammars; None: no answer is held to one
    resident: Resident | None = None  # None: it is in memory for as long as the server runs

    @property
    def max_context_tokens(self) -> int:
        return self.service.status().capacity.max_context_tokens

    @property
    def residency(self) -> Residency:
        return self.resident.residency() if self.resident else Residency()


class Models:
    """At least one; the first answers whoever names none."""

    def __init__(self, models: Sequence[Model]) -> None:
        self._models = tuple(models)
        self._by_name = {model.name.removesuffix(_TAG): model for model in models}
        assert len(self._by_name) == len(models) > 0, "two models have the same name, or there is none"

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models)

    @property
    def first(self) -> Model:
        return self._models[0]

    def get(self, name: str) -> Model | None:
        return self._by_name.get(name.removesuffix(_TAG))

    def is_ready(self, name: str) -> bool:
        """Whether a model of this name is in memory and stays there for its next request."""
        model = self.get(name)
        return model is not None and model.residency.state == "ready"

    def find(self, asked: str | None) -> Model:
        """The model that a call means. Raises Refused for a name that nothing here answers to."""
        found = self.first if asked is None else self.get(asked)
        if found is None:
            message = f"The model {(asked or '')[:256]!r} does not exist; this server has {self.listed()}."
            raise Refused(404, message, code="model_not_found", param="model")
        return found

    def listed(self) -> str:
        """All names, for a sentence."""
        names = [repr(model.name) for model in self]
        return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))

    def close(self) -> None:
        for model in self:
            model.text.close()
            if model.checks is not None:
                model.checks.close()


class Addressed(Protocol):
    """What a client wants of one model."""

    @property
    def model(self) -> str: ...


Q = TypeVar("Q", bound=Addressed)


def by_model(models: Models, handler: Callable[[Model], Callable[[Q], A]]) -> Callable[[Q], A]:
    """A handler that leaves each call to the handler of the model that it is for."""
    handlers = {model.name: handler(model) for model in models}
    return lambda call: handlers[call.model](call)


def residing(model: Model, handler: Handler) -> Handler:
    """A handler around a handler: does what a call says about how long its model stays, and no more than that for a
    call without a prompt, which only asks for the model to be there, or to go."""

    async def answer(call: Call) -> AsyncIterator[Event]:
        try:
            if call.asked:
                async with closing(handler(call)) as events:
                    async for event in events:
                        yield event
                return
            if model.resident is not None and call.keep_alive_s != 0:
                await model.resident.load()
            yield Ended(Usage(0, 0, 0))
        finally:
            if model.resident is not None and call.keep_alive_s is not None:
                model.resident.keep(call.keep_alive_s)

    return answer
