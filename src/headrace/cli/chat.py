"""`headrace run MODEL`: chat with a model in the terminal, without a server.

Example:
  headrace run smollm2
  headrace run smollm2 "Why is the sky blue?" --max-tokens 80

With a prompt it answers once; without one it keeps a conversation until end of input. After each answer a line says how
long the prompt and the answer took.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headrace.cli.assemble import Assembled, Phases, add_model, assemble
from headrace.core import clock, config
from headrace.core.types import HeadraceError, Sampling

if TYPE_CHECKING:
    from headrace.gateway.chain import Call, Handler


def add(commands: Any) -> None:
    from headrace.cli import Formatter

    parser = commands.add_parser(
        "run", help="chat with a model in the terminal", description=__doc__, formatter_class=Formatter
    )
    add_model(parser)
    parser.add_argument("prompt", nargs="?", help="answer this and stop; '-' reads it from standard input")
    talk = parser.add_argument_group("conversation")
    talk.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    talk.add_argument("--max-tokens", type=int, default=512, metavar="N", help="longest answer (default: 512)")
    talk.add_argument("--temperature", type=float, default=0.7, metavar="X", help="0 is greedy (default: 0.7)")
    talk.add_argument("--top-p", type=float, default=0.95, metavar="X", help="nucleus (default: 0.95)")
    talk.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same answer (default: 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    _check(args)
    assembled = assemble(args, config.read_toml(args.config), Phases())
    if not assembled.text.has_chat:
        raise HeadraceError(f"{assembled.text.why_no_chat}; serve it and use /v1/completions instead")
    return clock.run(_talk(args, assembled))


def _check(args: argparse.Namespace) -> None:
    if args.max_tokens < 1:
        raise HeadraceError("--max-tokens must be at least 1")
    if not 0 <= args.temperature <= 10:
        raise HeadraceError("--temperature must lie between 0 and 10")
    if not 0 < args.top_p <= 1:
        raise HeadraceError("--top-p must be above 0 and at most 1")


@dataclass(slots=True)
class _Answer:
    """One answer as it streams, and its times."""

    text: str = ""
    first_s: float | None = None
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0


async def _talk(args: argparse.Namespace, assembled: Assembled) -> int:
    """Ask and answer until the input ends."""
    from headrace.gateway.generation import Generation

    handler = Generation(assembled.engine, assembled.text)
    engine = asyncio.create_task(assembled.engine.run())
    messages: list[dict[str, str]] = [{"role": "system", "content": args.system}] if args.system else []
    turn = 0
    try:
        while (prompt := await _next_prompt(args, turn)) is not None:
            messages.append({"role": "user", "content": prompt})
            answer = await _stream(handler, _call(args, assembled.name, messages, turn))
            messages.append({"role": "assistant", "content": answer.text})
            turn += 1
            if args.prompt is not None:
                break
    finally:
        engine.cancel()
        await asyncio.gather(engine, return_exceptions=True)
        await assembled.executor.close()
        assembled.text.close()
    return 0


async def _next_prompt(args: argparse.Namespace, turn: int) -> str | None:
    """The prompt of the command line, or the next line that is not empty, or None at the end of input."""
    if args.prompt is not None:
        return sys.stdin.read() if args.prompt == "-" else str(args.prompt)
    try:
        while not (line := (await asyncio.to_thread(input, "\n> ")).strip()):
            pass
    except EOFError:
        return None
    return line


def _call(args: argparse.Namespace, model: str, messages: list[dict[str, str]], turn: int) -> Call:
    from headrace.gateway.chain import Call, Chat

    sampling = Sampling(temperature=args.temperature, top_p=args.top_p, seed=args.seed + turn)
    return Call(f"run-{turn}", Chat(tuple(messages)), sampling, max_new_tokens=args.max_tokens, model=model)


async def _stream(handler: Handler, call: Call) -> _Answer:
    """Print one answer as it comes, then its times."""
    from headrace.gateway.chain import Ended, Piece

    answer, begin_s = _Answer(), clock.now()
    async for event in handler(call):
        if isinstance(event, Piece):
            answer.first_s = clock.now() if answer.first_s is None else answer.first_s
            answer.text += event.text
            print(event.text, end="", flush=True)
        elif isinstance(event, Ended):
            usage = event.usage
            answer.tokens, answer.prompt_tokens, answer.cached_tokens = (
                usage.output_tokens,
                usage.prompt_tokens,
                usage.cached_tokens,
            )
    print()
    print(_timings(answer, begin_s, clock.now()), file=sys.stderr)
    return answer


def _timings(answer: _Answer, begin_s: float, end_s: float) -> str:
    first_s = answer.first_s if answer.first_s is not None else end_s
    prompt = f"prompt {answer.prompt_tokens} tokens ({answer.cached_tokens} cached) in {first_s - begin_s:.2f} s"
    if answer.tokens < 2 or end_s <= first_s:
        return f"[{prompt}]"
    return f"[{prompt}, answer {answer.tokens} tokens at {(answer.tokens - 1) / (end_s - first_s):.1f} tokens/s]"
