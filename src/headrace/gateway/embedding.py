"""The innermost handler of embeddings: texts become token ids, an embedder makes vectors of them.

Decides what happens to texts that are too long (refused, or cut if the caller says so) and how a vector is shortened:
its first numbers, normalised again. Owns the embedding model's tokenizer and the thread where long texts are encoded.
"""

from __future__ import annotations

import asyncio
import json
import math
import struct
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tokenizers import Tokenizer

from headrace.core.ports import Embedder
from headrace.gateway.chain import Prompt
from headrace.gateway.errors import Refused, bad, internal
from headrace.gateway.text import BadTokenizer


@dataclass(frozen=True, slots=True)
class Embed:
    """What a client wants, in no dialect."""

    inputs: tuple[Prompt, ...]
    truncate: bool = False  # cut texts that are too long instead of refusing them
    dimensions: int | None = None  # fewer than the model has


@dataclass(frozen=True, slots=True)
class Embedded:
    """The one event: unit vectors in the order of the inputs."""

    vectors: tuple[tuple[float, ...], ...]
    prompt_tokens: int


class Words:
    """The tokenizer of an embedding model. Every text gets the marks around it that the model was trained with."""

    def __init__(self, tokenizer_json: str) -> None:
        try:
            # a limit that came with the file must not cut texts silently
            spec = json.loads(tokenizer_json) | {"truncation": None, "padding": None}
            self._tokenizer = Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # tokenizers raises bare Exception
            raise BadTokenizer(f"the embedding model's tokenizer cannot be read: {str(error)[:200]}") from error
        self._pool = ThreadPoolExecutor(1, "headrace-words")
        bare = self._encode(["a"], special=False)[0]
        marked = self._encode(["a"])[0]
        at = next((at for at in range(len(marked)) if marked[at : at + len(bare)] == bare), 0)
        self.before, self.after = marked[:at], marked[at + len(bare) :]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._encode, texts)

    def marked(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Token ids of a client with the marks around them, unless they are there already."""
        if self.before and ids[: len(self.before)] == self.before:
            return ids
        return self.before + ids + self.after

    def cut(self, ids: tuple[int, ...], most: int) -> tuple[int, ...]:
        """The first tokens, and the marks at the end."""
        return ids if len(ids) <= most else ids[: most - len(self.after)] + self.after

    def _encode(self, texts: Sequence[str], special: bool = True) -> list[tuple[int, ...]]:
        return [tuple(found.ids) for found in self._tokenizer.encode_batch(list(texts), add_special_tokens=special)]


@dataclass(frozen=True, slots=True)
class Embedding:
    """A handler."""

    embedder: Embedder
    words: Words

    async def __call__(self, asked: Embed) -> AsyncIterator[Embedded]:
        limits = self.embedder.encoding
        if asked.dimensions is not None and asked.dimensions > limits.dimensions:
            raise bad(f"dimensions: this model's vectors have {limits.dimensions}.", "dimensions")
        sequences = await self._sequences(asked, limits.max_tokens, limits.vocab)
        try:
            vectors = await self.embedder.embed(sequences)
        except Refused:
            raise
        except Exception as error:
            if type(error).__name__ == "EncodingFailed":
                raise internal("embedding failed", error) from error
            raise
        shortened = tuple(_shortened(vector, asked.dimensions) for vector in vectors)
        yield Embedded(shortened, sum(map(len, sequences)))

    async def _sequences(self, asked: Embed, most: int, vocab: int) -> list[tuple[int, ...]]:
        texts = [one for one in asked.inputs if isinstance(one, str)]
        encoded = iter(await self.words.encode(texts) if texts else ())
        sequences = []
        for at, one in enumerate(asked.inputs):
            if not one:
                raise bad(f"input: text {at} is empty.", "input")
            if not isinstance(one, str) and max(one) >= vocab:
                raise bad(f"input: a token id is beyond the vocabulary of {vocab} tokens.", "input")
            ids = next(encoded) if isinstance(one, str) else self.words.marked(one)
            if len(ids) > most and not asked.truncate:
                raise bad(
                    f"input: text {at} has {len(ids)} tokens; this model takes {most}. Shorten it, or send "
                    '"truncate": true to have its end cut off.',
                    "input",
                    "context_length_exceeded",
                )
            sequences.append(self.words.cut(ids, most))
        return sequences


def _shortened(vector: bytes, dimensions: int | None) -> tuple[float, ...]:
    values: tuple[float, ...] = struct.unpack(f"<{len(vector) // 4}f", vector)
    if dimensions is None or dimensions >= len(values):
        return values
    length = math.hypot(*values[:dimensions]) or 1.0
    return tuple(value / length for value in values[:dimensions])
