"""What crosses between the process that serves and the one that computes, as typed msgpack in frames with a length:
plans one way, results the other, and before them what is to be loaded and what was.

    | length, 4 bytes, little-endian | msgpack |      at most MAX_FRAME bytes

Values are checked as they are read, so neither side can make the other run anything; who breaks the format is dropped.
A plan is its own form but for the requests in it, whose prompts and block keys are written in another way.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import msgspec

from headrace.core.config import DeviceSettings
from headrace.core.facts import EncoderFacts, Expected, LoadFacts, ModelFacts
from headrace.core.step import Admitted, Beat, Block, Copy, Lane, StepPlan, StepResult, Work
from headrace.core.types import Blank, HeadraceError, Request, RequestId, Tokens

MAX_FRAME = 256 << 20
HEADER = struct.Struct("<I")
HEARTBEAT_S = 1.0

T = TypeVar("T")


class BadFrame(HeadraceError):
    """The other process said something that is not of this format."""


# -- plans -------------------------------------------------------------------------------------------------------------


def _wired() -> type[msgspec.Struct]:
    """A request whose fields all have one type: prompts are stretches of ids or lengths of blanks, keys are bytes."""
    kinds = get_type_hints(Request)
    kinds |= {"prompt": tuple[int | tuple[int, ...], ...], "block_keys": tuple[bytes, ...]}
    fields = [(field.name, kinds[field.name]) for field in dataclasses.fields(Request)]
    return msgspec.defstruct("_Wired", fields, frozen=True, array_like=True, forbid_unknown_fields=True)


_Wired: Any = _wired()


class _Admitted(NamedTuple):
    """`core.step.Admitted`."""

    request: _Wired
    output_ids: tuple[int, ...]
    blocks: tuple[Block, ...]
    start: int


class _Plan(NamedTuple):
    """`core.step.StepPlan`, field by field."""

    step: int
    others: tuple[Work, ...]
    admitted: tuple[_Admitted, ...]
    released: tuple[RequestId, ...]
    copies: tuple[Copy, ...]
    lanes: tuple[Lane, ...]
    lane: int
    beat: Beat | None
    steps: int
    until_s: float


def _request_out(request: Request) -> Any:
    values = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    values["prompt"] = tuple(part.tokens if isinstance(part, Blank) else part.ids for part in request.prompt)
    values["block_keys"] = tuple(key.to_bytes((key.bit_length() + 7) // 8, "little") for key in request.block_keys)
    return _Wired(**values)


def _request_in(wired: Any) -> Request:
    values = {name: getattr(wired, name) for name in wired.__struct_fields__}
    values["prompt"] = tuple(Blank(part) if isinstance(part, int) else Tokens(part) for part in wired.prompt)
    values["block_keys"] = tuple(int.from_bytes(key, "little") for key in wired.block_keys)
    return Request(**values)


def plan_out(plan: StepPlan) -> _Plan:
    admitted: Any = tuple(_Admitted(_request_out(one.request), *one[1:]) for one in plan.admitted)
    return _Plan._make(plan._replace(admitted=admitted))


def plan_in(wired: _Plan) -> StepPlan:
    admitted: Any = tuple(Admitted(_request_in(one.request), *one[1:]) for one in wired.admitted)
    return StepPlan._make(wired._replace(admitted=admitted))


# -- what the parent says ----------------------------------------------------------------------------------------------


class Load(msgspec.Struct, frozen=True, tag=0, array_like=True):
    """The first thing: what to compute with. `again`: step times are known, and memory is as large as it was."""

    model: str  # as the user names it
    device: DeviceSettings
    block_tokens: int
    max_running: int
    step_tokens: int
    host_bytes: int = 0
    embedding: str | None = None  # an embedding model beside it; one that is only a default may be missing
    kv_fd: int | None = None  # of memory that outlives the child: the KV lies there
    kv_kept: bool = False  # and what is in it is still good
    again: bool = False


class Look(msgspec.Struct, frozen=True, tag=3, array_like=True):
    """Before a `Load`, and to know more of what may be loaded: each is answered with a `Seen`, in order."""

    loads: tuple[Load, ...]


class Step(msgspec.Struct, frozen=True, tag=1, array_like=True):
    plan: _Plan


class Encode(msgspec.Struct, frozen=True, tag=2, array_like=True):
    number: int
    sequences: Sequence[Sequence[int]]


# -- what the child says -----------------------------------------------------------------------------------------------


class Phase(msgspec.Struct, frozen=True, tag=0, array_like=True):
    what: str  # begins now


class Opened(msgspec.Struct, frozen=True, tag=1, array_like=True):
    """The files are open; their weights are yet to be read."""

    facts: ModelFacts


class Loaded(msgspec.Struct, frozen=True, tag=2, array_like=True):
    """Plans may come."""

    facts: LoadFacts


class Refused(msgspec.Struct, frozen=True, tag=3, array_like=True):
    """It cannot be loaded; a sentence for the user."""

    message: str


class Packed(msgspec.Struct, frozen=True, tag=8, array_like=True):
    """So much of the weights is in memory."""

    nbytes: int


class Seen(msgspec.Struct, frozen=True, tag=9, array_like=True):
    facts: ModelFacts
    expected: Expected
    encoder: EncoderFacts | None = None  # the embedding model that would be beside it


class Alive(msgspec.Struct, frozen=True, tag=4, array_like=True):
    """A sign of life."""


class Done(msgspec.Struct, frozen=True, tag=5, array_like=True):
    result: StepResult


class Failed(msgspec.Struct, frozen=True, tag=6, array_like=True):
    """A step, or an encoding, went wrong as a whole."""

    number: int
    message: str
    encoding: bool = False


class Encoded(msgspec.Struct, frozen=True, tag=7, array_like=True):
    number: int
    vectors: list[bytes]


ToChild = Load | Look | Step | Encode
FromChild = Phase | Opened | Loaded | Refused | Alive | Done | Failed | Encoded | Packed | Seen


# -- frames ------------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if isinstance(value, MappingProxyType):  # what a result has nothing of
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no form on the wire")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_plain)


def frame(message: ToChild | FromChild) -> bytes:
    """Raises BadFrame for what has no form, or is too large."""
    try:
        body = _ENCODER.encode(message)
    except (TypeError, OverflowError, msgspec.MsgspecError) as error:
        raise BadFrame(f"a message cannot be written: {error}") from error
    if len(body) > MAX_FRAME:
        raise BadFrame(f"a message of {len(body)} bytes is larger than {MAX_FRAME}")
    return HEADER.pack(len(body)) + body


def length(header: bytes | bytearray | memoryview) -> int:
    """Of the frame that begins so. Raises BadFrame."""
    (size,) = HEADER.unpack_from(header)
    if size > MAX_FRAME:
        raise BadFrame(f"a message of {size} bytes is larger than {MAX_FRAME}")
    return int(size)


class Reader(Generic[T]):
    """Cuts a stream of bytes into messages of one side."""

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._rest = bytearray()

    def decode(self, body: bytes | bytearray | memoryview) -> T:
        try:
            message: T = self._decoder.decode(body)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise BadFrame(f"a message cannot be read: {error}") from error
        return message

    def feed(self, data: bytes) -> Iterator[T]:
        """The messages that are complete now. Raises BadFrame."""
        self._rest += data
        at, have = 0, len(self._rest)
        while have - at >= HEADER.size:
            end = at + HEADER.size + length(self._rest[at : at + HEADER.size])
            if end > have:
                break
            yield self.decode(bytes(self._rest[at + HEADER.size : end]))
            at = end
        if at:
            del self._rest[:at]


def from_child() -> Reader[FromChild]:
    return Reader(FromChild)


def from_parent() -> Reader[ToChild]:
    return Reader(ToChild)
