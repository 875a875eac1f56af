"""Chat templates by strangers: the usual ones render as the reference does, hostile ones end soon and say why."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import _compile_jinja_template

from headrace.core.types import InvalidRequest
from headrace.gateway.template import BadTemplate, ChatTemplate

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [{"role": role, "content": f" {role} says <b>'é' & 水\n"} for role in ("system", "user", "assistant", "user")]

USUAL = {
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] | trim"
    " + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "inst": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system = '' %}"
    "{% endif %}"
    "{%- for m in loop_messages %}{% if loop.index0 is odd and m.role != 'assistant' %}{{ raise_exception('no') }}"
    "{% endif %}"
    "{%- if m.role == 'user' %}[INST] {{ (system ~ m.content) if loop.first else m.content.strip() }} [/INST]"
    "{%- else %}{{ m['content'] + eos_token }}{%- endif %}{% endfor %}",
    "namespace": "{%- set ns = namespace(found=false, last=-1) -%}\n{%- for message in messages[::-1] %}\n"
    "  {%- set index = (messages|length - 1) - loop.index0 %}\n  {%- if not ns.found and message.role == 'user' %}"
    "{%- set ns.found = true %}{%- set ns.last = index %}{%- endif %}\n{%- endfor %}\n{{ ns.last }}{{ ns.found }}",
    "macro": "{% macro show(m, depth=0) -%}{{ m.role | upper }}:{{ m | tojson }}{%- endmacro %}"
    "{% for m in messages if m.role != 'system' %}{{ show(m) }}{{ ', ' if not loop.last }}{% endfor %}",
    "controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content.split(' ')[-1] }}"
    "{{ loop.length }}{{ loop.cycle('a','b') }}{{ loop.previtem is defined }}{% endfor %}{{ range(3) | list }}",
    "filters": "{{ messages | map(attribute='role') | join('-') }}{{ messages | selectattr('role', 'equalto', 'user')"
    " | list | length }}{{ messages[0] | items | list }}{{ ('a\nb' | indent(2)) }}{{ 'x' * 1 if false else 'y' }}"
    "{{ messages | tojson(indent=2) }}{{ 'abab' | replace('a', 'c') }}{{ (7 / 2) | int }}{{ none is none }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "thinking": "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% if tools %}T{% endif %}{{ messages[-1].content.endswith('\n') }}{{ messages[0].nothing }}",
}


@pytest.mark.parametrize("name", USUAL)
def test_usual_templates_render_as_the_reference_does(name: str) -> None:
    reference = _compile_jinja_template(USUAL[name])
    for count in range(1, 5):
        variables = {**NAMES, "messages": TALK[:count], "add_generation_prompt": True, "tools": None}
        try:
            expected = reference.render(**variables, documents=None, enable_thinking=False)
        except Exception as error:
            assert "no" in str(error)
            with pytest.raises(InvalidRequest, match="no"):
                ChatTemplate(USUAL[name], NAMES).render(TALK[:count], {"enable_thinking": False})
            continue
        assert ChatTemplate(USUAL[name], NAMES).render(TALK[:count], {"enable_thinking": False}) == expected


COMPILED = [ChatTemplate(source, NAMES) for source in USUAL.values()]

AT_LOAD = {
    "import": "{% import 'x' as y %}",
    "from": "{% from 'x' import y %}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends 'x' %}",
    "dunder": "{{ messages.__class__ }}",
    "chain": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "syntax": "{% for %}",
    "unknown filter": "{{ messages | pprint }}",
    "attr filter": "{{ messages | attr('__class__') }}",
    "width": "{{ 'a' | center(1000000000) }}",
    "format": "{{ '%1000000000d' | format(1) }}",
    "filter block": "{% filter upper %}a{% endfilter %}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long": "a" * (1 << 21),
}


@pytest.mark.parametrize("name", AT_LOAD)
def test_what_is_never_allowed_fails_when_the_template_is_loaded(name: str) -> None:
    with pytest.raises(BadTemplate) as raised:
        ChatTemplate(AT_LOAD[name], NAMES)
    assert len(str(raised.value)) < 500


BIG = "{% set ns = namespace(x='aaaaaaaaaaaaaaaa', l=[]) %}"
HOSTILE = {
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loop over text": "{% for m in messages %}{% for a in m.content * 1 %}{% endfor %}{% endfor %}{{ 'a' * 9**9 }}",
    "quiet loop": "{% for a in range(99999) %}{% for b in messages %}{% for c in range(99999) %}{% set d = b %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "wide recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for a in [messages] recursive %}{{ loop([messages]) }}{% endfor %}",
    "doubling": BIG + "{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "adding": BIG + "{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "replacing": BIG + "{% for i in range(60) %}{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
    "replace filter": BIG + "{% for i in range(60) %}{% set ns.x = ns.x | replace('a', 'aa') %}{% endfor %}",
    "joining": BIG + "{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "list": BIG + "{% for i in range(60) %}{% set ns.l = ns.l + ns.l + [ns.x] %}{% endfor %}{{ ns.l }}",
    "nested list": BIG + "{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "nested json": BIG + "{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | tojson }}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "number": "{% set ns = namespace(x=99) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "repeat": "{{ 'a' * 10000000000 }}",
    "repeat list": "{{ [1] * 10000000000 }}",
    "percent": "{{ '%01000000000d' % 1 }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "format method": "{{ '{:1000000000}'.format(1) }}",
    "output": "{% for i in range(99999) %}" + "a" * 1000 + "{% endfor %}",
    "subscript dunder": "{{ messages['__class__'].mro() }}",
    "string dunder": "{{ ''['__class__']['__mro__'] }}",
    "format dunder": "{{ '{0.__class__}'.format(messages) }}",
    "mutation": "{{ messages.append(1) }}",
    "undefined call": "{{ nothing.at.all() }}",
    "zero": "{{ 1 / 0 }}",
    "type": "{{ messages + 1 }}",
    "meter": "{% set _METER = 1 %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_soon_with_a_400(name: str) -> None:
    try:
        template = ChatTemplate(HOSTILE[name], NAMES)
    except BadTemplate:
        return
    begin_s = time.perf_counter()
    with pytest.raises(InvalidRequest) as raised:
        template.render(TALK * 50, {})
    assert time.perf_counter() - begin_s < 3, "a template must end within about a second"
    assert "0x" not in str(raised.value) and len(str(raised.value)) < 800


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception['__globals__'] }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{{ self }}{{ cycler }}{{ joiner }}{{ lipsum }}{{ config }}",
        "{{ messages['__init__'] }}{{ namespace['__init__'] }}",
    ],
)
def test_what_is_hidden_prints_as_nothing(source: str) -> None:
    shown = ChatTemplate(source, NAMES).render(TALK, {})
    assert not any(word in shown for word in ("object at", "class", "function", "module", "builtin"))


def test_a_long_conversation_is_no_attack() -> None:
    talk = [{"role": "user", "content": "a" * 100}] * 20_000
    assert len(ChatTemplate(USUAL["chatml"], NAMES).render(talk, {})) > 2_000_000


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.fixed_dictionaries({"role": st.text(max_size=5), "content": st.text(max_size=30)}), min_size=1))
def test_no_message_makes_a_template_fail_otherwise_than_by_refusing(messages: list[dict[str, str]]) -> None:
    for template in COMPILED:
        try:
            template.render(messages, {})
        except InvalidRequest as error:
            assert str(error)
