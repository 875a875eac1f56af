"""The few questions a newcomer can answer, turned into the flags of `headrace plan`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from headrace.core.config import BadSetting

Ask = Callable[[str], str]

KINDS = {"chat": "sharegpt", "documents": "arxiv", "code": "azure-chat", "reasoning": "reasoning"}
FEELS = {"snappy": "ttft=0.5,tpot=0.03", "normal": "ttft=1.5,tpot=0.06", "patient": "ttft=5.0,tpot=0.15"}


def answered(args: argparse.Namespace, ask: Ask) -> None:
    """Fill `args` from answers; an empty one takes what stands in brackets. Raises BadSetting."""
    args.model = _word(ask, "Which model?", args.model)
    args.devices = _word(ask, "Which devices may I use?", " ".join(args.devices)).split()
    people = _number(ask, "How many people use it in a busy hour?", 100)
    each = _number(ask, "How many questions does each of them ask in that hour?", 20)
    kind = _choice(ask, "What do they do?", KINDS)
    feel = _choice(ask, "How should it feel?", FEELS)
    answers = {"arrivals": f"poisson:{people * each / 3600:.6g}", "lengths": KINDS[kind], "slo": FEELS[feel]}
    for name, value in answers.items():
        setattr(args, f"workload.{name}", value)


def _word(ask: Ask, question: str, usual: str) -> str:
    return ask(f"{question} [{usual}] ").strip() or usual


def _number(ask: Ask, question: str, usual: float) -> float:
    text = _word(ask, question, f"{usual:g}")
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise BadSetting(f"{text!r} is not a number above 0")
    return value


def _choice(ask: Ask, question: str, known: dict[str, str]) -> str:
    usual = "normal" if "normal" in known else next(iter(known))
    word = _word(ask, f"{question} ({', '.join(known)})", usual)
    if word not in known:
        raise BadSetting(f"{word!r} is none of {', '.join(known)}")
    return word
