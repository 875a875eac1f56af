"""What the gateway says when it refuses: one exception with an HTTP status, and the mapping of every other error to it.

Each dialect shapes the body; the status and the sentence are decided here. What was not foreseen is logged with its
stack under an error id, and the client sees the id only.
"""

from __future__ import annotations

import logging
import math
import uuid

from headrace.core.types import HeadraceError, InvalidRequest, Overloaded, Unavailable

LOG = logging.getLogger("headrace.gateway")

_RETRY_S = 5.0  # where nobody can know: a replica that has failed is replaced or back within seconds, or not at all


class Refused(HeadraceError):
    """A request that ends with an error: `status` is HTTP's, `code` a stable word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        more: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.more = more  # headers that go with it

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        if self.retry_after_s is None:
            return [*self.more]
        return [(b"retry-after", str(max(1, math.ceil(self.retry_after_s))).encode()), *self.more]


def bad(message: str, param: str | None = None, code: str | None = None) -> Refused:
    """A 400."""
    return Refused(400, message, code=code, param=param)


def refused(error: BaseException) -> Refused:
    """The refusal that tells a client about `error`. Logs the stack of anything unexpected."""
    match error:
        case Refused():
            return error
        case InvalidRequest():
            return bad(str(error), error.param)
        case Overloaded():
            return Refused(429, str(error), code="overloaded", retry_after_s=error.retry_after_s)
        case Unavailable():
            retry_s = _RETRY_S if error.retry_after_s is None else error.retry_after_s
            return Refused(503, str(error), code="unavailable", retry_after_s=retry_s)
    return internal("unexpected error", error)


def internal(what: str, error: BaseException | None = None) -> Refused:
    """A 500 whose cause is in the log and nowhere else: messages of exceptions carry paths, addresses and prompts."""
    error_id = uuid.uuid4().hex[:12]
    LOG.error("error %s: %s", error_id, what.replace("\n", " "), exc_info=error)
    return Refused(500, f"The server failed on this request; its log has details under {error_id}.", code="internal")
