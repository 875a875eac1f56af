"""The records of one server: of live requests and of the last ones that finished, whatever model served them. Owns
them; a `Chronicle` per replica writes them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from headrace.core.explain.chronicle import STEPS_KEPT, Beat, Chronicle
from headrace.core.explain.record import Reading, Record
from headrace.core.explain.seen import Seen
from headrace.core.types import RequestId

_KEYS_KEPT = 1 << 16  # names of blocks: about 10 MB, twice that at most


class Explanations:
    """The records of one server. `keep` is how many finished requests it remembers."""

    def __init__(self, keep: int = 1000) -> None:
        self._keep = max(1, keep)
        self._live: dict[RequestId, Record] = {}
        self._finished: OrderedDict[RequestId, Record] = OrderedDict()
        self._chronicles: list[Chronicle] = []
        self._seen = Seen(_KEYS_KEPT)

    def observer(self, model: str = "") -> Chronicle:
        """For one replica of a model, as long as it lives."""
        chronicle = Chronicle(model, self._live, self._retire, self._seen)
        self._chronicles.append(chronicle)
        return chronicle

    def forget(self, observer: Chronicle) -> None:
        """Its replica is gone; what it finished stays."""
        self._chronicles.remove(observer)

    def find(self, request_id: RequestId) -> Record | None:
        return self._live.get(request_id) or self._finished.get(request_id)

    def live(self) -> Iterable[Record]:
        return self._live.values()

    def recent(self) -> Iterator[Record]:
        """Finished ones, the last first."""
        return reversed(self._finished.values())

    def records(self) -> Iterator[Record]:
        yield from self._live.values()
        yield from self._finished.values()

    def reading(self, record: Record, now: float) -> Reading:
        """What the replica of a live request has done until now."""
        for chronicle in self._chronicles:
            if chronicle.serves(record):
                return chronicle.reading(record.tenant, now)
        return record.stays[-1].before

    def steps(self) -> list[Beat]:
        """The last ones of every replica, by the time they ended."""
        beats = [beat for chronicle in self._chronicles for beat in chronicle.steps()]
        return sorted(beats, key=lambda beat: beat.end_s)[-STEPS_KEPT:]

    def check(self) -> None:
        assert len(self._finished) <= self._keep, "more is kept than promised"
        assert not self._live.keys() & self._finished.keys(), "a request is live and finished"
        assert all(record.finish is None for record in self._live.values())
        assert all(record.finish is not None for record in self._finished.values())
        for chronicle in self._chronicles:
            chronicle.check()

    def _retire(self, record: Record) -> None:
        del self._live[record.id]
        self._finished.pop(record.id, None)
        self._finished[record.id] = record
        if len(self._finished) > self._keep:
            self._finished.popitem(last=False)
