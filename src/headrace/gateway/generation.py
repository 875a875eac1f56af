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
from headrace.core.types import (
    FinishReason,
    Grammar,
    Output,
    Request,
    Sampling,
    Thinking,
    Tokens,
    Unavailable,
    Usage,
)
from headrace.gateway.bounds import MAX_TOKEN_ID
from headrace.gateway.chain import Began, Call, Chat, Ended, Event, Piece, Tools, closing, merged, request_ids
from headrace.gateway.checks import Checks
from headrace.gateway.draft import Draft, Tally
from headrace.gateway.errors import Refused, bad, internal
from headrace.gateway.speech.answer import Answer
from headrace.gateway.speech.demand import held_to
from headrace.gateway.text import INLINE_CHARS, Text

_SEED_STEP = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: seeds of choices lie far apart
_SEEDS = 1 << 63


@dataclass(frozen=True, slots=True)
class Generation:
    """A handler."""

    service: Service
    text: Text
    check: Checks | None = None  # None: the service holds no answer to a grammar or to a budget

    async def __call__(self, call: Call) -> AsyncIterator[Event]:
        demand = await self._demand(call)
        prompts, begun = await self._encode(call)
        thinking = self._thinking(call, demand, begun)
        requests = await self._requests(call, prompts, demand, thinking)
        tallies = [Tally() for _ in requests]
        streams = [self._choice(at, request, call, begun, tallies[at]) for at, request in enumerate(requests)]
        began = False
        async with closing(merged(streams)) as pieces:
            async for piece in pieces:
                if not began:
                    began = True
                    yield Began(tuple(prompts))
                yield piece
        yield Ended(_total(prompts, tallies), sum(tally.reasoning_tokens for tally in tallies))

    async def _demand(self, call: Call) -> Grammar | None:
        """What the answer is held to, compiled once so that it is known to be usable. Raises Refused."""
        tools = call.asked.tools if isinstance(call.asked, Chat) else Tools()
        demand = held_to(call.grammar, tools, self.text.style.calls, self.text.token_of)
        if demand is None:
            return None
        if self.check is None:
            raise bad("This server holds no answer to a grammar or a schema.", "response_format")
        await self.check(demand, "tools" if call.grammar is None else "response_format")
        return demand

    def _thinking(self, call: Call, demand: Grammar | None, begun: bool) -> Thinking | None:
        """Known to the executor only where it has something to do."""
        if not isinstance(call.asked, Chat):
            return None
        thinking = self.text.thinking(begun, call.thinking_tokens)
        if thinking is None and call.thinking_tokens is not None:
            raise bad("This model does not mark its reasoning, so a budget for it has no meaning.", "thinking_budget")
        return thinking if self.check and (demand or call.thinking_tokens is not None) else None

    async def _encode(self, call: Call) -> tuple[list[tuple[int, ...]], bool]:
        """The prompts, and whether they end inside the reasoning."""
        capacity, begun = self.service.status().capacity, False
        if isinstance(call.asked, Chat):
            chars = sum(len(message["content"]) for message in call.asked.messages)
            _check_length(self.text.fewest_tokens(chars), call, capacity, "messages")
            prompt, begun = await self.text.prompted(call.asked)
            prompts = [prompt]
        else:
            prompts = [await self._encode_one(prompt, call, capacity) for prompt in call.asked]
        for prompt in prompts:
            _check_length(len(prompt), call, capacity, "messages" if isinstance(call.asked, Chat) else "prompt")
        return prompts, begun

    async def _encode_one(self, prompt: str | tuple[int, ...], call: Call, capacity: Capacity) -> tuple[int, ...]:
        if isinstance(prompt, str):
            _check_length(self.text.fewest_tokens(len(prompt)), call, capacity, "prompt")
            prompt = await self.text.encode(prompt)
        if not prompt:
            raise bad("The prompt is empty: it has no tokens.", "prompt")
        if max(prompt) >= capacity.vocab:
            raise bad(f"The prompt has a token id beyond the vocabulary of {capacity.vocab} tokens.", "prompt")
        return prompt

    async def _requests(
        self, call: Call, prompts: list[tuple[int, ...]], demand: Grammar | None, thinking: Thinking | None
    ) -> list[Request]:
        capacity = self.service.status().capacity
        for token_id in (*call.stop_token_ids, *(token_id for token_id, _ in call.sampling.logit_bias)):
            if token_id >= capacity.vocab:
                raise bad(f"Token id {token_id} is beyond the vocabulary of {capacity.vocab} tokens.")
        # a chain of JSON strings, so that no two different tuples give the same salt
        salt = json.dumps([call.model, None, call.tenant, call.cache_salt]).encode()
        names, requests = request_ids(call), list[Request]()
        for prompt in prompts:
            block_keys = await self._block_keys(prompt, capacity.block_tokens, salt)
            for choice in range(call.choices):
                request = self._request(names[len(requests)], call, prompt, choice, block_keys, salt)
                requests.append(replace(request, grammar=demand, thinking=thinking))
        if demand is not None:  # a complete answer ends, whatever the client says about end tokens
            ends = self.text.eos_token_ids
            requests = [replace(one, stop_token_ids=one.stop_token_ids | ends) for one in requests]
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
            max_new_tokens=min(left if call.max_new_tokens is None else call.max_new_tokens, self._most(call)),
            sampling=_reseeded(sampling, choice) if choice else sampling,
            stop_token_ids=call.stop_token_ids | (frozenset() if call.ignore_eos else self.text.eos_token_ids),
            block_keys=block_keys,
            salt=salt,
            priority=call.priority,
            tenant=call.tenant,
            weight=call.weight,
            model=call.model,
            deadline_s=None if call.deadline_s is None else now_s + call.deadline_s,
        )

    def _most(self, call: Call) -> int:
        """Tokens that the budgets allow altogether: admission counts on no more."""
        if call.thinking_tokens is None or call.answer_tokens is None or self.check is None:
            return MAX_TOKEN_ID
        thinking = self.text.thinking(True, call.thinking_tokens)
        closing = len(thinking.closing_ids) + 1 if thinking else 0  # and the opening mark
        return call.thinking_tokens + closing + call.answer_tokens

    async def _choice(self, at: int, request: Request, call: Call, begun: bool, tally: Tally) -> AsyncIterator[Piece]:
        """Pieces of one choice, the last one with `finish`."""
        draft = self._draft(at, request, call, begun, tally)
        async with closing(self.service.generate(request)) as outputs:
            async for output in outputs:
                _check_finish(output)
                piece = draft.add(output)
                if piece is not None:
                    yield piece
                if draft.ended is not None:
                    break
            else:
                return
            if output.finish is None:
                # the answer is complete, so it goes out before the service has said what the request had cost
                self.service.abort(request.id, draft.ended)
                async for rest in outputs:
                    tally.note(rest.usage)
            yield draft.last(draft.ended)

    def _draft(self, at: int, request: Request, call: Call, begun: bool, tally: Tally) -> Draft:
        chat = isinstance(call.asked, Chat)
        tools = call.asked.tools if isinstance(call.asked, Chat) else Tools()
        transcript = self.text.transcript(call.stop, marks=chat)
        answer = Answer(self.text.style, tools, begun) if chat else None
        thinking = self.text.thinking(begun, call.thinking_tokens) if chat else None
        return Draft(at, transcript, answer, thinking, request.stop_token_ids, call.answer_tokens, self.text, tally)


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
        case FinishReason.INVALID:
            raise bad(f"The request cannot be finished: {output.error}.", code="invalid_request")
        case FinishReason.ERROR:
            raise internal(f"request {output.request_id} failed: {output.error}")


def _total(prompts: list[tuple[int, ...]], tallies: list[Tally]) -> Usage:
    """Choices are ordered prompt by prompt; of those that share a prompt the first one says what was cached."""
    choices = len(tallies) // len(prompts)
    return Usage(
        prompt_tokens=sum(map(len, prompts)),
        output_tokens=sum(tally.output_tokens for tally in tallies),
        cached_tokens=sum(tally.cached_tokens for tally in tallies[::choices]),
        preemptions=sum(tally.preemptions for tally in tallies),
    )
