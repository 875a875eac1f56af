"""What the scenarios of `make clients` share: the server's address, and how a scenario reports. Runs in the clients'
own environments, so it knows the standard library only."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

MODEL, EMBEDDING = "smollm2", "all-minilm-l6-v2"
HELLO = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "name": "weather",
    "description": "The weather in a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def url() -> str:
    return sys.argv[1]


def play(*scenarios: Callable[[], Any]) -> None:
    """Run all; exit with 1 if one fails."""
    failed = 0
    for scenario in scenarios:
        try:
            scenario()
            print(f"  ok    {scenario.__name__}")
        except Exception:
            failed += 1
            print(f"  FAIL  {scenario.__name__}\n{traceback.format_exc()}")
    print(f"{len(scenarios) - failed} of {len(scenarios)} scenarios")
    sys.exit(failed > 0)


def raises(kind: type[Exception], work: Callable[[], Any]) -> Any:
    try:
        work()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was expected")
