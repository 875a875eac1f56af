"""What a grammar and a thinking budget let a request draw: by construction, with drafts, and after a preemption."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.types import Grammar, InvalidRequest, Request, Thinking, Tokens
from headrace.device.control import Control, Controls
from headrace.device.grammar import Grammars, Vocabulary

END, OPEN, CLOSE = 256, 257, 258
WORDS = [b'{"', b'": ', b', "', b"true", b"null", b"[]", b"}]", b"</think>", b"think", b"ab"]
PIECES = [*(bytes([byte]) for byte in range(256)), b"<end>", b"<think>", b"</think>", *WORDS]
VOCAB = 300  # more logits than tokens, as padded models have
VOCABULARY = Vocabulary(PIECES, frozenset({END, OPEN, CLOSE}), frozenset({END}), lambda text: list(text.encode()))
GRAMMARS = Grammars(VOCABULARY)
KINDS = {"a": {"type": "boolean"}, "b": {"enum": ["x", "yy"]}}
CLOSED = {"required": ["a", "b"], "additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}
OBJECT = Grammar("json_schema", json.dumps({"type": "object", "properties": KINDS, **CLOSED}))
FREE = [*PIECES, *[b""] * (VOCAB - len(PIECES))]


def request(grammar: Grammar | None = OBJECT, thinking: Thinking | None = None) -> Request:
    return Request("a", (Tokens((1,)),), 0.0, 100, grammar=grammar, thinking=thinking)


def control(grammar: Grammar | None = OBJECT, thinking: Thinking | None = None, drawn: Sequence[int] = ()) -> Control:
    made = Controls(GRAMMARS, VOCAB).of(request(grammar, thinking), drawn)
    assert made is not None
    return made


def allowed(mask: Any) -> list[int]:
    if mask is None:
        return list(range(VOCAB))
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCAB]
    return [int(token) for token in np.flatnonzero(bits)]


def drawn_at_random(subject: Control, seed: int, most: int = 400) -> list[int]:
    rng, tokens = random.Random(seed), list[int]()
    while len(tokens) < most and END not in tokens:
        tokens.append(rng.choice(allowed(subject.masks(())[0])))
        subject.drew(tokens[-1:])
    return tokens


def text_of(tokens: Sequence[int]) -> str:
    return b"".join(FREE[token] for token in tokens if token != END).decode()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_whatever_is_drawn_is_valid_and_ends(seed: int) -> None:
    tokens = drawn_at_random(control(), seed)
    assert tokens[-1] == END
    value = json.loads(text_of(tokens))
    assert set(value) == {"a", "b"} and isinstance(value["a"], bool) and value["b"] in ("x", "yy")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.data())
def test_masks_of_drafts_are_those_of_one_step_after_another(seed: int, data: Any) -> None:
    tokens = drawn_at_random(control(), seed)
    at = data.draw(st.integers(0, len(tokens) - 1))
    drafts = list(tokens[at : at + data.draw(st.integers(0, 5))])
    if drafts and data.draw(st.booleans()):
        drafts[-1] = data.draw(st.integers(0, VOCAB - 1))
    subject, stepwise = control(drawn=tokens[:at]), control(drawn=tokens[:at])
    masks = subject.masks(drafts)
    assert len(masks) == len(drafts) + 1
    for mask, draft in zip(masks, [*drafts, END], strict=True):
        assert allowed(mask) == allowed(stepwise.masks(())[0])
        if draft not in allowed(mask):
            break
        stepwise.drew([draft])
    assert allowed(subject.masks(())[0]) == allowed(control(drawn=tokens[:at]).masks(())[0]), "drafts leave no trace"


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(0, 30))
def test_a_preempted_request_goes_on_where_it_was(seed: int, cut: int) -> None:
    tokens = drawn_at_random(control(), seed)[:cut]
    subject = control()
    subject.drew(tokens)
    assert allowed(subject.masks(())[0]) == allowed(control(drawn=tokens).masks(())[0])


@pytest.mark.parametrize("budget", [0, 1, 7])
@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("grammar", [OBJECT, None])
def test_thinking_ends_with_its_budget(budget: int, begun: bool, grammar: Grammar | None) -> None:
    thinking = Thinking("<think>", "</think>", begun, budget, (10, CLOSE, 10), OPEN)
    for seed in range(20):
        subject = control(grammar, thinking)
        tokens = [] if begun else [OPEN]
        assert begun or OPEN in allowed(subject.masks(())[0])
        subject.drew(tokens)
        tokens += drawn_at_random(subject, seed)
        start, thought = (0 if begun else 1), b""
        for at, token in enumerate(tokens):  # noqa: B007
            thought += FREE[token]
            if b"</think>" in thought:
                break
        else:
            assert grammar is None and END in tokens  # without a grammar it may end while it thinks
            continue
        assert at - start <= budget + 2, "at most the budget, then white space and the mark"
        if grammar is not None:
            rest = tokens[at + 1 :]
            assert json.loads(text_of(rest))


def test_thinking_under_a_grammar_cannot_end_the_answer() -> None:
    thinking = Thinking("<think>", "</think>", True, None, (CLOSE,), OPEN)
    assert END not in allowed(control(OBJECT, thinking).masks(())[0])
    assert control(None, thinking).masks(()) == [None]


MANY: dict[str, Any] = {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(9)]} for i in range(9)]}
SCHEMAS: tuple[Any, ...] = ({"type": "no"}, {"$ref": "#"}, {"$ref": "#/none"}, {"not": {}}, MANY)
BAD = [
    *(Grammar("regex", text) for text in ("(", "(?=x)", "a{4294967296}", "\\p{Nothing}")),
    *(Grammar("json_schema", json.dumps(one)) for one in SCHEMAS),
    *(Grammar("lark", text) for text in ("", "start: start", "nothing", "start: %json {", "start: @other")),
    *(Grammar("json_schema", text) for text in ("{", "[1]", "5", '"x"', "[" * 5000)),
    Grammar("nothing", "x"),
]


@pytest.mark.parametrize("grammar", BAD, ids=lambda one: one.text[:30])
def test_what_cannot_be_used_is_said_and_harms_nobody(grammar: Grammar) -> None:
    with pytest.raises(InvalidRequest) as caught:
        GRAMMARS.check(grammar)
    assert len(str(caught.value)) < 400 and "0x" not in str(caught.value) and "\n" not in str(caught.value)
    unchecked = control(grammar)
    assert allowed(unchecked.masks(())[0]) and unchecked.failure
