"""`make conformance`: schemathesis makes requests of /openapi.json, right and wrong ones, and the server answers as the
document says or refuses: no 5xx but those that are documented, bodies and stream events of the published types, nothing
of the server's insides in an error.

    python tests/e2e/conformance.py [CASES] [--workers N] [--seed N] [--first CASE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import hypothesis
import jsonschema
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.failures import FailureGroup

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "gateway"), str(HERE.parents[1] / "benchmarks")]

from gateway_rig import BYTE_LEVEL, LEAK  # noqa: E402
from tiny_chat import write  # noqa: E402

FLAGS = ("--kv-memory", "64MiB", "--max-body", "1MiB")
CONTEXT_TOKENS = 128  # an answer that nobody bounds is as long as this
CHUNK = 100  # cases of one operation that hypothesis makes in one run
CHECKED = ("status_code_conformance", "content_type_conformance", "response_schema_conformance")
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
LONGEST_S = 60


@dataclass(frozen=True)
class Share:
    """Some cases of one operation, for one worker."""

    url: str
    label: str  # as schemathesis names an operation: POST /v1/completions
    negative: bool
    cases: int
    seed: int


@dataclass
class Found:
    cases: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)  # by operation: how often with 200
    wrong: dict[str, str] = field(default_factory=dict)  # by kind of failure: the first that was met

    def add(self, other: Found) -> None:
        self.cases += other.cases
        self.statuses += other.statuses
        self.answered.update(other.answered)
        self.wrong = other.wrong | self.wrong


def shares(url: str, cases: int, seed: int) -> list[Share]:
    """Operations with a body get ten times the cases of those with only a path, half of them wrong; pages three. In
    chunks, for hypothesis slows down the more it has made, and so that progress can be told."""
    document = requests.get(f"{url}/openapi.json", timeout=10).json()
    weights: dict[str, int] = {}
    found: list[Share] = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            label = f"{method.upper()} {path}"
            if "requestBody" in operation or "parameters" in operation:
                weights[label] = 10 if "requestBody" in operation else 1
            else:
                found.append(Share(url, label, False, 3, seed))
    left = cases - 3 * len(found)
    for label, weight in weights.items():
        each = -(-left * weight // sum(weights.values()))
        wrong = each // 2 if weight > 1 else 0  # a path is never wrong: any text is one
        for negative, count in ((False, each - wrong), (True, wrong)):
            found += [
                Share(url, label, negative, min(CHUNK, count - begin), 1000 * seed + begin)
                for begin in range(0, count, CHUNK)
            ]
    random.Random(seed).shuffle(found)
    return found


@cache
def _schema(url: str) -> Any:
    load_all_checks()
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


def play(share: Share) -> Found:
    """All cases of a share, and what was wrong with the answers."""
    schema = _schema(share.url)
    method, path = share.label.split(" ", 1)
    operation = schema[path][method]
    session, found = requests.Session(), Found()
    known = _known(share, session)
    events = _events(schema.raw_schema, share.label)
    quick = {"database": None, "deadline": None, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}

    @hypothesis.settings(max_examples=share.cases, **quick)
    @hypothesis.given(operation.as_strategy(MODES[share.negative]))
    def ask(case: Case) -> None:
        if found.cases == share.cases:
            return
        if found.cases % 2:
            _name_what_is_there(case, known)
        response = case.call(share.url, session=session, timeout=LONGEST_S)
        found.cases += 1
        found.statuses[response.status_code] += 1
        found.answered[share.label] += response.status_code == 200
        for kind, why in _wrong(case, response, events):
            asked = json.dumps(case.as_curl_command())[:3000]
            found.wrong.setdefault(f"{share.label}: {kind}", f"{why[:1500]}\n{asked}\n{response.text[:500]}")

    for again in range(share.cases):  # an operation with few distinct requests is asked the same again
        if found.cases < share.cases:
            hypothesis.seed(share.seed + again)(ask)()
    return found


def _known(share: Share, session: requests.Session) -> Mapping[str, str]:
    """Something to ask for on pages about what is kept, where made up names would lead nowhere."""
    known = {"model": "all-minilm-l6-v2" if "embed" in share.label else "tiny"}
    if "{response_id}" in share.label:
        kept = session.post(f"{share.url}/v1/responses", json={"input": "a", "max_output_tokens": 1}, timeout=60)
        known["response_id"] = kept.json()["id"]
    if share.label.endswith("/explain"):
        asked = session.post(f"{share.url}/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=60)
        known["id"] = asked.json()["id"]
    if "{file}" in share.label:
        known["file"] = "page.css"
    if "{file_id}" in share.label or "batches" in share.label:
        body = {"prompt": "a", "max_tokens": 1}
        many = 500 if share.label.endswith("/cancel") else 1  # so that there is something left to cancel
        lines = [{"custom_id": str(at), "method": "POST", "url": "/v1/completions", "body": body} for at in range(many)]
        form = {"file": ("in.jsonl", "\n".join(map(json.dumps, lines)))}
        kept = session.post(f"{share.url}/v1/files", files=form, data={"purpose": "batch"}, timeout=60)
        known |= dict.fromkeys(("file_id", "input_file_id"), kept.json()["id"])
    if "{batch_id}" in share.label:
        body = {"input_file_id": known["file_id"], "endpoint": "/v1/completions"}
        known["batch_id"] = session.post(f"{share.url}/v1/batches", json=body, timeout=60).json()["id"]
    return known


def _name_what_is_there(case: Case, known: Mapping[str, str]) -> None:
    for name in (case.path_parameters or {}).keys() & known.keys():
        case.path_parameters[name] = known[name]
    if isinstance(case.body, dict):
        named = {name: known[name] for name in case.body.keys() & known.keys() if isinstance(case.body[name], str)}
        case.body |= named | ({"endpoint": "/v1/completions"} if "input_file_id" in named else {})


def _wrong(case: Case, response: Any, events: Any) -> Iterator[tuple[str, str]]:
    documented = case.operation.definition.raw["responses"]
    if response.status_code >= 500 and str(response.status_code) not in documented:
        yield f"status {response.status_code}", "a server error that the document does not name"
    try:
        case.validate_response(response, checks=list(CHECKS.get_by_names(list(CHECKED))))
    except FailureGroup as group:
        for failure in group.exceptions:
            yield f"{type(failure).__name__} of {response.status_code}", str(failure)
    leak = LEAK.search(response.content) if response.status_code >= 400 else None
    if leak and leak[0].decode() not in str(case.body) + case.formatted_path:
        yield "leak", leak[0].decode()
    if response.status_code == 200 and events and "application/json" not in response.headers["content-type"]:
        for line in response.text.splitlines():
            data = line.removeprefix("data: ")
            if data.startswith("{") and (error := next(events.iter_errors(json.loads(data)), None)):
                yield "event", f"{error.message} in {line}"


def _events(document: Mapping[str, Any], label: str) -> Any:
    """A validator of one event's data, which may be an error as well."""
    method, path = label.split(" ", 1)
    responses = document["paths"][path][method.lower()]["responses"]
    stream = next((how for how in responses["200"].get("content", {}).values() if "x-event" in how), None)
    if stream is None:
        return None
    error = responses["default"]["content"]["application/json"]["schema"]
    kinds = {"anyOf": [stream["x-event"], error], "components": document["components"]}
    return jsonschema.Draft202012Validator(kinds)


