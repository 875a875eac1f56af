"""Reads recorded traffic as a stream of arrivals, whatever wrote it. Formats are told apart by their first line.

CSV with a header: Azure's (TIMESTAMP, ContextTokens, GeneratedTokens; Patel et al., Splitwise, 2024), BurstGPT's
(Timestamp, Request tokens, Response tokens; Wang et al., 2024) and Vidur's lengths (num_prefill_tokens,
num_decode_tokens; Agrawal et al., 2024). JSON lines: Mooncake's (timestamp in ms, input_length, output_length,
hash_ids of 512 tokens; Qin et al., 2025) and ours, which `record` writes.

Every line is checked and a bad one is named; memory does not grow with the file.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from heapq import heappop, heappush
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from headrace.core.types import SLO, HeadraceError
from headrace.workload.arrival import MAX_TOKENS, NAME_BITS, Arrival, Stretch, name_of

MOONCAKE_BLOCK_TOKENS = 512
MOST_LATE = 8192  # lines that a request may stand behind one that came after it

_MAX_BLOCKS = 1_000_000
_MAX_LINE = 16 << 20  # characters
_MAX_TIME_S = 1e12

Record = Mapping[str, Any]
Parser = Callable[[Record], Arrival]


class BadTrace(HeadraceError):
    """A trace that cannot be read; the message names the line and what was expected."""


def read_trace(path: Path, limit: int | None = None) -> Iterator[Arrival]:
    """As `parse_trace`, from a file. Raises BadTrace also when it cannot be opened."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from parse_trace(_bounded_lines(file), limit)
    except (OSError, UnicodeDecodeError) as error:
        raise BadTrace(f"cannot read the trace {path}: {error}") from error
    except BadTrace as error:
        raise BadTrace(f"{path}: {error}") from error


def parse_trace(lines: Iterable[str], limit: int | None = None) -> Iterator[Arrival]:
    """The first `limit` requests of the lines, ordered by time and counted from the earliest; if the trace has lengths
    only, in its own order and without times.

    Requests that failed, recorded with no answer, are left out. Ours are written when they end, so their order is
    restored within MOST_LATE lines. Raises BadTrace.
    """
    rows = islice(_rows(iter(lines)), limit)
    first = next(rows, None)
    if first is None:
        raise BadTrace("the trace has no requests")
    timed = first[1].at_s is not None
    agreed = _agreeing(chain([first], rows), timed)
    yield from _by_time(agreed) if timed else (arrival for _, arrival in agreed)


def _agreeing(rows: Iterable[tuple[int, Arrival]], timed: bool) -> Iterator[tuple[int, Arrival]]:
    for number, arrival in rows:
        if (arrival.at_s is not None) != timed:
            raise BadTrace(f"line {number} has {'no ' if timed else 'an '}arrival time, unlike the lines before")
        yield number, arrival


def _by_time(rows: Iterable[tuple[int, Arrival]]) -> Iterator[Arrival]:
    """A window of rows, of which the earliest is always next."""
    window: list[tuple[float, int, Arrival]] = []
    start_s = last_s = float("nan")

    def earliest() -> Arrival:
        nonlocal start_s, last_s
        at_s, number, arrival = heappop(window)
        if at_s < last_s:
            raise BadTrace(f"line {number} comes more than {MOST_LATE} lines too late; sort the trace by time")
        start_s, last_s = (at_s if start_s != start_s else start_s), at_s
        return replace(arrival, at_s=at_s - start_s)

    for number, arrival in rows:
        heappush(window, (arrival.at_s or 0.0, number, arrival))
        if len(window) > MOST_LATE:
            yield earliest()
    while window:
        yield earliest()


def _rows(lines: Iterator[str]) -> Iterator[tuple[int, Arrival]]:
    first = next(lines, "")
    records = _json_records(chain([first], lines)) if first.lstrip().startswith("{") else _csv_records(first, lines)
    parse: Parser | None = None
    for number, record in records:
        parse = parse or _parser_for(record)
        try:
            arrival = parse(record)
        except KeyError as error:
            raise BadTrace(f"line {number} has no {error}") from error
        except (ValueError, TypeError, OverflowError) as error:
            raise BadTrace(f"line {number} is not a request: {error}") from error
        if arrival.output_tokens:
            yield number, arrival


def _json_records(lines: Iterable[str]) -> Iterator[tuple[int, Record]]:
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


def _csv_records(header: str, lines: Iterable[str]) -> Iterator[tuple[int, Record]]:
    reader = csv.reader(lines)
    try:
        names = [name.strip() for name in next(csv.reader([header]), [])]
        for cells in reader:
            if cells:
                yield reader.line_num + 1, dict(zip(names, cells, strict=False))
    except csv.Error as error:
        raise BadTrace(f"line {reader.line_num + 1} is not CSV: {error}") from error


