"""Which tokens may be drawn next: the `SequenceController` of one request, made of its thinking and its grammar.

Masks are computed beside the forward pass, on a thread of their own, and given to the sampler as rows of bits; draws
move the control on, and drafts that were not accepted leave no trace. Owns the state of every controlled request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np

from headrace.core.thinking import Part, Phase, after, begin
from headrace.core.types import InvalidRequest, Request, RequestId, Thinking

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from headrace.device.grammar import Grammars, Vocabulary

Bits = np.ndarray  # [ceil(vocab / 32)] int32, a bit for every token that may be drawn
Wanted = tuple["SequenceController", Sequence[int]]  # whose masks, with the drafts they are for


class SequenceController(Protocol):
    """What one request may draw."""

    @property
    def failure(self) -> str | None:
        """Why it cannot go on; a sentence."""
        ...

    def masks(self, drafts: Sequence[int]) -> list[Bits | None]:
        """For the next token, and for the one after each draft if that is drawn; None where all are allowed. Leaves
        the controller as it was."""
        ...

    def drew(self, tokens: Sequence[int]) -> None: ...


class Control:
    """Thinking, then an answer that follows a grammar; either may be absent."""

    def __init__(
        self, thinking: Thinking | None, matcher: LLMatcher | None, vocabulary: Vocabulary, vocab: int
    ) -> None:
        self._thinking = thinking
        self._matcher = matcher
        self._pieces = vocabulary.pieces
        self._ends = vocabulary.end_ids
        self._words = -(-vocab // 32)
        self._phase = begin(thinking)
        self.failure: str | None = None

    def masks(self, drafts: Sequence[int]) -> list[Bits | None]:
        phase, consumed = self._phase, 0
        found = [self._mask()]
        for at, token in enumerate(drafts):
            if found[-1] is not None and not _allows(found[-1], token):
                found += [None] * (len(drafts) - at)  # what comes after a draft that cannot be drawn is not drawn
                break
            consumed += self._step(token)
            found.append(self._mask())
        if consumed and self._matcher is not None:
            self._matcher.rollback(consumed)
        self._phase = phase
        return found

    def drew(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._step(token)
        self._notice()

    def _step(self, token: int) -> bool:
        """Move on by one token. Returns whether the grammar has consumed it."""
        piece = self._pieces[token] if token < len(self._pieces) else b""
        before, self._phase = self._phase, after(self._phase, self._thinking, piece)
        if self._matcher is None:
            return False
        if before.part is Part.BEFORE and token != self._opening:  # thinking begins with its own token, or not at all
            before = self._phase = Phase(Part.ANSWER)
        if before.part is not Part.ANSWER or self._matcher.is_stopped():
            return False
        return self._matcher.consume_token(token)

    @property
    def _opening(self) -> int | None:
        return None if self._thinking is None else self._thinking.opening_id

    def _mask(self) -> Bits | None:
        match self._phase.part:
            case Part.CLOSING:
                assert self._thinking is not None
                return self._only((self._thinking.closing_ids[self._phase.forced],))
            case Part.THINKING:
                return None if self._matcher is None else self._all_but(self._ends)
        if self._matcher is None:
            return None
        bits = self._of_grammar(self._matcher)
        if self._phase.part is Part.BEFORE and self._opening is not None:
            _set(bits, self._opening)
        return bits

    def _of_grammar(self, matcher: LLMatcher) -> Bits:
        bits = np.zeros(self._words, dtype=np.int32)
        if not matcher.is_stopped():
            known = np.frombuffer(matcher.compute_bitmask(), dtype=np.int32)[: self._words]
            bits[: len(known)] = known  # a model may have more logits than tokens
        self._notice()
        return bits if bits.any() else self._only(self._ends)

    def _notice(self) -> None:
        if self.failure is None and self._matcher is not None and self._matcher.is_error():
            self.failure = "the grammar became too complex while the answer was written; use a simpler one"

    def _only(self, tokens: Sequence[int] | frozenset[int]) -> Bits:
        bits = np.zeros(self._words, dtype=np.int32)
        for token in tokens:
            _set(bits, token)
        return bits

    def _all_but(self, tokens: frozenset[int]) -> Bits:
        return ~self._only(tokens)


def _allows(bits: Bits, token: int) -> bool:
    return bool(bits[token // 32] >> (token % 32) & 1)


def _set(bits: Bits, token: int) -> None:
    bits.view(np.uint32)[token // 32] |= np.uint32(1 << (token % 32))


class Controls:
    """Makes controls, and computes the masks of a step beside its forward pass."""

    def __init__(self, grammars: Grammars, vocab: int) -> None:
        self._grammars = grammars
        self._vocab = vocab
        self._thread = ThreadPoolExecutor(1, "headrace-masks")

    def of(self, request: Request, output_ids: Sequence[int]) -> Control | None:
        """For a request that has drawn these tokens already; None if it may draw anything."""
        if request.grammar is None and request.thinking is None:
            return None
        matcher, failure = None, None
        try:
            matcher = None if request.grammar is None else self._grammars.matcher(request.grammar)
        except InvalidRequest as error:  # whoever sent it did not check; only this request ends
            failure = str(error)
        control = Control(request.thinking, matcher, self._grammars.vocabulary, self._vocab)
        control.failure = failure
        control.drew(output_ids)
        return control

    def begin(self, wanted: Mapping[RequestId, Wanted]) -> Future[dict[RequestId, list[Bits | None]]]:
        """Start computing; the controls belong to that thread until it has answered."""
        return self._thread.submit(
            lambda: {request_id: control.masks(drafts) for request_id, (control, drafts) in wanted.items()}
        )

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
