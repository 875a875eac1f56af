"""One choice while it is written: outputs of the service become pieces of text, reasoning and calls.

It also sees when the answer is complete before the service does: a stop string, the last call that is wanted, or the
budget of the answer. Owns the state of one choice.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.core.thinking import Part, after, begin
from headrace.core.types import FinishReason, Output, Thinking, TokenLogprob, Usage
from headrace.gateway.chain import Piece
from headrace.gateway.speech.answer import Answer, Parts
from headrace.gateway.text import Text
from headrace.gateway.transcript import Transcript


@dataclass(slots=True)
class Tally:
    """What one choice used."""

    output_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0

    def note(self, usage: Usage | None) -> None:
        if usage is not None:
            self.cached_tokens, self.preemptions = usage.cached_tokens, usage.preemptions


class Draft:
    """`ended` is set when the answer is complete; what the service draws after that is nobody's."""

    def __init__(
        self,
        choice: int,
        transcript: Transcript,
        answer: Answer | None,
        thinking: Thinking | None,
        stop_token_ids: frozenset[int],
        answer_tokens: int | None,
        text: Text,
        tally: Tally,
    ) -> None:
        self.ended: FinishReason | None = None
        self._choice = choice
        self._transcript = transcript
        self._answer = answer
        self._thinking = thinking
        self._stop_token_ids = stop_token_ids
        self._answer_tokens = answer_tokens
        self._text = text
        self._tally = tally
        self._phase = begin(thinking)
        self._answered = 0  # tokens after the reasoning
        self._finished = False

    def add(self, output: Output) -> Piece | None:
        """What an output adds, if anything. The last output's piece has `finish`, unless `ended` is set."""
        self._tally.note(output.usage)
        token_ids = self._within_budget(output.token_ids)
        drawn = len(token_ids)
        if output.finish is FinishReason.STOP and token_ids and token_ids[-1] in self._stop_token_ids:
            token_ids = token_ids[:-1]  # a stop token ends the text and is not part of it
        read = self._transcript.tokens
        text = self._transcript.push(token_ids, output.logprobs[: len(token_ids)])
        # of tokens that came at once, those behind a stop string are as if they had never been drawn
        self._tally.output_tokens += self._transcript.tokens - read if self._transcript.stopped else drawn
        last = output.finish is not None or self.ended is not None
        if last:
            text += self._transcript.end()
        if self._transcript.stopped:
            self.ended, last = FinishReason.STOP, True
        parts = self._parts(text, last)
        if self.ended is None and self._answer is not None and self._answer.full:
            self.ended = FinishReason.STOP
        finish = output.finish if self.ended is None else None
        logprobs = self._logprobs(output, last)
        if not (parts.text or parts.reasoning or parts.calls or logprobs or output.prompt_logprobs or finish):
            return None
        return self._piece(parts, logprobs, output.prompt_logprobs, finish)

    def last(self, finish: FinishReason | None) -> Piece:
        """The end of an answer that is complete."""
        return self._piece(Parts(), (), (), finish)

    def _logprobs(self, output: Output, last: bool) -> tuple[TokenLogprob, ...]:
        every = last and not self._transcript.stopped
        return self._transcript.logprobs(all_of_them=every) if output.logprobs or last else ()

    def _within_budget(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Count reasoning and answer, and cut where the answer's budget ends."""
        if self._thinking is None and self._answer_tokens is None:
            return token_ids
        for at, token_id in enumerate(token_ids):
            closing = self._phase.part in (Part.THINKING, Part.CLOSING)  # what ends the reasoning is part of it
            self._phase = after(self._phase, self._thinking, self._text.token_bytes(token_id))
            self._answered += self._phase.part is Part.ANSWER and not closing
            if self._answered == self._answer_tokens:
                self.ended = FinishReason.STOP if token_id in self._stop_token_ids else FinishReason.LENGTH
                token_ids = token_ids[: at + 1]
                break
        self._tally.reasoning_tokens = self._phase.tokens
        return token_ids

    def _parts(self, text: str, last: bool) -> Parts:
        if self._answer is None:
            return Parts(text=text)
        parts = self._answer.push(text)
        if last:
            end = self._answer.end()
            parts.text, parts.reasoning = parts.text + end.text, parts.reasoning + end.reasoning
            parts.calls += end.calls
        return parts

    def _piece(
        self,
        parts: Parts,
        logprobs: tuple[TokenLogprob, ...],
        prompt_logprobs: tuple[TokenLogprob, ...],
        finish: FinishReason | None,
    ) -> Piece:
        stop_string = self._transcript.stop_string if finish is FinishReason.STOP else None
        called = finish is FinishReason.STOP and self._answer is not None and self._answer.called
        calls = tuple(parts.calls)
        return Piece(
            self._choice, parts.text, parts.reasoning, calls, logprobs, prompt_logprobs, finish, called, stop_string
        )