def _parser_for(record: Record) -> Parser:
    for keys, parse in _PARSERS.items():
        if keys <= record.keys():
            return parse
    known = "; ".join(", ".join(sorted(keys)) for keys in _PARSERS)
    raise BadTrace(f"unknown columns {', '.join(map(str, record))[:200]}; known are {known}")


def _azure(record: Record) -> Arrival:
    at_s = _timestamp_s(record["TIMESTAMP"])
    return _arrival(at_s, record["ContextTokens"], record["GeneratedTokens"])


def _timestamp_s(text: str) -> float | None:
    if text == "XXX":  # NanoFlow's lengths in Azure's form have this in place of a time
        return None
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _burst_gpt(record: Record) -> Arrival:
    return _arrival(float(record["Timestamp"]), record["Request tokens"], record["Response tokens"])


def _vidur(record: Record) -> Arrival:
    return _arrival(None, record["num_prefill_tokens"], record["num_decode_tokens"])


def _mooncake(record: Record) -> Arrival:
    blocks = _block_names(record.get("hash_ids", ()))
    at_s = float(record["timestamp"]) / 1000
    return _arrival(at_s, record["input_length"], record["output_length"], blocks)


def _ours(record: Record) -> Arrival:
    """A client that went away had seen only the beginning: the model would have gone on to the limit."""
    arrival = _arrival(
        _optional(float, record.get("at_s")),
        record["prompt_tokens"],
        record["output_tokens"],
        _block_names(record.get("blocks", ())),
        _tokens(record.get("block_tokens", MOONCAKE_BLOCK_TOKENS), 1),
    )
    cancel_s = _optional(_seconds, record.get("cancel_s"))
    most = _optional(_tokens, record.get("max_new_tokens"))
    return replace(
        arrival,
        output_tokens=arrival.output_tokens if cancel_s is None else most or arrival.output_tokens,
        max_new_tokens=most,
        cancel_s=cancel_s,
        tenant=str(record.get("tenant", ""))[:256],
        priority=max(-1_000_000, min(1_000_000, int(record.get("priority", 0)))),
        slo=_slo(_optional(_seconds, record.get("ttft_s")), _optional(_seconds, record.get("tpot_s"))),
    )


_PARSERS: Mapping[frozenset[str], Parser] = {
    frozenset({"TIMESTAMP", "ContextTokens", "GeneratedTokens"}): _azure,
    frozenset({"Timestamp", "Request tokens", "Response tokens"}): _burst_gpt,
    frozenset({"num_prefill_tokens", "num_decode_tokens"}): _vidur,
    frozenset({"timestamp", "input_length", "output_length"}): _mooncake,
    frozenset({"prompt_tokens", "output_tokens"}): _ours,
}


def _arrival(
    at_s: float | None, prompt: Any, output: Any, blocks: Iterable[int] = (), block_tokens: int = MOONCAKE_BLOCK_TOKENS
) -> Arrival:
    """Blocks that the trace names, the last one cut to length, then what it does not name."""
    if at_s is not None and not abs(at_s) < _MAX_TIME_S:
        raise ValueError(f"arrival time {at_s}")
    left = max(1, _tokens(prompt))
    stretches: list[Stretch] = []
    for name in blocks:
        if left == 0:
            break
        stretches.append(Stretch(min(left, block_tokens), name))
        left -= stretches[-1].tokens
    if left:
        stretches.append(Stretch(left))
    return Arrival(at_s, tuple(stretches), _tokens(output))


def _tokens(value: Any, least: int = 0) -> int:
    if isinstance(value, float | bool):
        raise ValueError(f"{value} is not a whole number")
    count = int(value)
    if not least <= count <= MAX_TOKENS:
        raise ValueError(f"{count} tokens are outside {least} to {MAX_TOKENS}")
    return count


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not 0 <= seconds < _MAX_TIME_S:
        raise ValueError(f"{seconds} seconds")
    return seconds


def _optional(parse: Callable[[Any], Any], value: Any) -> Any:
    return None if value is None else parse(value)


def _slo(ttft_s: float | None, tpot_s: float | None) -> SLO | None:
    return None if ttft_s is None and tpot_s is None else SLO(ttft_s, tpot_s)


def _block_names(blocks: Any) -> tuple[int, ...]:
    if not isinstance(blocks, list | tuple) or len(blocks) > _MAX_BLOCKS:
        raise ValueError("the blocks are not a list")
    return tuple(map(block_name, blocks))


def block_name(block: Any) -> int:
    """The name of a stretch for whatever a trace calls its block: a small number stands for itself."""
    if isinstance(block, int) and 0 <= block < 1 << NAME_BITS:
        return int(block)
    if not isinstance(block, int | str):
        raise ValueError(f"a block is called {str(block)[:40]!r}, which is neither a number nor a string")
    return name_of(repr(block))


def _bounded_lines(file: TextIO) -> Iterator[str]:
    while line := file.readline(_MAX_LINE):
        if len(line) == _MAX_LINE:
            raise BadTrace(f"a line is longer than {_MAX_LINE >> 20} Mi characters")
        yield line
