"""Reads bodies of multipart/form-data (RFC 7578), the form in which files are uploaded: bounded, over bytes in memory.

Decides what is a well-formed part; what the fields mean is for others. No state.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from headrace.gateway.errors import Refused, bad

KIND = b"multipart/form-data"
_MOST_PARTS = 16
_MOST_HEAD_BYTES = 8 << 10  # of one part's headers
_TOKEN = rb"[A-Za-z0-9'()+_,./:=?-]{1,70}"  # what a boundary is made of, without spaces


@dataclass(frozen=True, slots=True)
class Part:
    """A field of a form: of a file, `filename` says how its owner calls it."""

    filename: str | None
    content: bytes

    def text(self, name: str) -> str:
        """Raises Refused if it is no text of sensible length."""
        try:
            if len(self.content) <= 4096:
                return self.content.decode()
        except UnicodeDecodeError:
            pass
        raise bad(f"{name}: expected a short text in UTF-8.", name)


def boundary(content_type: bytes) -> bytes:
    """What stands between the parts. Raises Refused if the header is not one of a form."""
    kind, _, options = content_type.partition(b";")
    if kind.strip().lower() != KIND:
        message = "Send this with the header 'Content-Type: multipart/form-data; boundary=...'."
        raise Refused(415, message, code="unsupported_media_type")
    found = re.search(rb';\s*boundary=(?:"(%b)"|(%b))\s*(?:;|$)' % (_TOKEN, _TOKEN), b";" + options, re.IGNORECASE)
    if not found:
        raise bad("The Content-Type header has no boundary.", code="invalid_multipart")
    return found[1] or found[2]


def read(body: bytes, between: bytes) -> Mapping[str, Part]:
    """The parts of a body by their names. Raises Refused for what is no form, or too much of one."""
    parts: dict[str, Part] = {}
    for head, content in _parts(body, b"--" + between):
        name, filename = _names(head)
        if name in parts:
            raise bad(f"The form has the field {name[:64]!r} twice.", code="invalid_multipart")
        parts[name] = Part(filename, content)
    return parts


def _parts(body: bytes, mark: bytes) -> Iterator[tuple[bytes, bytes]]:
    """--mark CRLF head CRLF CRLF content CRLF --mark ... --mark--"""
    wrong = bad("The body is not a form: its parts do not fit the boundary.", code="invalid_multipart")
    at = 0 if body.startswith(mark) else body.find(b"\r\n" + mark) + 2
    if not body.startswith(mark, at):
        raise wrong
    for _ in range(_MOST_PARTS + 1):
        at += len(mark)
        if body.startswith(b"--", at):
            return
        head_end = body.find(b"\r\n\r\n", at, at + _MOST_HEAD_BYTES)
        end = body.find(b"\r\n" + mark, head_end + 2)
        if not body.startswith(b"\r\n", at) or head_end < 0 or end < 0:
            raise wrong
        yield body[at + 2 : head_end], body[head_end + 4 : max(head_end + 4, end)]
        at = end + 2
    raise bad(f"The form has more than {_MOST_PARTS} parts.", code="invalid_multipart")


def _names(head: bytes) -> tuple[str, str | None]:
    """The names of a field and of its file, from Content-Disposition."""
    for line in head.split(b"\r\n"):
        header, _, value = line.partition(b":")
        if header.strip().lower() == b"content-disposition":
            options = dict(re.findall(rb';\s*(name|filename)="((?:[^"\\]|\\.)*)"', value))
            if b"name" in options:
                filename = options.get(b"filename")
                name = options[b"name"].decode(errors="replace")
                return name, None if filename is None else filename.decode(errors="replace")
    raise bad("A part of the form has no name.", code="invalid_multipart")
