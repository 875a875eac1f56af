"""From token ids to text, one token at a time: incremental decoding, stop strings, and which logprobs to show when.

A `Transcript` belongs to one choice. Its text is exactly what decoding all tokens at once would give, cut before the
first stop string, and every prefix of it that is released ends on a whole character. Work per token is constant.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from headrace.core.types import TokenLogprob


class Decoder(Protocol):
    """Turns the pieces of tokens into text. A piece is bytes where a token may be part of a character."""

    def push(self, piece: bytes | str) -> str: ...

    def end(self) -> str:
        """What was held back, with U+FFFD for what never became a character."""
        ...


class ByteDecoder:
    """For byte-level BPE: all tokens are bytes; a maximal invalid subsequence becomes one U+FFFD (Unicode 3.9)."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, piece: bytes | str) -> str:
        assert isinstance(piece, bytes)
        return self._utf8.decode(piece)

    def end(self) -> str:
        return self._utf8.decode(b"", True)


class RunDecoder:
    """For SentencePiece with byte fallback: a run of byte tokens is one UTF-8 string or as many U+FFFD as bytes, so
    it is held until it ends. `strip` leading spaces of the whole text are dropped."""

    def __init__(self, strip: int) -> None:
        self._run = bytearray()
        self._strip = strip

    def push(self, piece: bytes | str) -> str:
        if isinstance(piece, bytes):
            self._run += piece
            return ""
        return self._stripped(self._flush() + piece)

    def end(self) -> str:
        return self._stripped(self._flush())

    def _flush(self) -> str:
        if not self._run:
            return ""
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text


class StopStrings:
    """Finds the first stop string to be completed (Knuth, Morris, Pratt 1977; one automaton per string).

    The automaton's state is the length of the longest beginning of a stop string that the text ends with: just what
    must be held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _failures(stop)) for stop in stops]
        self._states = [0] * len(stops)
        self._held = ""
        self.found: str | None = None  # the one that is complete

    def push(self, text: str) -> tuple[str, bool]:
        """Text that may be shown now, and whether a stop string is complete: then nothing may follow."""
        if not self._stops:
            return text, False
        known = self._held + text
        for at in range(len(self._held), len(known)):
            if stop_length := self._step(known[at]):
                self._held = ""
                self.found = known[at + 1 - stop_length : at + 1]
                return known[: at + 1 - stop_length], True
        shown = len(known) - max(self._states)
        self._held = known[shown:]
        return known[:shown], False

    def end(self) -> str:
        """What was held back, when no more text will come."""
        held, self._held = self._held, ""
        return held

    def _step(self, char: str) -> int:
        """Length of the longest stop string that `char` completes, or 0."""
        complete = 0
        for index, (stop, failures) in enumerate(self._stops):
            state = self._states[index]
            while state and stop[state] != char:
                state = failures[state - 1]
            state += stop[state] == char
            self._states[index] = state
            if state == len(stop):
                complete = max(complete, state)
        return complete


def _failures(stop: str) -> list[int]:
    """For each beginning of `stop`, the length of its longest proper beginning that is also its end."""
    failures, length = [0] * len(stop), 0
    for at in range(1, len(stop)):
        while length and stop[at] != stop[length]:
            length = failures[length - 1]
        length += stop[at] == stop[length]
        failures[at] = length
    return failures


class Transcript:
    """The text of one choice while it grows."""

    def __init__(self, pieces: Sequence[bytes | str], decoder: Decoder, stops: Sequence[str]) -> None:
        self._pieces = pieces
        self._decoder = decoder
        self._stops = StopStrings(stops)
        self._decoded_chars = 0
        self._released_chars = 0
        self._withheld: deque[tuple[int, TokenLogprob]] = deque()  # (where the token's text starts, its logprob)
        self.tokens = 0  # read
        self.stopped = False

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.found

    def push(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> str:
        """Text to release after these tokens; sets `stopped` when they complete a stop string, and reads no further."""
        text = ""
        for at, token_id in enumerate(token_ids):
            self.tokens += 1
            if at < len(logprobs):
                self._withheld.append((self._decoded_chars, logprobs[at]))
            # ids without a token, and special tokens, are not there: they do not even end a run of bytes
            if 0 <= token_id < len(self._pieces) and (piece := self._pieces[token_id]):
                grown = self._decoder.push(piece)
                self._decoded_chars += len(grown)
                text += self._release(grown)
            if self.stopped:
                break
        return text

    def end(self) -> str:
        """Text to release when no more tokens come."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.end())
        if not self.stopped:
            held = self._stops.end()
            self._released_chars += len(held)
            text += held
        return text

    def logprobs(self, *, all_of_them: bool = False) -> tuple[TokenLogprob, ...]:
        """Logprobs of tokens whose text has begun to show since the last call; or of all that are left."""
        shown: list[TokenLogprob] = []
        while self._withheld and (all_of_them or self._withheld[0][0] < self._released_chars):
            shown.append(self._withheld.popleft()[1])
        return tuple(shown)

    def _release(self, text: str) -> str:
        if text:
            text, self.stopped = self._stops.push(text)
            self._released_chars += len(text)
        return text
