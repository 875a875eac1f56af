"""One request as traffic: when it comes, what its prompt shares with others, and how long its answer will be.

A prompt is a list of stretches. What a stretch contains depends on its name only, so a prefix shared by a group, a
block shared in a trace and an earlier turn of a conversation are one thing with different names, and an arrival has no
block size:

    shared prefix      (32, group) (96, own)
    Mooncake's blocks  (512, 0) (246, 14)
    third turn         (40, user 1) (210, answer 1) (25, user 2) (180, answer 2) (30, user 3)

`traffic` cuts it into the blocks of an engine. Nothing here knows time, randomness or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from typing import NamedTuple

from headrace.core.keys import first_key, next_key
from headrace.core.types import SLO, Blank, BlockKey, Request, RequestId, Sampling, Segment, Tokens

MAX_TOKENS = 10_000_000  # of one prompt or one answer
NAME_BITS = 62  # a token id is a name plus an offset, and must fit 64 bits with a sign
STOP_TOKEN = 0  # what a simulated executor draws last
ANSWER_TOKEN = 1  # what it draws before

_NAMES = (1 << NAME_BITS) - 1
_ODD = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: neighbouring names end up far apart
_SAMPLING = Sampling()


class Stretch(NamedTuple):
    """So many prompt tokens, known by a name. Two stretches of one name agree as far as the shorter one goes."""

    tokens: int
    name: int | None = None  # below 2^62; None: content that nobody shares
    answer: bool = False  # an earlier answer of this session: its tokens are what the executor drew


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to come.

    `at_s` counts from the start of the traffic. With `gap_s` the request follows another one of its session: it is
    sent `gap_s` after that one's answer, and `at_s` is the earliest moment that can be, as if answers took no time;
    so a stream ordered by `at_s` never yields a turn too late. If that other one was cut from the stream, `at_s` is
    the time. Without `at_s` a request is sent when a client is free and has thought for `gap_s`.
    """

    at_s: float | None
    prompt: tuple[Stretch, ...]  # only the last one may have no name
    output_tokens: int  # what the model will answer; no policy may see it
    max_new_tokens: int | None = None  # what the client allows; None: not recorded
    session: str = ""  # empty: a request of its own
    turn: int = 0
    gap_s: float | None = None
    cancel_s: float | None = None  # after it was sent, the client goes away
    tenant: str = ""
    priority: int = 0
    slo: SLO | None = None

    @property
    def prompt_tokens(self) -> int:
        return sum(stretch.tokens for stretch in self.prompt)


class Traffic(NamedTuple):
    """A request as the engine may see it, and beside it what only the simulated executor may know."""

    request: Request
    output_tokens: int  # the executor draws STOP_TOKEN as this one, ANSWER_TOKEN before


def name_of(content: str) -> int:
    """A name that no other content has."""
    return int.from_bytes(blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") & _NAMES


def traffic(
    arrival: Arrival,
    request_id: RequestId,
    *,
    now_s: float,
    block_tokens: int,
    max_new_tokens: int,
    model: str = "",
) -> Traffic:
    """The request, sent at `now_s` to an engine of this block size. `max_new_tokens` is for arrivals without one."""
    keys = block_keys(arrival.prompt, block_tokens, salt := arrival.tenant.encode())
    request = Request(
        id=request_id,
        prompt=_segments(arrival.prompt, len(keys) * block_tokens),
        arrival_s=now_s,
        max_new_tokens=arrival.max_new_tokens or max_new_tokens,
        sampling=_SAMPLING,
        stop_token_ids=frozenset((STOP_TOKEN,)),
        block_keys=keys,
        salt=salt,
        priority=arrival.priority,
        tenant=arrival.tenant,
        model=model,
        slo=arrival.slo,
    )
    return Traffic(request, arrival.output_tokens)


def _segments(prompt: Sequence[Stretch], keyed_tokens: int) -> tuple[Segment, ...]:
    """Blank but for the tail after the last full block: the engine needs its ids to name the first block that holds
    some of the answer, which is how the next turn finds that answer."""
    total = sum(stretch.tokens for stretch in prompt)
    if keyed_tokens == total or prompt[-1].name is None:
        return (Blank(total),)
    tail = Tokens(tuple(token_ids(prompt, keyed_tokens, total)))
    return (Blank(keyed_tokens), tail) if keyed_tokens else (tail,)


def token_ids(prompt: Sequence[Stretch], start: int, end: int) -> list[int]:
    """Ids of the prompt tokens [start, end). Outside answers they are numbers that no vocabulary has: they serve to
    tell contents apart."""
    ids: list[int] = []
    offset = 0
    for stretch in prompt:
        first, last = max(start - offset, 0), min(end - offset, stretch.tokens)
        offset += stretch.tokens
        if first < last:
            ids += _ids(stretch, first, last)
    return ids


def _ids(stretch: Stretch, first: int, last: int) -> Sequence[int]:
    if stretch.answer:
        drawn = [ANSWER_TOKEN] * (last - first)
        return drawn if last < stretch.tokens else [*drawn[1:], STOP_TOKEN]
    assert stretch.name is not None, "a nameless stretch has no ids"
    base = stretch.name * _ODD & _NAMES
    return range(base + first, base + last)


def block_keys(prompt: Sequence[Stretch], block_tokens: int, salt: bytes) -> tuple[BlockKey, ...]:
    """Keys of the full blocks up to the first nameless stretch, chained from `salt`.

    Blocks that lie inside one stretch count up from one hash of what is before it, its name and their place in it.
    Others are hashed as the engine hashes what it generates, so that the answer of one turn and the same answer in
    the prompt of the next have the same keys.

        stretches   |------ a ------|--- answer ---|--- b ---
        blocks      [ run ][ run ][hash ][hash ][hash ][ run ]
    """
    keys: list[BlockKey] = []
    start = 0  # of the stretch
    for stretch, end in zip(prompt, accumulate(part.tokens for part in prompt), strict=True):
        if stretch.name is None:
            break
        inside = -(-start // block_tokens)  # the first block that begins in this stretch
        full = end // block_tokens
        if len(keys) < inside <= full or (stretch.answer and len(keys) < full):
            _hash_blocks(keys, prompt, full if stretch.answer else inside, block_tokens, salt)
        if len(keys) < full:
            first = _run_key(keys[-1] if keys else first_key(salt), stretch.name, inside * block_tokens - start)
            keys.extend(range(first, first + full - len(keys)))
        start = end
    return tuple(keys)


def _hash_blocks(keys: list[BlockKey], prompt: Sequence[Stretch], count: int, block_tokens: int, salt: bytes) -> None:
    """Append keys until there are `count`."""
    first, last = len(keys) * block_tokens, count * block_tokens
    ids = token_ids(prompt, first, last)
    key = keys[-1] if keys else first_key(salt)
    for at in range(0, last - first, block_tokens):
        key = next_key(key, ids[at : at + block_tokens])
        keys.append(key)


def _run_key(previous: BlockKey, name: int, offset: int) -> BlockKey:
    """The key that a run of blocks counts up from; one bit is left free for counting."""
    content = previous.to_bytes(16, "little") + name.to_bytes(8, "little") + offset.to_bytes(8, "little")
    return int.from_bytes(blake2b(content, digest_size=16, person=b"stretch").digest(), "little") >> 1
