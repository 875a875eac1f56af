"""Compiles grammars for one vocabulary, within bounds, and keeps the last ones. The only file that knows llguidance.

A compiled grammar is lazy: compiling reads the text, and states come into being while tokens are drawn. Both are
bounded by fuel, not by seconds, so a grammar that is too much is so on every machine. Compiling lets the interpreter
lock go; call it from a thread that may be busy.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import llguidance
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from headrace.core.types import Grammar, InvalidRequest

KEPT = 256  # compiled grammars


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What tokens stand for."""

    pieces: Sequence[bytes]  # by token id; special tokens by their name
    special_ids: frozenset[int]
    end_ids: frozenset[int]  # any of them ends an answer
    encode: Callable[[str], Sequence[int]]


class _Wrapped:
    """The form in which llguidance takes a vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = list(vocabulary.pieces)
        self.special_token_ids = sorted(vocabulary.special_ids)
        self.eos_token_id = min(vocabulary.end_ids)
        self.bos_token_id = None
        self._encode = vocabulary.encode

    def __call__(self, text: str) -> list[int]:
        return list(self._encode(text))


class Grammars:
    """`check` and `matcher` may be called from several threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def check(self, grammar: Grammar) -> None:
        """Compile it. Raises InvalidRequest."""
        self.matcher(grammar)

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """At the grammar's beginning. Raises InvalidRequest."""
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
                return found.deep_copy()
            tokenizer = self._tokenizer = self._tokenizer or self._load()
        made = _compile(tokenizer, grammar)
        with self._lock:
            self._compiled[grammar] = made
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        return made.deep_copy()

    def _load(self) -> LLTokenizer:
        if not self.vocabulary.end_ids:
            raise InvalidRequest("this model has no token that ends an answer, so none can be held to a grammar")
        wrapped: Any = llguidance.TokenizerWrapper(_Wrapped(self.vocabulary))
        return LLTokenizer(wrapped, eos_token=sorted(self.vocabulary.end_ids))


def _compile(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    try:
        source = _source(grammar)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the {_name(grammar)} cannot be read: {_told(error)}") from error
    # the defaults allow seconds of work for one mask; these end it within milliseconds, or some tens when it begins
    limits = LLParserLimits(
        initial_lexer_fuel=500_000,
        step_lexer_fuel=50_000,
        step_max_items=30_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )
    matcher = LLMatcher(tokenizer, source, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()  # what is too complex mostly is so at once, and the first mask takes longest
    if matcher.is_error():
        raise InvalidRequest(f"the {_name(grammar)} cannot be used: {_told(matcher.get_error())}")
    return matcher


def _source(grammar: Grammar) -> str:
    """Raises ValueError."""
    match grammar.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(grammar.text)
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.text)
    raise ValueError(f"there is no grammar of the kind {grammar.kind!r}")


def _name(grammar: Grammar) -> str:
    return {"json_schema": "JSON schema", "regex": "regular expression"}.get(grammar.kind, "grammar")


def _told(error: object) -> str:
    """A compiler's message in one line."""
    return " ".join(str(error).replace("<non-verbose/>", "").split())[:300]
