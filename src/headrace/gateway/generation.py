"""The innermost handler: a call becomes requests to the service, and their outputs become text.

It encodes prompts, checks them against the capacity, expands `choices`, names blocks, and per choice runs the
transcript and stops the service's work when a stop string appears. It holds a service and a text, and no state.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from headrace.core import clock, keys
from headrace.core.ports import Capacity, Service
from headrace.core.types import FinishReason, Output, Request, Sampling, Tokens, Unavailable, Usage
from headrace.gateway.chain import Began, Call, Chat, Ended, Event, Piece, closing, merged
from headrace.gateway.errors import Refused, bad, internal
from headrace.gateway.text import INLINE_CHARS, Text

_SEED_STEP = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: seeds of choices lie far apart
_SEEDS = 1 << 63


@dataclass(slots=True)
class _Tally:
    """What one choice used."""

    output_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0

    def note(self, usage: Usage | None) -> None:
        if usage is not None:
            self.cached_tokens, self.preemptions = usage.cached_tokens, usage.preemptions


@dataclass(frozen=True, slots=True)
class Generation:
    """A handler."""

    service: Service
    text: Text

    async def __call__(self, call: Call) -> AsyncIterator[Event]:
        prompts = await self._encode(call)
        requests = await self._requests(call, prompts)
        tallies = [_Tally() for _ in requests]
        streams = [self._choice(at, request, call, tallies[at]) for at, request in enumerate(requests)]
        began = False
        async with closing(merged(streams)) as pieces:
            async for piece in pieces:
                if not began:
                    began = True
                    yield Began(tuple(prompts))
                yield piece
        yield Ended(_total(prompts, tallies))

    async def _encode(self, call: Call) -> list[tuple[int, ...]]:
        capacity = self.service.status().capacity
        if isinstance(call.asked, Chat):
            chars = sum(len(message["content"]) for message in call.asked.messages)
            _check_length(self.text.fewest_tokens(chars), call, capacity, "messages")
            prompts = [await self.text.encode_chat(call.asked)]
        else:
            prompts = [await self._encode_one(prompt, call, capacity) for prompt in call.asked]
        for prompt in prompts:
            _check_length(len(prompt), call, capacity, "messages" if isinstance(call.asked, Chat) else "prompt")
        return prompts

    async def _encode_one(self, prompt: str | tuple[int, ...], call: Call, capacity: Capacity) -> tuple[int, ...]:
        if isinstance(prompt, str):
            _check_length(self.text.fewest_tokens(len(prompt)), call, capacity, "prompt")
            prompt = await self.text.encode(prompt)
        if not prompt:
            raise bad("The prompt is empty: it has no tokens.", "prompt")
        if max(prompt) >= capacity.vocab:
            raise bad(f"The prompt has a token id beyond the vocabulary of {capacity.vocab} tokens.", "prompt")
        return prompt

    async def _requests(self, call: Call, prompts: list[tuple[int, ...]]) -> list[Request]:
        capacity = self.service.status().capacity
        for token_id in (*call.stop_token_ids, *(token_id for token_id, _ in call.sampling.logit_bias)):
            if token_id >= capacity.vocab:
                raise bad(f"Token id {token_id} is beyond the vocabulary of {capacity.vocab} tokens.")
        # a chain of JSON strings, so that no two different tuples give the same salt
        salt = json.dumps([call.model, None, call.tenant, call.cache_salt]).encode()
        many = len(prompts) * call.choices > 1
        requests: list[Request] = []
        for prompt in prompts:
            block_keys = await self._block_keys(prompt, capacity.block_tokens, salt)
            for choice in range(call.choices):
                request_id = f"{call.id}-{len(requests)}" if many else call.id
                requests.append(self._request(request_id, call, prompt, choice, block_keys, salt))
        return requests

    async def _block_keys(self, prompt: tuple[int, ...], block_tokens: int, salt: bytes) -> tuple[int, ...]:
        if len(prompt) > INLINE_CHARS:
            return await self.text.off_loop(lambda: keys.block_keys(prompt, block_tokens, salt))
        return keys.block_keys(prompt, block_tokens, salt)

    def _request(
        self,
        request_id: str,
        call: Call,
        prompt: tuple[int, ...],
        choice: int,
        block_keys: tuple[int, ...],
        salt: bytes,
    ) -> Request:
        left = self.service.status().capacity.max_context_tokens - len(prompt)
        sampling, now_s = call.sampling, clock.now()
        return Request(
            id=request_id,
            prompt=(Tokens(prompt),),
            arrival_s=now_s,
            max_new_tokens=left if call.max_new_tokens is None else call.max_new_tokens,
            sampling=_reseeded(sampling, choice) if choice else sampling,
            stop_token_ids=call.stop_token_ids | (frozenset() if call.ignore_eos else self.text.eos_token_ids),
            block_keys=block_keys,
            salt=salt,
            priority=call.priority,
            tenant=call.tenant,
            model=call.model,
            deadline_s=None if call.deadline_s is None else now_s + call.deadline_s,
        )

    async def _choice(self, at: int, request: Request, call: Call, tally: _Tally) -> AsyncIterator[Piece]:
        """Pieces of one choice, the last one with `finish`."""
        transcript = self.text.transcript(call.stop)
        async with closing(self.service.generate(request)) as outputs:
            async for output in outputs:
                tally.note(output.usage)
                _check_finish(output)
                token_ids = output.token_ids
                if output.finish is FinishReason.STOP and token_ids and token_ids[-1] in request.stop_token_ids:
                    token_ids = token_ids[:-1]  # a stop token ends the text and is not part of it
                read = transcript.tokens
                text = transcript.push(token_ids, output.logprobs[: len(token_ids)])
                # of tokens that came at once, those behind a stop string are as if they had never been drawn
                tally.output_tokens += transcript.tokens - read if transcript.stopped else len(output.token_ids)
                if output.finish is not None:
                    text += transcript.end()
                if transcript.stopped:
                    break
                every = output.finish is not None
                logprobs = transcript.logprobs(all_of_them=every) if output.logprobs or every else ()
                if text or logprobs or output.prompt_logprobs or every:
                    yield Piece(
                        at,
                        text,
                        logprobs=logprobs,
                        prompt_logprobs=output.prompt_logprobs,
                        finish=output.finish,
                    )
            else:
                return
            shown = transcript.logprobs()
            if output.finish is None:
                # the text is complete, so it goes out before the service has said what the request had cost
                yield Piece(at, text, logprobs=shown, prompt_logprobs=output.prompt_logprobs)
                self.service.abort(request.id, FinishReason.STOP)
                async for rest in outputs:
                    tally.note(rest.usage)
                text, shown = "", ()
            yield Piece(at, text, logprobs=shown, finish=FinishReason.STOP, stop_string=transcript.stop_string)


def _reseeded(sampling: Sampling, choice: int) -> Sampling:
    return replace(sampling, seed=(sampling.seed + choice * _SEED_STEP) % _SEEDS)


def _check_length(prompt_tokens: int, call: Call, capacity: Capacity, param: str) -> None:
    limit, wanted = capacity.max_context_tokens, 1 if call.max_new_tokens is None else call.max_new_tokens
    if prompt_tokens + wanted > limit:
        raise bad(
            f"This model's context is {limit} tokens; the prompt has at least {prompt_tokens} and the answer asks for "
            f"{wanted}. Shorten the prompt or lower max_tokens.",
            param,
            "context_length_exceeded",
        )


def _check_finish(output: Output) -> None:
    """Raise for the endings that are not an answer."""
    match output.finish:
        case FinishReason.ABORT:
            raise Unavailable("The server ended this request, most likely because it is shutting down. Try again.")
        case FinishReason.DEADLINE:
            raise Refused(504, "The request did not finish before its deadline.", code="deadline_exceeded")
        case FinishReason.ERROR:
            raise internal(f"request {output.request_id} failed: {output.error}")


def _total(prompts: list[tuple[int, ...]], tallies: list[_Tally]) -> Usage:
    """Choices are ordered prompt by prompt; of those that share a prompt the first one says what was cached."""
    choices = len(tallies) // len(prompts)
    return Usage(
        prompt_tokens=sum(map(len, prompts)),
        output_tokens=sum(tally.output_tokens for tally in tallies),
        cached_tokens=sum(tally.cached_tokens for tally in tallies[::choices]),
        preemptions=sum(tally.preemptions for tally in tallies),
    )
