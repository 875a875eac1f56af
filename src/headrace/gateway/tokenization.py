"""The innermost handlers of text without generation: what prompts are as tokens, and tokens as text. No state."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from headrace.core.ports import Service
from headrace.gateway.chain import Chat, Prompt
from headrace.gateway.errors import bad
from headrace.gateway.text import INLINE_CHARS, Text


@dataclass(frozen=True, slots=True)
class Tokenize:
    """What a client wants to see as tokens."""

    model: str
    asked: Chat | Prompt


@dataclass(frozen=True, slots=True)
class Detokenize:
    """What a client wants to see as text."""

    model: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The one event: token ids and the text they stand for."""

    ids: tuple[int, ...]
    text: str = ""


@dataclass(frozen=True, slots=True)
class Tokenization:
    """A handler: token ids of a conversation or a prompt, exactly as the model would be given them."""

    text: Text

    async def __call__(self, call: Tokenize) -> AsyncIterator[Tokenized]:
        asked = call.asked
        if isinstance(asked, Chat):
            yield Tokenized(await self.text.encode_chat(asked))
        else:
            yield Tokenized(await self.text.encode(asked) if isinstance(asked, str) else asked)


@dataclass(frozen=True, slots=True)
class Detokenization:
    """A handler: the text of token ids; special tokens have none."""

    text: Text
    service: Service

    async def __call__(self, call: Detokenize) -> AsyncIterator[Tokenized]:
        ids = call.ids
        vocab = self.service.status().capacity.vocab
        if ids and max(ids) >= vocab:
            raise bad(f"tokens: a token id is beyond the vocabulary of {vocab} tokens.", "tokens")
        if len(ids) > INLINE_CHARS:
            yield Tokenized(ids, await self.text.off_loop(lambda: self._decode(ids)))
        else:
            yield Tokenized(ids, self._decode(ids))

    def _decode(self, ids: tuple[int, ...]) -> str:
        walk = self.text.transcript(())
        return walk.push(ids) + walk.end()
