"""Drafts by looking: what followed the last time that a request's own text, prompt and output, ended as it ends now
(prompt lookup; suffix decoding, arXiv:2411.04975). Owns an index of each text, which grows with it; no model, no other
request's text.

    ... the quick brown fox ... then the quick brown | fox jumps ...
        '------ agrees -----'        '---- ending ---' '- draft: what followed there -'
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.core.config import EngineSettings
from headrace.core.events import Event, Finished, Preempted
from headrace.core.types import Blank, RequestId
from headrace.engine.policies.joints import Draft, RequestView

SHORTEST = 2  # tokens that must agree
LONGEST = 32  # tokens beyond which nobody looks how much more agrees
PLACES = 16  # where the last two tokens occurred before, latest first, that are looked at
WINDOW = 1 << 15  # tokens of a text that are remembered, at least: 5 MB with their index
AT_ONCE = 1 << 12  # tokens that are indexed in one step: a long prompt holds nobody up


class Suffixes:
    """A growing text that knows where its ending occurred before. As in LZ77 with hash chains, all places where one
    pair of tokens ends are a linked list; so a token costs O(1), a search at most PLACES comparisons."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._last: dict[int, int] = {}  # pair -> where it ended last
        self._before: list[int] = []  # place -> where the pair that ends here ended before; -1: nowhere

    def extend(self, ids: Sequence[int]) -> None:
        text, last, before = self.ids, self._last, self._before
        previous = text[-1] if text else 0
        for at, token in enumerate(ids, len(text)):
            pair = previous << 32 ^ token  # different pairs may meet here: tokens are compared later
            before.append(last.get(pair, -1))
            last[pair] = at
            previous = token
        text += ids
        if len(text) > 2 * WINDOW:
            self.ids, self._last, self._before = [], {}, []
            self.extend(text[-WINDOW:])

    def find(self) -> tuple[int, int]:
        """(where the ending occurred before, how many tokens agree): where most agree, the latest of equals. (-1, 0) if
        there is no such place."""
        ids, found, most, limit = self.ids, -1, SHORTEST - 1, min(LONGEST, len(self.ids) - 1)
        end = len(ids) - 1
        at = self._before[end] if ids else -1
        for _ in range(PLACES):
            if at < most or most >= limit:
                break
            if ids[at - most] == ids[end - most]:
                agree = 0
                while agree < limit and agree <= at and ids[at - agree] == ids[end - agree]:
                    agree += 1
                if agree > most:
                    found, most = at, agree
            at = self._before[at]
        return (found, most) if found >= 0 else (-1, 0)

    def after(self, at: int, most: int) -> tuple[int, ...]:
        """What followed there. Where that is not long enough, the text is taken to go on in circles."""
        followed = tuple(self.ids[at + 1 : at + 1 + most])
        return (followed * -(-most // len(followed)))[:most]


class Lookup:
    """A drafter. Texts that are not known, as those of a trace, have no drafts."""

    def __init__(self, settings: EngineSettings) -> None:
        self._texts: dict[RequestId, tuple[Suffixes, int] | None] = {}  # with the position where each ends; None: blank

    def observe(self, event: Event) -> None:
        if type(event) is Finished or type(event) is Preempted:
            self._texts.pop(event.request_id, None)

    def __call__(self, request: RequestView, most: int) -> Draft | None:
        text = self._grown(request)
        if text is None:
            return None
        at, agree = text.find()
        return Draft(text.after(at, most), agree) if agree else None

    def _grown(self, request: RequestView) -> Suffixes | None:
        """Its text up to its last token; None if that is not known, or not all of it indexed yet."""
        name, known = request.request.id, request.known_tokens
        if name not in self._texts:
            blank = any(isinstance(segment, Blank) for segment in request.request.prompt)
            self._texts[name] = None if blank else (Suffixes(), max(0, known - WINDOW))
        entry = self._texts[name]
        if entry is None:
            return None
        text, start = entry
        end = min(known, start + AT_ONCE)
        ids = request.token_ids(start, end)
        if ids is None:
            return None
        text.extend(ids)
        self._texts[name] = (text, end)
        return text if end == known else None
