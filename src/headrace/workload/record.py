"""Folds what a live server saw into lines that `traces` reads: when, how long, which blocks were shared, never what.

Block names and tenants are hashed with a secret that is not written, so a recording cannot be matched against a
guessed prompt, nor against another recording. One line per request, written and flushed when it ends.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from hashlib import blake2b
from typing import Any, TextIO

from headrace.core.events import Arrived, Event, Finished, Rejected
from headrace.core.ports import Service, Status
from headrace.core.types import FinishReason, Output, Request, RequestId
from headrace.workload.arrival import NAME_BITS

MOST_LIVE = 65_536  # requests remembered between `note` and their end; of more, the oldest lose their block names


class Recorder:
    """An Observer that writes one line per request to `file`, once it has been told of the request by `note`.

    A recording must not stop the service: when `file` cannot be written, `error` says why and nothing more is tried.
    """

    def __init__(self, file: TextIO, block_tokens: int, secret: bytes) -> None:
        self.error: OSError | None = None
        self.lines = 0
        self._file = file
        self._block_tokens = block_tokens
        self._secret = secret
        self._start_s: float | None = None
        self._noted: dict[RequestId, dict[str, Any]] = {}

    def note(self, request: Request) -> None:
        """Remember what events do not carry. Call it before the request is served."""
        if len(self._noted) >= MOST_LIVE:
            del self._noted[next(iter(self._noted))]
        slo = request.slo
        known = {
            "prompt_tokens": request.prompt_tokens,
            "max_new_tokens": request.max_new_tokens,
            "blocks": request.block_keys,
            "tenant": request.tenant,
            "priority": request.priority,
            "ttft_s": slo and slo.ttft_s,
            "tpot_s": slo and slo.tpot_s,
        }
        self._noted[request.id] = {name: value for name, value in known.items() if value}

    def forget(self, request_id: RequestId) -> None:
        """The request was refused without an event."""
        self._noted.pop(request_id, None)

    def observe(self, event: Event) -> None:
        match event:
            case Arrived():
                self._since_start(event.at_s)
            case Finished():
                noted = self._noted.pop(event.request_id, {})
                line = {
                    "at_s": self._since_start(event.arrival_s),
                    "prompt_tokens": event.usage.prompt_tokens,
                    "output_tokens": event.usage.output_tokens,
                    "max_new_tokens": event.max_new_tokens,
                    "end": event.reason.value,
                }
                if event.reason in (FinishReason.ABORT, FinishReason.DEADLINE):
                    line["cancel_s"] = event.at_s - event.arrival_s
                self._write({**line, **self._shared(noted)})
            case Rejected() if event.request_id in self._noted:
                noted = self._noted.pop(event.request_id)
                line = {"at_s": self._since_start(event.at_s), "output_tokens": 0, "end": "rejected"}
                self._write({**line, **self._shared(noted)})

    def _since_start(self, at_s: float) -> float:
        if self._start_s is None:
            self._start_s = at_s
        return at_s - self._start_s

    def _shared(self, noted: dict[str, Any]) -> dict[str, Any]:
        """What was noted, with names in place of keys and of the tenant."""
        line = dict(noted)
        if keys := line.pop("blocks", ()):
            line["block_tokens"] = self._block_tokens
            line["blocks"] = [self._name(key.to_bytes(16, "little")) for key in keys]
        if tenant := line.pop("tenant", ""):
            line["tenant"] = f"t{self._name(tenant.encode()):x}"
        return line

    def _name(self, content: bytes) -> int:
        digest = blake2b(content, digest_size=8, key=self._secret).digest()
        return int.from_bytes(digest, "little") >> (64 - NAME_BITS)

    def _write(self, line: dict[str, Any]) -> None:
        if self.error is not None:
            return
        try:
            self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
            self._file.flush()
            self.lines += 1
        except OSError as error:
            self.error = error


class Recorded:
    """A Service that tells a recorder of every request and passes everything on."""

    def __init__(self, service: Service, recorder: Recorder) -> None:
        self._service = service
        self._recorder = recorder

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        self._recorder.note(request)
        try:
            async with aclosing(self._service.generate(request)) as outputs:  # type: ignore[type-var]
                async for output in outputs:
                    yield output
        finally:
            self._recorder.forget(request.id)  # after its last event

    def abort(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None:
        self._service.abort(request_id, reason)

    def status(self) -> Status:
        return self._service.status()

    async def drain(self, timeout_s: float) -> bool:
        return await self._service.drain(timeout_s)
