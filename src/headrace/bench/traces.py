"""Reads recorded traffic: when a request came, how long its prompt and its answer were, which blocks it shared.

Formats are told apart by their first line. CSV with a header: Azure's TIMESTAMP, ContextTokens, GeneratedTokens
(Patel et al., Splitwise, 2024) and BurstGPT's Timestamp, Request tokens, Response tokens (Wang et al., 2024). JSON
lines: Mooncake's timestamp in ms, input_length, output_length, hash_ids of 512 tokens (Qin et al., 2025), and ours,
`{"at_s": 0.5, "prompt_tokens": 96, "output_tokens": 32, "blocks": [7, 9], "block_tokens": 16}` with optional blocks.
Every row is checked; a bad one is named by its line.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from headrace.bench.settings import MAX_REQUESTS, MAX_TOKENS
from headrace.core.types import HeadraceError

_MOONCAKE_BLOCK_TOKENS = 512
_MAX_BLOCKS = 1_000_000
_MAX_LINE = 16 << 20  # characters


class BadTrace(HeadraceError):
    """A trace that cannot be read; the message names the line and what was expected."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a trace."""

    at_s: float | None  # after the first request; None: the trace has lengths only
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[str, ...] = ()  # names of the prompt's blocks from its start
    block_tokens: int = _MOONCAKE_BLOCK_TOKENS


Parser = Callable[[Mapping[str, Any]], Row]


def read_trace(path: Path, limit: int | None = None) -> list[Row]:
    """Rows by arrival, times counted from the earliest. Raises BadTrace."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(islice(_rows(_bounded_lines(file)), limit or MAX_REQUESTS))
    except (OSError, UnicodeDecodeError) as error:
        raise BadTrace(f"cannot read the trace {path}: {error}") from error
    except BadTrace as error:
        raise BadTrace(f"{path}: {error}") from error
    if not rows:
        raise BadTrace(f"{path}: the trace has no requests")
    return _from_zero(rows)


def _rows(lines: Iterable[str]) -> Iterator[Row]:
    lines = iter(lines)
    first = next(lines, "")
    records = _json_records(chain([first], lines)) if first.lstrip().startswith("{") else _csv_records(first, lines)
    parse: Parser | None = None
    for number, record in records:
        parse = parse or _parser_for(record)
        try:
            yield _checked(parse(record))
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise BadTrace(f"line {number} is not a request: {error}") from error


def _json_records(lines: Iterable[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadTrace(f"line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise BadTrace(f"line {number} is not a JSON object")
        yield number, record


def _csv_records(header: str, lines: Iterable[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    names = [name.strip() for name in next(csv.reader([header]), [])]
    try:
        for number, cells in enumerate(csv.reader(lines), 2):
            if cells:
                yield number, dict(zip(names, cells, strict=False))
    except csv.Error as error:
        raise BadTrace(f"not CSV: {error}") from error


def _parser_for(record: Mapping[str, Any]) -> Parser:
    for keys, parse in _PARSERS.items():
        if keys <= record.keys():
            return parse
    known = "; ".join(", ".join(sorted(keys)) for keys in _PARSERS)
    raise BadTrace(f"unknown columns {', '.join(map(str, record))[:200]}; known are {known}")


def _azure(record: Mapping[str, Any]) -> Row:
    return Row(_timestamp_s(record["TIMESTAMP"]), int(record["ContextTokens"]), int(record["GeneratedTokens"]))


def _timestamp_s(text: str) -> float | None:
    if text == "XXX":  # length-only files in Azure's form have this in place of a time
        return None
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _burst_gpt(record: Mapping[str, Any]) -> Row:
    return Row(float(record["Timestamp"]), int(record["Request tokens"]), int(record["Response tokens"]))


def _mooncake(record: Mapping[str, Any]) -> Row:
    blocks = _block_names(record.get("hash_ids", ()))
    return Row(float(record["timestamp"]) / 1000, int(record["input_length"]), int(record["output_length"]), blocks)


def _own(record: Mapping[str, Any]) -> Row:
    at_s = record.get("at_s")
    return Row(
        None if at_s is None else float(at_s),
        int(record["prompt_tokens"]),
        int(record["output_tokens"]),
        _block_names(record.get("blocks", ())),
        int(record.get("block_tokens", _MOONCAKE_BLOCK_TOKENS)),
    )


_PARSERS: Mapping[frozenset[str], Parser] = {
    frozenset({"TIMESTAMP", "ContextTokens", "GeneratedTokens"}): _azure,
    frozenset({"Timestamp", "Request tokens", "Response tokens"}): _burst_gpt,
    frozenset({"timestamp", "input_length", "output_length"}): _mooncake,
    frozenset({"prompt_tokens", "output_tokens"}): _own,
}


def _block_names(blocks: Any) -> tuple[str, ...]:
    if not isinstance(blocks, list | tuple) or len(blocks) > _MAX_BLOCKS:
        raise ValueError("the blocks are not a list")
    return tuple(map(str, blocks))


def _checked(row: Row) -> Row:
    """The row with at least one token either way: traces record failed requests with zero."""
    if not (0 <= row.prompt_tokens <= MAX_TOKENS and 0 <= row.output_tokens <= MAX_TOKENS and row.block_tokens >= 1):
        raise ValueError(f"lengths {row.prompt_tokens}, {row.output_tokens} are outside 0 to {MAX_TOKENS}")
    if row.at_s is not None and not abs(row.at_s) < 1e12:
        raise ValueError(f"arrival time {row.at_s}")
    return replace(row, prompt_tokens=max(1, row.prompt_tokens), output_tokens=max(1, row.output_tokens))


def _from_zero(rows: list[Row]) -> list[Row]:
    """Rows in the order of arrival, the first at 0; without times, in the order of the file."""
    if any(row.at_s is None for row in rows):
        return [replace(row, at_s=None) for row in rows]
    ordered = sorted(rows, key=lambda row: row.at_s or 0.0)
    first_s = ordered[0].at_s or 0.0
    return [replace(row, at_s=(row.at_s or 0.0) - first_s) for row in ordered]


def _bounded_lines(file: TextIO) -> Iterator[str]:
    while line := file.readline(_MAX_LINE):
        if len(line) == _MAX_LINE:
            raise BadTrace(f"a line is longer than {_MAX_LINE >> 20} Mi characters")
        yield line
