"""The only place where text exists: prompts become token ids here, and tokens become text (with `transcript`).

Chat: what a client wrote can never become a control token. The template's own special tokens are recognised, the same
characters inside a message are encoded as ordinary text. Raw completion prompts do recognise them: there the client
writes the whole prompt. Owns the tokenizer and two worker threads, where everything that is slow happens.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tokenizers import Tokenizer

from headrace.core.types import HeadraceError, Thinking
from headrace.gateway.chain import Chat
from headrace.gateway.errors import bad
from headrace.gateway.speech.style import style_of
from headrace.gateway.speech.told import described, told
from headrace.gateway.template import BadTemplate, ChatTemplate
from headrace.gateway.transcript import ByteDecoder, Decoder, RunDecoder, Transcript

T = TypeVar("T")
INLINE_CHARS = 4096  # shorter prompts are encoded (a millisecond) where they arrive
_SHRINK = 4  # a normaliser may make a text shorter, but hardly by more than this


class BadTokenizer(HeadraceError):
    """A tokenizer that cannot be loaded, or whose tokens cannot be turned back into text one at a time."""


class Text:
    """A model's words: tokenizer, chat template and special tokens."""

    def __init__(
        self,
        tokenizer_json: str,
        chat_template: str | None,
        special: Mapping[str, str],
        eos_token_ids: frozenset[int],
        add_bos: bool,
        tool_parser: str = "auto",
        reasoning: str = "auto",
    ) -> None:
        """`special` names special tokens as templates do: {"bos_token": "<s>", "eos_token": "</s>"}; for the last two,
        see `speech.style`, whose UnknownStyle it may raise."""
        self._spec, self._tokenizer = _load(tokenizer_json)
        self._escaped = _Escaped(self._spec)
        self.eos_token_ids = eos_token_ids
        self._bos: tuple[int, ...] = ()
        if add_bos and (bos_id := self._tokenizer.token_to_id(special.get("bos_token", ""))) is not None:
            self._bos = (bos_id,)
        self._names, self._pieces, self._decoder = _pieces(self._spec, self._tokenizer)
        self._longest_chars = max(map(len, self._names), default=1)
        self._template: ChatTemplate | None = None
        self.why_no_chat = "This model has no chat template"
        if chat_template is not None:
            try:
                self._template = ChatTemplate(chat_template, special)
            except BadTemplate as error:
                self.why_no_chat = f"This model's chat template cannot be used: {error}"
        knows_tools = self._template is not None and self._template.knows_tools
        self.style = style_of(chat_template, knows_tools, tool_parser, reasoning)
        self.special_ids = frozenset(token["id"] for token in self._spec.get("added_tokens") or () if token["special"])
        shown = {token_id: self._names[token_id] for mark in self.style.marks if (token_id := self.token_of(mark))}
        self._marked = _with_marks(self._pieces, shown)
        self._closing_ids: tuple[int, ...] | None = None
        self._pool = ThreadPoolExecutor(2, "headrace-text")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def has_chat(self) -> bool:
        return self._template is not None

    def fewest_tokens(self, chars: int) -> int:
        """No text of so many characters has fewer tokens than this."""
        return chars // (self._longest_chars * _SHRINK)

    async def off_loop(self, work: Callable[[], T]) -> T:
        """Run something slow on a worker thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def encode(self, prompt: str) -> tuple[int, ...]:
        """Token ids of a raw prompt; special tokens in it are recognised, BOS is prepended if the model wants it."""
        if len(prompt) > INLINE_CHARS:
            return await self.off_loop(lambda: self._encode(prompt))
        return self._encode(prompt)

    @property
    def names(self) -> Sequence[bytes]:
        """By token id; see `token_bytes`."""
        return self._names

    def plain_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a text, nothing added; special tokens in it are recognised."""
        return tuple(_ids(self._tokenizer, text))

    def token_of(self, mark: str) -> int | None:
        """The id of a special token."""
        token_id = self._tokenizer.token_to_id(mark)
        return token_id if token_id in self.special_ids else None

    def thinking(self, begun: bool, budget_tokens: int | None) -> Thinking | None:
        """How this model reasons; None if it does not."""
        think = self.style.think
        if think is None:
            return None
        if self._closing_ids is None:
            self._closing_ids = self.plain_ids(f"\n{think.closing}\n\n")
        opening_id = self._tokenizer.token_to_id(think.opening)
        return Thinking(think.opening, think.closing, begun, budget_tokens, self._closing_ids, opening_id)

    async def encode_chat(self, chat: Chat) -> tuple[int, ...]:
        """Token ids of a conversation."""
        return (await self.prompted(chat))[0]

    async def prompted(self, chat: Chat) -> tuple[tuple[int, ...], bool]:
        """Token ids of a conversation, and whether they end inside the reasoning. Always on a worker thread: a template
        may take its time whatever its input."""
        if self._template is None:
            raise bad(f"{self.why_no_chat}; use /v1/completions with a prompt instead.", code="no_chat_template")
        return await self.off_loop(lambda: self._encode_chat(chat))

    def transcript(self, stops: Sequence[str], *, marks: bool = False) -> Transcript:
        """`marks`: special tokens that are marks of this model's style are part of the text."""
        return Transcript(self._marked if marks else self._pieces, self._decoder(), stops)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; special tokens by their name. Empty for ids without a token."""
        return self._names[token_id] if 0 <= token_id < len(self._names) else b""

    def _encode(self, prompt: str) -> tuple[int, ...]:
        ids = tuple(_ids(self._tokenizer, prompt))
        return ids if ids[:1] == self._bos else self._bos + ids

    def _encode_chat(self, chat: Chat) -> tuple[tuple[int, ...], bool]:
        assert self._template is not None
        knows = self._template.knows_tools
        said = chat.messages if knows else told(chat.messages, chat.tools)
        tools = [described(tool) for tool in chat.tools.offered] if knows else []
        (messages, tools), escapes = self._escaped.escape((said, tools))
        prompt = self._template.render(messages, chat.options, tools)
        begun = self.style.think is not None and prompt.rstrip().endswith(self.style.think.opening)
        return self._escaped.encode(prompt) if escapes else tuple(_ids(self._tokenizer, prompt)), begun


class _Escaped:
    """Encodes text in which some special tokens are meant and others are only quoted.

    Every special token s has two unguessable aliases: quote(s) and mark(s). Quoted ones become quote(s) before the
    template sees them; afterwards the others, which the template wrote, become mark(s), and quote(s) becomes s again.
    A second tokenizer knows mark(s) as the special token, and s only as characters.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self._spec = spec
        self._specials: list[str] = [token["content"] for token in spec.get("added_tokens") or () if token["special"]]
        nonce = secrets.token_hex(8)
        self._quote = {special: f"\ue000{nonce}q{at}\ue001" for at, special in enumerate(self._specials)}
        self._mark = {special: f"\ue000{nonce}m{at}\ue001" for at, special in enumerate(self._specials)}
        self._find = _any_of(self._specials)
        self._find_quote = _any_of(list(self._quote.values()))
        self._unquote = {quote: special for special, quote in self._quote.items()}
        self._tokenizer: Tokenizer | None = None
        self._meant: dict[int, int] = {}

    def escape(self, said: Any) -> tuple[Any, bool]:
        """Strings, lists and mappings with quoted special tokens, and whether there were any."""
        found = False

        def escaped(value: Any) -> Any:
            nonlocal found
            if isinstance(value, str):
                text, count = self._find.subn(lambda match: self._quote[match[0]], value)
                found |= count > 0
                return text
            if isinstance(value, Mapping):
                return {escaped(key): escaped(item) for key, item in value.items()}
            if isinstance(value, list | tuple):
                return [escaped(item) for item in value]
            return value

        return escaped(said), found

    def encode(self, prompt: str) -> tuple[int, ...]:
        if self._tokenizer is None:
            self._tokenizer, self._meant = self._load()
        marked = self._find.sub(lambda match: self._mark[match[0]], prompt)
        plain = self._find_quote.sub(lambda match: self._unquote[match[0]], marked)
        ids = tuple(self._meant.get(token_id, token_id) for token_id in _ids(self._tokenizer, plain))
        if len(self._find.findall(prompt)) != sum(token_id in self._meant.values() for token_id in ids):
            raise bad("A message contains a control token of this model, which cannot be written as text.", "messages")
        return ids

    def _load(self) -> tuple[Tokenizer, dict[int, int]]:
        """The second tokenizer, and the true id of each of its marks."""
        tokens = [
            token | {"content": self._mark[token["content"]]} if token["special"] else token
            for token in self._spec["added_tokens"]
        ]
        tokenizer = Tokenizer.from_str(json.dumps({**self._spec, "added_tokens": tokens}))
        true_ids = {token["content"]: token["id"] for token in self._spec["added_tokens"]}
        marks = tokenizer.get_vocab(with_added_tokens=True)
        return tokenizer, {marks[self._mark[name]]: true_ids[name] for name in self._specials}


