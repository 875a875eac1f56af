"""Answers taken apart: every format, every split, what is no call, and how long it takes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from time import process_time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.gateway.chain import Tool, Tools
from headrace.gateway.speech.answer import Answer
from headrace.gateway.speech.style import CALLS, THINKS, Style

KINDS = {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = Tools((Tool("weather", parameters=KINDS), Tool("now")))
THINK = THINKS["think"]
Result = tuple[str, str, list[tuple[str, str]]]


def taken(pieces: Iterable[str], style: str = "hermes", think: bool = False, begun: bool = False) -> Result:
    """(reasoning, text, [(name, arguments)]), checking that deltas are framed as a client expects them."""
    answer = Answer(Style(CALLS[style], True, THINK if think else None), TOOLS, begun)
    reasoning = text = ""
    calls: list[tuple[str, str]] = []
    for parts in [*(answer.push(piece) for piece in pieces), answer.end()]:
        reasoning, text = reasoning + parts.reasoning, text + parts.text
        for call in parts.calls:
            assert bool(call.id) == bool(call.name) == (call.index == len(calls))
            if call.id:
                calls.append((call.name, ""))
            assert call.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + call.arguments)
    assert answer.called == bool(calls)
    return reasoning, text, calls


ONE = '{"name": "weather", "arguments": {"city": "Brač {\\"x\\"}", "days": [1, {"a": "}"}]}}'
ARGUMENTS = '{"city": "Brač {\\"x\\"}", "days": [1, {"a": "}"}]}'
CASES: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", f"<tool_call>\n{ONE}\n</tool_call>", "", [("weather", ARGUMENTS)]),
    (
        "hermes",
        f"Yes. \n<tool_call>{ONE}</tool_call>\n<tool_call>\n{ONE}\n</tool_call>\n",
        "Yes.",
        [("weather", ARGUMENTS)] * 2,
    ),
    ("hermes", '<tool_call>{"name":"now"}</tool_call> done', " done", [("now", "{}")]),
    ("hermes", '<tool_call>{"arguments":{"a":1},"id":7,"name":"now"}</tool_call>', "", [("now", '{"a":1}')]),
    ("hermes", '<tool_call>{"name":"now","arguments":"{\\"a\\": 1}"}</tool_call>', "", [("now", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name":"now","arguments":null}</tool_call>', "", [("now", "{}")]),
    ("hermes", '<tool_call>{"name":"now","arguments":{"a":', "", [("now", '{"a":')]),
    ("hermes", "1 < 2 and <tool_call is no mark", "1 < 2 and <tool_call is no mark", []),
    ("hermes", '<tool_call>{"name":"rm"}</tool_call>', '<tool_call>{"name":"rm"}</tool_call>', []),
    ("hermes", "<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", []),
    ("hermes", '<tool_call><tool_call>{"name":"now"}</tool_call>', "", [("now", "{}")]),
    ("hermes", "plain text \n", "plain text \n", []),
    (
        "hermes",
        "<tool_call>\n<function=weather>\n<parameter=city>\n1\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>",
        "",
        [("weather", '{"city": "1", "days": 3}')],
    ),
    ("hermes", "<tool_call><function=now></function></tool_call>", "", [("now", "{}")]),
    ("mistral", f"[TOOL_CALLS][{ONE}, {ONE}]", "", [("weather", ARGUMENTS)] * 2),
    ("mistral", '[TOOL_CALLS]weather[ARGS]{"city": "x"}', "", [("weather", '{"city": "x"}')]),
    ("mistral", '[TOOL_CALLS]now{}[TOOL_CALLS]now{"a": 1}', "", [("now", "{}"), ("now", '{"a": 1}')]),
    ("mistral", "[TOOL_CALLS] no", "[TOOL_CALLS] no", []),
    ("llama3", '{"name": "weather", "parameters": {"city": "x"}}', "", [("weather", '{"city": "x"}')]),
    ("llama3", '<|python_tag|>{"name": "now", "parameters": {}}; {"name": "now"}', "", [("now", "{}")] * 2),
    ("llama3", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3", 'I say {"name": "now"}', 'I say {"name": "now"}', []),
]


@pytest.mark.parametrize(("style", "answer", "text", "calls"), CASES)
def test_every_format_whole_and_letter_by_letter(
    style: str, answer: str, text: str, calls: list[tuple[str, str]]
) -> None:
    assert taken([answer], style) == ("", text, calls)
    assert taken(answer, style) == ("", text, calls)


MARKS = "<tool_call> </tool_call> [TOOL_CALLS] now [ARGS] <think> </think> <function=now> </function> <|python_tag|>"
SIGNS = ["{", "}", '"', "\\", " ", "\n", "text", "<", "[", "]", ",", ":", ";"]
WORDS = ["null", '"name":', '"now"', '"arguments":']
WHOLE = [ONE, ONE[:9], ONE[9:], '{"name":"now"}', "<parameter=city>", "</parameter>"]
PIECES = st.sampled_from([*MARKS.split(), *SIGNS, *WORDS, *WHOLE])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(PIECES, max_size=14), st.data(), st.sampled_from(sorted(CALLS)), st.booleans(), st.booleans())
def test_any_split_gives_the_same(pieces: list[str], data: Any, style: str, think: bool, begun: bool) -> None:
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    split = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = taken([text], style, think, begun)
    assert taken(split, style, think, begun) == whole
    assert taken(text, style, think, begun) == whole


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=60))
def test_text_without_marks_stays_as_it_is(text: str) -> None:
    if "<tool_call>" not in text:
        assert taken(text) == ("", text, [])


def test_reasoning_is_split_off_at_its_marks() -> None:
    assert taken(["<think>\nwhy\n</think>\n\nso"], think=True) == ("why", "so", [])
    assert taken("why not </thin </think> so", think=True, begun=True) == ("why not </thin", "so", [])
    assert taken("no <think>marks</think>", think=True) == ("", "no <think>marks</think>", [])
    assert taken("cut off </thi", think=True, begun=True) == ("cut off </thi", "", [])
    assert taken(f"<think>{ONE}<tool_call></think><tool_call>{ONE}</tool_call>", think=True) == (
        f"{ONE}<tool_call>",
        "",
        [("weather", ARGUMENTS)],
    )


HOSTILE = [
    *("<tool_call>", '<tool_call>{"x":[', "{", '{"name":"now","arguments":{', '<tool_call>{"a":"', "[TOOL_CALLS]now"),
    *('{"x":"\\', "<tool_call><function=now><parameter=a>", "<think>", '"', "\\", "a", "<"),
]


@pytest.mark.parametrize("style", sorted(CALLS))
@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_answers_take_linear_time(style: str, unit: str) -> None:
    """100 KB in pieces as a model draws them; quadratic work would take minutes."""
    text = (unit * (100_000 // len(unit) + 1))[:100_000]
    pieces = [text[at : at + 4] for at in range(0, len(text), 4)]
    begin_s = process_time()
    taken([text], style, think=True)
    whole_s = process_time() - begin_s
    taken(pieces, style, think=True)
    assert whole_s < 3 and process_time() - begin_s < 8


def test_arguments_that_stream_are_json_in_the_end() -> None:
    _, _, calls = taken(f"<tool_call>{ONE}</tool_call>")
    assert json.loads(calls[0][1])["city"] == 'Brač {"x"}'
