"""Renders a model's chat template, which is a program by a stranger: sandboxed, metered, and without a way out.

Templates see text and lists, a short list of filters and string methods, and no attribute that begins with an
underscore; they cannot import or include. Every loop turn, call, filter and operator passes a `Meter`, which ends the
rendering after a second or when a value or the output grows too large. Render on a worker thread.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes, pass_context
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from headrace.core import clock
from headrace.core.types import HeadraceError, InvalidRequest

MAX_TEMPLATE_CHARS = 1 << 20
MAX_CHARS = 16 << 20  # of one value, and of the output
MAX_SECONDS = 1.0
_MAX_NUMBER = 1 << 64  # integers beyond this are a bomb, not a count
_METER = "\0meter"  # a name that no template can write

_FILTERS = frozenset(
    "abs count d default dictsort first float groupby int items last length list map max min reject rejectattr reverse"
    " round safe select selectattr sort unique".split()
)
_TEXT_FILTERS = ("capitalize", "lower", "string", "title", "trim", "upper")  # these write out what they are given
_STR_METHODS = frozenset(
    "capitalize count endswith find index isalnum isalpha isdigit islower isnumeric isspace istitle isupper lower"
    " lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines"
    " startswith strip title upper".split()
)


class BadTemplate(HeadraceError):
    """A chat template that cannot be used at all; the message says why."""


class _TooMuch(Exception):
    """The meter ran out; the message says of what."""


class Meter:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self._deadline_s = clock.perf() + MAX_SECONDS
        self._chars = 8 * MAX_CHARS

    def tick(self) -> None:
        if clock.perf() > self._deadline_s:
            raise _TooMuch(f"it runs longer than {MAX_SECONDS:g} s")

    def weigh(self, value: Any) -> Any:
        """Let `value` pass if it is not too large; everything that passes counts."""
        self.tick()
        size = len(value) if isinstance(value, str | list | tuple | Mapping) else 1
        self._chars -= size
        if size > MAX_CHARS or self._chars < 0 or (isinstance(value, int) and abs(value) > _MAX_NUMBER):
            raise _TooMuch("its values grow too large")
        return value


def _check_size(chars: int) -> None:
    if chars > MAX_CHARS:
        raise _TooMuch("its values grow too large")


def _written(value: Any) -> int:
    """About how many characters `value` takes when written out. A list may hold the same long text many times, or
    itself be held many times, so this counts what writing would, and stops where that becomes too much. An item counts
    as 32 characters, which also bounds the walk to half a million items."""
    chars, left = 0, [value]
    while left:
        item = left.pop()
        chars += 32 + (len(item) if isinstance(item, str) else 0)
        _check_size(chars)
        if isinstance(item, Mapping):
            left += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            left += item
        _check_size(len(left))
    return chars


class _Metered:
    """An iterable whose every turn is counted, of known length when the original's is."""

    def __init__(self, items: Iterable[Any], meter: Meter) -> None:
        self._items = items if hasattr(items, "__len__") else list(self._counted(items, meter))
        self._meter = meter

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return self._counted(self._items, self._meter)

    @staticmethod
    def _counted(items: Iterable[Any], meter: Meter) -> Iterator[Any]:
        for item in items:
            meter.tick()
            yield item


class _Metering(NodeTransformer):
    """Rewrites a template so that its work passes the meter:

    for x in E  ->  for x in E|turns        F(...), E|f, A ~ B  ->  F(...)|weigh, E|weigh|f|weigh, [A, B]|joined
    """

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "\0turns")
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "\0weigh")

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        self.generic_visit(node)
        if node.node is not None:
            node.node = _filtered(node.node, "\0weigh")
        return _filtered(node, "\0weigh")

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "\0joined")

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        inner = node.call
        self.generic_visit(node)
        node.call = inner  # must stay a Call
        return node

    def visit_FilterBlock(self, node: nodes.FilterBlock) -> NoReturn:
        raise BadTemplate("it uses a filter block, which is not allowed in a chat template")

    def visit_Getattr(self, node: nodes.Getattr) -> nodes.Node:
        if node.attr.startswith("_"):
            raise BadTemplate(f"it reads the attribute {node.attr!r}, which is not allowed in a chat template")
        self.generic_visit(node)
        return node


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it only groups."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with every way to grow a value metered."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        extensions = ("jinja2.ext.loopcontrols", _Generation)
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_finalize)
        texts = {name: _of_text(self.filters[name]) for name in _TEXT_FILTERS}
        self.filters = {name: self.filters[name] for name in _FILTERS} | texts | _OWN_FILTERS
        kept = ("range", "dict", "namespace")
        self.globals = {name: self.globals[name] for name in kept}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str | bytes) and attr not in _STR_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No safe version of str.format: a width in a format is a bomb as well."""

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter: Meter = __context.parent[_METER]
        meter.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and getattr(__obj, "__name__", "") == "replace":
            return _replace(__context, owner, *args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" or (operator == "*" and not numbers) or (operator == "%" and not numbers):
            raise jinja2.exceptions.SecurityError(f"the operator {operator} is allowed between small numbers only")
        return context.parent[_METER].weigh(super().call_binop(context, operator, left, right))


def _finalize(value: Any) -> Any:
    """What an expression prints as. A printed list repeats what it refers to, so its weight comes first."""
    if not isinstance(value, str):
        _written(value)
    return value


def _raise_exception(message: str) -> NoReturn:
    raise InvalidRequest(f"The model's chat template refuses these messages: {str(message)[:500]}", "messages")


def _strftime_now(form: str) -> str:
    return datetime.fromtimestamp(clock.wall()).strftime(form[:100])


def _of_text(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of text that is given text, of bounded length."""

    def filtered(value: Any, *args: Any, **kwargs: Any) -> Any:
        _written(value)
        return function(str(value), *args, **kwargs)

    return filtered


