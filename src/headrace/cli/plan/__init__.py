"""`headrace plan`: what do I need for this model and this traffic, and what does it cost? Answered by the simulator.

The question is the first word; a model's name alone asks `search`.

Examples:
  headrace plan llama-3.1-70b --devices 8xH100-SXM --arrivals poisson:4 --slo ttft=1.0,tpot=0.05
  headrace plan fit llama-3.1-70b --device 4xH100-SXM --show-work
"""

from __future__ import annotations

from typing import Any

from headrace.cli.plan import api, elastic, fit, mix, pools, power, roles, search, thoughts

QUESTIONS = (search, fit, mix, pools, roles, elastic, power, thoughts, api)


def add(commands: Any) -> None:
    from headrace.cli import Formatter

    parser = commands.add_parser(
        "plan", help="what you need, and what it costs", description=__doc__, formatter_class=Formatter
    )
    questions = parser.add_subparsers(dest="question", required=True, metavar="QUESTION")
    for question in QUESTIONS:
        question.add(questions)
    parser.usual = ("search", frozenset(questions.choices) | {"-h", "--help"})
