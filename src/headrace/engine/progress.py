"""How far one request has come: the states it may be in, and the numbers the scheduler moves. Owns nothing shared;
only the scheduler and its memory write here, policies read it through `policy.RequestView`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import Enum

from headrace.core.ports import Capacity
from headrace.core.step import Block
from headrace.core.types import BlockKey, InvalidRequest, Request, Tokens, Usage


class State(Enum):
    """Running is either of the middle two."""

    WAITING = "waiting"  # holds no blocks; the executor does not know it
    PREFILLING = "prefilling"  # running, and has yet to catch up with its known tokens since it was admitted
    DECODING = "decoding"  # running, and one token behind: the one drawn last, or being drawn
    FINISHED = "finished"

    __hash__ = object.__hash__  # members are looked up in tables on every move; Enum would hash their names


LEGAL: Mapping[State, frozenset[State]] = {
    State.WAITING: frozenset({State.PREFILLING, State.DECODING, State.FINISHED}),
    State.PREFILLING: frozenset({State.DECODING, State.WAITING, State.FINISHED}),
    State.DECODING: frozenset({State.WAITING, State.FINISHED}),
    State.FINISHED: frozenset(),
}


class Pace:
    """What all who decode have in common; see `engine.beats`."""

    __slots__ = ("number", "token")

    def __init__(self) -> None:
        self.number = 0  # the beats so far
        self.token: int | None = None  # what everybody draws of whom nothing else is said


class Progress:
    """One request's share of the scheduler's state. Token counts include prompt and output."""

    __slots__ = (
        "arrival_number",
        "blocks",
        "cached_blocks",
        "cached_tokens",
        "drafted_tokens",
        "first_admitted_s",
        "first_token_s",
        "id",
        "keys",
        "last_tokens",
        "limit_tokens",
        "logprobs_sent",
        "longest_blocks",
        "named_blocks",
        "offset",
        "order",
        "output_ids",
        "output_tokens",
        "pace",
        "passed_layers",
        "pending_tokens",
        "preemptions",
        "prompt_tokens",
        "queued_s",
        "reads_cache",
        "request",
        "served_step",
        "state",
        "stop_token_ids",
        "swapped_blocks",
        "writes_cache",
    )

    def __init__(self, request: Request, max_context_tokens: int, arrival_number: int, now: float) -> None:
        self.request = request
        self.id = request.id
        self.stop_token_ids = request.stop_token_ids
        self.arrival_number = arrival_number
        self.order: tuple[float, int] = (0.0, arrival_number)  # among all requests; smaller goes first
        self.state = State.WAITING
        self.prompt_tokens = request.prompt_tokens
        self.limit_tokens = min(self.prompt_tokens + request.max_new_tokens, max_context_tokens)
        self.last_tokens = self.limit_tokens - 1  # computed tokens of its last step: the last one drawn is not computed
        self.offset = 0  # computed tokens, without the beats of its pace
        self.pace: Pace | None = None  # while it decodes
        self.longest_blocks = 0  # what it would hold in its last step
        self.pending_tokens = 0  # those after the computed ones that went through the first layers, and not through all
        self.passed_layers = 0  # and through how many
        self.drafted_tokens = 0  # those after the computed ones that the step in flight guesses
        self.output_ids: list[int] = []  # while it decodes: those that were told one by one
        self.output_tokens = 0  # while it does not decode: how many were drawn
        self.blocks: list[Block] = []
        self.keys: list[BlockKey] = list(request.block_keys)  # grows by what is generated
        self.named_blocks = 0  # leading blocks that need no more naming in the prefix index
        self.cached_blocks = 0  # while waiting: leading blocks that running requests hold for it
        self.reads_cache = self.writes_cache = False
        self.served_step: int | None = None  # the last step that gave it work or preempted it
        self.logprobs_sent = 0  # prompt positions whose logprobs went out
        self.queued_s = now  # arrival or last preemption
        self.first_admitted_s: float | None = None
        self.first_token_s: float | None = None
        self.cached_tokens = 0
        self.preemptions = 0
        self.swapped_blocks = 0  # the most it left on the host to go on with

    @property
    def computed_tokens(self) -> int:
        """Counts a token from the moment its computation is planned."""
        return self.offset if self.pace is None else self.offset + self.pace.number

    @computed_tokens.setter
    def computed_tokens(self, tokens: int) -> None:
        assert self.pace is None, "who decodes goes on with the others"
        self.offset = tokens

    @property
    def known_tokens(self) -> int:
        """Prompt and output, counting a token from the moment its drawing is planned."""
        if self.state is State.DECODING:
            return self.computed_tokens + 1
        return self.prompt_tokens + self.output_tokens

    def join(self, pace: Pace) -> int:
        """Decode with others from here on. Returns the offset."""
        self.offset, self.pace = self.computed_tokens - pace.number, pace
        return self.offset

    def leave(self) -> None:
        """Decode no more, or alone; all it was to draw has been drawn."""
        assert self.pace is not None, "who does not decode cannot leave"
        token, self.offset, self.pace = self.pace.token, self.computed_tokens, None
        self.output_tokens = self.offset + 1 - self.prompt_tokens
        if token is not None:
            self.output_ids += [token] * (self.output_tokens - len(self.output_ids))

    def undraw(self, tokens: int) -> None:
        """The last so many of those whose drawing was planned are not drawn after all."""
        assert self.pace is None, "who decodes goes on with the others"
        self.output_tokens -= tokens
        del self.output_ids[self.output_tokens :]

    @property
    def held_blocks(self) -> int:
        return len(self.blocks)

    @property
    def running(self) -> bool:
        return self.state is State.PREFILLING or self.state is State.DECODING

    def usage(self) -> Usage:
        return Usage(self.prompt_tokens, self.output_tokens, self.cached_tokens, self.preemptions)

    def token_ids(self, start: int, end: int) -> Sequence[int] | None:
        """Tokens [start, end) of prompt and output, or None where their values are not known."""
        start, end = start - self.prompt_tokens, end - self.prompt_tokens  # in the output
        if end > len(self.output_ids):
            return None
        if start >= 0:
            return self.output_ids[start:end]
        ids = prompt_slice(self.request, self.prompt_tokens + start, self.prompt_tokens + min(end, 0))
        return None if ids is None else (*ids, *self.output_ids[: max(end, 0)])


def prompt_slice(request: Request, start: int, end: int) -> tuple[int, ...] | None:
    """Prompt tokens [start, end), or None if some of them are blank. Reads only the segments they lie in."""
    ids: tuple[int, ...] = ()
    offset = 0
    for segment in request.prompt:
        first, last = max(start - offset, 0), min(end - offset, len(segment))
        offset += len(segment)
        if first < last:
            if not isinstance(segment, Tokens):
                return None
            ids += segment.ids[first:last]
    return ids


def check_servable(request: Request, capacity: Capacity) -> None:
    """Raises InvalidRequest if an otherwise empty replica could not serve this request to its end."""
    prompt, most = request.prompt_tokens, capacity.max_context_tokens
    if prompt < 1:
        raise InvalidRequest("the prompt is empty; send at least one token", "prompt")
    if request.max_new_tokens < 1:
        raise InvalidRequest("max_tokens must be at least 1", "max_tokens")
    if prompt + 1 > most:
        raise InvalidRequest(
            f"the prompt has {prompt} tokens, but prompt and output together may have {most}; shorten it", "prompt"
        )
    longest = min(prompt + request.max_new_tokens, most) - 1  # the last token drawn is never computed
    if longest > capacity.blocks * capacity.block_tokens:
        room = capacity.blocks * capacity.block_tokens
        raise InvalidRequest(
            f"the request may need memory for {longest} tokens, but there is room for {room}; lower max_tokens",
            "max_tokens",
        )
    if len(request.block_keys) > prompt // capacity.block_tokens:
        raise InvalidRequest("there are more block keys than full prompt blocks")
    if request.deadline_s is not None and math.isnan(request.deadline_s):
        raise InvalidRequest("the deadline is not a number", "deadline")
