"""Reads a server for `headrace top`: three pages over HTTP, in shapes of only what is shown, so that a server that is
newer or older can be watched. Owns the connection.
"""

from __future__ import annotations

import http.client
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import quote

import msgspec

from headrace.bench.settings import parse_url
from headrace.core.types import HeadraceError

T = TypeVar("T")
_TIMEOUT_S = 5.0
_MOST_BYTES = 16 << 20


class Away(HeadraceError):
    """The server did not answer, or answered something else; the message says which."""


class Forbidden(Away):
    """The key is one of a user, and what was asked for is shown to an admin."""


class Memory(msgspec.Struct):
    """The KV blocks of one model."""

    model: str
    block_tokens: int
    total_blocks: int
    used_blocks: int
    cached_blocks: int  # used by nobody, and not forgotten yet


class Step(msgspec.Struct):
    """One step, or several equal ones in a row."""

    repetitions: int
    ended: float  # Unix time
    ms: float  # altogether
    requests: int
    tokens: int  # of each
    prompts: int  # of the requests, those whose prompt it computed

    @property
    def each_ms(self) -> float:
        return self.ms / max(1, self.repetitions)

    @property
    def answer_tokens(self) -> int:
        return min(self.tokens, self.requests - self.prompts)

    @property
    def prompt_tokens(self) -> int:
        return self.tokens - self.answer_tokens


class Steps(msgspec.Struct):
    now: float  # Unix time
    memory: list[Memory]
    data: list[Step]


class Request(msgspec.Struct):
    id: str
    state: str
    total_ms: float  # so far
    queue_ms: float
    prompt_tokens: int
    output_tokens: int
    tenant: str | None = None
    ttft_ms: float | None = None
    finish: str | None = None
    waits_for: str = ""  # the main reason of its time in the queue, in a few words


class Requests(msgspec.Struct):
    data: list[Request]


class Explanation(msgspec.Struct):
    words: list[str]


class _Detail(msgspec.Struct):
    message: str


class _Error(msgspec.Struct):
    error: _Detail


@dataclass(frozen=True, slots=True)
class Snapshot:
    url: str
    steps: Steps | None  # None: this key may not see what the server does as a whole, only its tenant's requests
    requests: list[Request]


class Source:
    """One server. Every method raises Away."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._target = parse_url(url)
        self._prefix = self._target.path.removesuffix("/v1")  # the base URL of a client will do
        self._url = url
        self._headers = {"Accept": "application/json", "Host": self._target.authority}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._connection: http.client.HTTPConnection | None = None
        self._closed = False  # are its steps, to this key

    def now(self) -> Snapshot:
        return Snapshot(self._url, self._steps(), self._read("/v1/requests?limit=100", Requests).data)

    def explain(self, request_id: str) -> list[str]:
        """Why a request took as long as it did, in sentences."""
        return self._read(f"/v1/requests/{quote(request_id, safe='')}/explain", Explanation).words

    def _steps(self) -> Steps | None:
        if self._closed:
            return None
        try:
            return self._read("/v1/steps", Steps)
        except Forbidden:
            self._closed = True
            return None

    def _read(self, path: str, kind: type[T]) -> T:
        status, body = self._get(path)
        try:
            if status != 200:
                said = msgspec.json.decode(body, type=_Error).error.message
                raise (Forbidden if status == 403 else Away)(f"{self._url} says {status}: {said}")
            return msgspec.json.decode(body, type=kind)
        except msgspec.DecodeError as error:
            raise Away(f"{self._url} is not a Headrace server that can be watched: {path} is {status}") from error

    def _get(self, path: str) -> tuple[int, bytes]:
        """A connection that was kept may have been closed by the server meanwhile; a new one gets its turn."""
        for connection in filter(None, (self._connection, self._connect())):
            try:
                connection.request("GET", self._prefix + path, headers=self._headers)
                answer = connection.getresponse()
                self._connection = connection
                return answer.status, answer.read(_MOST_BYTES)
            except (OSError, http.client.HTTPException, UnicodeError) as error:
                connection.close()
                why = str(error) or type(error).__name__
        self._connection = None
        raise Away(f"{self._url} does not answer ({why}). Is the server running, and is --url its address?")

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._target.secure else http.client.HTTPConnection
        return kind(self._target.host, self._target.port, timeout=_TIMEOUT_S)