@pass_context
def _turns(context: Context, items: Any) -> Any:
    return _Metered(items, context.parent[_METER]) if isinstance(items, Iterable) else items


@pass_context
def _weigh(context: Context, value: Any) -> Any:
    return context.parent[_METER].weigh(value)


@pass_context
def _joined(context: Context, parts: Iterable[Any], sep: str = "", attribute: str | None = None) -> str:
    items = list(_Metered(parts, context.parent[_METER]))
    if attribute is not None:
        items = [context.environment.getitem(item, attribute) for item in items]
    _check_size(_written(items) + len(sep) * len(items))
    return sep.join(map(str, items))


@pass_context
def _replace(context: Context, text: str, old: str, new: str, count: int = -1) -> str:
    context.parent[_METER].tick()
    _written([text, old, new])
    text, old, new = str(text), str(old), str(new)
    _check_size(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


@pass_context
def _indented(context: Context, text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    pad = width if isinstance(width, str) else " " * min(int(width), 64)
    _written(text)
    lines = str(text).splitlines()
    _check_size(len(text) + len(pad) * len(lines))
    rest = "\n".join(pad + line if line or blank else line for line in lines[1:])
    head = (pad if first else "") + (lines[0] if lines else "")
    return f"{head}\n{rest}" if len(lines) > 1 else head


@pass_context
def _tojson(context: Context, value: Any, ensure_ascii: bool = False, indent: int | None = None, **kwargs: Any) -> str:
    """As Hugging Face's templates expect it: not escaped for HTML."""
    _check_size(_written(value) * (8 if indent else 1))
    separators = kwargs.get("separators")
    return json.dumps(
        value,
        ensure_ascii=bool(ensure_ascii),
        indent=None if indent is None else min(int(indent), 8),
        separators=None if separators is None else (str(separators[0])[:4], str(separators[1])[:4]),
        sort_keys=bool(kwargs.get("sort_keys")),
    )


_OWN_FILTERS: dict[str, Callable[..., Any]] = {
    "\0turns": _turns,
    "\0weigh": _weigh,
    "\0joined": _joined,
    "join": _joined,
    "replace": _replace,
    "indent": _indented,
    "tojson": _tojson,
}


class ChatTemplate:
    """A compiled template. `render` may be called from several threads at once."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        """`variables` are the names of special tokens, such as bos_token. Raises BadTemplate."""
        self._variables = dict(variables)
        if len(source) > MAX_TEMPLATE_CHARS:
            raise BadTemplate(f"it is longer than {MAX_TEMPLATE_CHARS} characters")
        sandbox = _Sandbox()
        try:
            tree = sandbox.parse(source)
            if any(tree.find(kind) for kind in (nodes.Import, nodes.FromImport, nodes.Include, nodes.Extends)):
                raise BadTemplate("it imports or includes another template, which is not allowed")
            names = meta.find_undeclared_variables(tree)
            code = sandbox.compile(_Metering().visit(tree))
        except jinja2.TemplateError as error:
            raise BadTemplate(f"it is not a valid template: {error}") from error
        except (RecursionError, MemoryError, ValueError, TypeError, OverflowError, SyntaxError) as error:
            raise BadTemplate(f"it cannot be compiled: {type(error).__name__}") from error
        self.knows_tools = "tools" in names
        self._template = jinja2.Template.from_code(sandbox, code, sandbox.globals)

    def render(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, bool], tools: Sequence[Any] = ()
    ) -> str:
        """The prompt of a conversation. Raises InvalidRequest when the template refuses, fails or takes too much."""
        variables: dict[str, Any] = {"tools": list(tools) or None, "documents": None, "add_generation_prompt": True}
        variables |= self._variables | dict(options) | {"messages": list(messages), _METER: Meter()}
        try:
            return "".join(_bounded(self._template.generate(variables)))
        except InvalidRequest:
            raise
        except _TooMuch as error:
            raise InvalidRequest(f"The model's chat template was stopped: {error}.", "messages") from error
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"The model's chat template failed: {_plain(error)}", "messages") from error
        except Exception as error:  # a template can raise anything that an expression can
            sentence = f"The model's chat template cannot take these messages: {type(error).__name__}."
            raise InvalidRequest(sentence, "messages") from error


def _bounded(chunks: Iterator[str]) -> Iterator[str]:
    chars = 0
    for chunk in chunks:
        chars += len(chunk)
        _check_size(chars)
        yield chunk


def _plain(error: Exception) -> str:
    """An exception's message without memory addresses."""
    return re.sub(r"0x[0-9a-fA-F]+", "...", str(error))[:300]