def _any_of(words: Sequence[str]) -> re.Pattern[str]:
    """Finds the longest of `words` at the leftmost place; finds nothing if there are none."""
    return re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) or r"(?!)")


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    # encode() would hold the interpreter lock for as long as it takes; encode_batch() lets it go
    ids: list[int] = tokenizer.encode_batch([text], add_special_tokens=False)[0].ids
    return ids


def _load(tokenizer_json: str) -> tuple[Mapping[str, Any], Tokenizer]:
    try:
        spec = json.loads(tokenizer_json)
        spec |= {"truncation": None, "padding": None}  # a limit that came with the file must not cut prompts silently
        return spec, Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # tokenizers raises bare Exception
        raise BadTokenizer(f"the tokenizer cannot be read: {str(error)[:200]}") from error


Pieces = list[bytes | str]


def _pieces(spec: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[list[bytes], Pieces, Callable[[], Decoder]]:
    """By token id: its bytes to show, its piece of text (empty for special tokens), and what puts pieces together."""
    kinds = _decoder_steps(spec)
    names = [kind["type"] for kind in kinds]
    special = {token["id"] for token in spec.get("added_tokens") or () if token["special"]}
    added = {token["id"] for token in spec.get("added_tokens") or ()}
    words = {token_id: word for word, token_id in tokenizer.get_vocab(with_added_tokens=True).items()}
    table = [words.get(token_id, "") for token_id in range(max(words, default=-1) + 1)]
    empty: bytes | str
    make: Callable[[], Decoder]
    if names == ["ByteLevel"]:
        pieces: Pieces = [_byte_level(word) for word in table]
        empty, make = b"", ByteDecoder
    elif "ByteFallback" in names and set(names) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        replaced = [(kind["pattern"]["String"], kind["content"]) for kind in kinds if kind["type"] == "Replace"]
        pieces = [_fallback(word, replaced) for word in table]
        strip = sum(kind["start"] for kind in kinds if kind["type"] == "Strip")
        empty, make = "", lambda: RunDecoder(strip)
    else:
        found = "+".join(names) or "nothing"
        raise BadTokenizer(f"the tokenizer decodes with {found}; only byte-level and SentencePiece ones are supported")
    shown = [word.encode() if at in added else _bytes(pieces[at]) for at, word in enumerate(table)]
    for token_id in special & set(range(len(pieces))):
        pieces[token_id] = empty
    return shown, pieces, make


def _with_marks(pieces: Pieces, marks: Mapping[int, bytes]) -> Pieces:
    """The same, but for some special tokens that are shown."""
    shown = list(pieces)
    for token_id, name in marks.items():
        shown[token_id] = name if isinstance(next(filter(None, pieces), b""), bytes) else name.decode()
    return shown


def _decoder_steps(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    decoder = spec.get("decoder")
    if decoder is None:
        return []
    return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]


def _bytes(piece: bytes | str) -> bytes:
    return piece if isinstance(piece, bytes) else piece.encode()


def _byte_of_char() -> dict[str, int]:
    """GPT-2's map of bytes to visible characters, reversed: printable Latin-1 stands for itself, the rest moves up."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {chr(256 + at): byte for at, byte in enumerate(hidden)}


_BYTE_OF_CHAR: Mapping[str, int] = _byte_of_char()


def _byte_level(word: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in word])
    except KeyError:  # an added token with other characters stands for itself
        return word.encode()


def _fallback(word: str, replaced: Sequence[tuple[str, str]]) -> bytes | str:
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", word):
        return bytes([int(word[3:5], 16)])
    for old, new in replaced:
        word = word.replace(old, new)
    return word