def rest(parts: Sequence[Share], first: int) -> list[Share]:
    """Without those that a run which was stopped after `first` cases had finished. Shares come in one order."""
    ends = accumulate(part.cases for part in parts)
    return [part for part, end in zip(parts, ends, strict=True) if end > first]


def all_shares(parts: Sequence[Share], workers: int) -> Found:
    total, bar = Found(), Bar(sum(part.cases for part in parts))
    if workers == 1:
        for part in parts:
            total.add(play(part))
        return total
    with ProcessPoolExecutor(workers) as pool:
        for done in as_completed([pool.submit(play, part) for part in parts]):
            found = done.result()
            for kind in found.wrong.keys() - total.wrong.keys():
                print(f"== {kind}\n{found.wrong[kind]}\n", flush=True)
            total.add(found)
            bar.show(total)
    return total


@dataclass
class Bar:
    """How far it is, on stderr."""

    cases: int
    begin_s: float = field(default_factory=time.perf_counter)

    def show(self, found: Found) -> None:
        share, taken_s = found.cases / self.cases, time.perf_counter() - self.begin_s
        full, left_s = round(30 * share), taken_s / share * (1 - share)
        told = f"[{'#' * full}{'.' * (30 - full)}] {found.cases} of {self.cases}, {len(found.wrong)} kinds of failures"
        begin, end = ("\r", "") if sys.stderr.isatty() else ("", "\n")
        print(f"{begin}{told}, {left_s / 60:.1f} min left ", end=end, file=sys.stderr, flush=True)


@contextmanager
def model() -> Iterator[Path]:
    """A folder with a model of noise that knows 330 tokens and chats, and room for a server's state."""
    with tempfile.TemporaryDirectory() as folder:
        yield write(Path(folder) / "tiny", BYTE_LEVEL, context_tokens=CONTEXT_TOKENS)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("cases", nargs="?", type=int, default=20_000)
    options.add_argument("--workers", type=int, default=max(2, os.cpu_count() or 1))
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--first", type=int, default=0, metavar="CASE", help="go on where a run was stopped")
    args = options.parse_args()
    from server import serving

    begin_s = time.perf_counter()
    with model() as folder, serving(str(folder), *FLAGS, "--state-dir", str(folder / "state")) as (url, _):
        asked = rest(shares(url, args.cases, args.seed), args.first)
        found = all_shares(asked, args.workers)
        alive = requests.get(f"{url}/health/ready", timeout=10)
    by_status = ", ".join(f"{count} x {status}" for status, count in sorted(found.statuses.items()))
    print(f"{found.cases} cases, seed {args.seed}, in {time.perf_counter() - begin_s:.0f} s: {by_status}")
    never = [label for label, count in found.answered.items() if not count]
    print(f"operations that never answered with 200: {', '.join(never) or 'none'}")
    print(f"{len(found.wrong)} kinds of failures; then {alive.text}")
    return int(bool(found.wrong) or found.cases < args.cases - args.first or alive.status_code != 200)


if __name__ == "__main__":
    sys.exit(main())
