"""`headrace serve MODEL ...`: a server that any OpenAI client can talk to, in front of one model or several.

Several share one memory: a model is loaded when the first request asks for it, and the one that was used least recently
makes room. See docs/models.md.

Example:
  headrace serve smollm2
  headrace serve ./my-model.gguf --kv-memory 2GiB --port 9000
  headrace serve smollm2 small=./other.gguf ORG/NAME --memory 6GiB --keep-alive-s 600
  headrace serve smollm2 --record traffic.jsonl      # then: headrace simulate --trace traffic.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli.assemble import MODEL_HELP, Phases
from headrace.cli.keys import file_of, guard_of, limits_of
from headrace.cli.notify import Manager
from headrace.cli.recordings import Recordings
from headrace.core import clock, config
from headrace.core.config import (
    DeviceSettings,
    EngineSettings,
    GatewaySettings,
    KeySettings,
    LimitSettings,
    ModelsSettings,
    format_bytes,
)

if TYPE_CHECKING:
    from headrace.cli.extras import Beside
    from headrace.cli.housing import Housing

_HELLO = """
Listening on {url} (stop with Ctrl-C). Try:

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "What is a headrace?"}}], "max_tokens": 64}}'

  python -c 'from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="none")
  for event in client.chat.completions.create(model="{name}", stream=True,
          messages=[{{"role": "user", "content": "What is a headrace?"}}]):
      print(event.choices[0].delta.content or "", end="", flush=True)'
"""


def add(commands: Any) -> None:
    from headrace.cli import Formatter

    parser = commands.add_parser(
        "serve", help="serve models to any OpenAI client", description=__doc__, formatter_class=Formatter
    )
    parser.add_argument(
        "models",
        nargs="*",
        default=["smollm2"],
        metavar="[NAME=]MODEL",
        help=f"{MODEL_HELP} (default: smollm2); the first answers whoever names none",
    )
    parser.add_argument(
        "--config", "--plan", type=Path, metavar="FILE", help="TOML file with sections [engine], [device], ..."
    )
    for settings in (EngineSettings, DeviceSettings, ModelsSettings, GatewaySettings, KeySettings, LimitSettings):
        config.add_flags(parser, settings)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from headrace.cli.extras import open_beside
    from headrace.cli.housing import open_housing
    from headrace.gateway.server import check

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    toml = config.read_toml(args.config)
    settings = config.load(GatewaySettings, args, toml)
    keys = file_of(args, toml)
    guard = guard_of(keys)
    limits = limits_of(keys, config.load(LimitSettings, args, toml))
    check(settings, guard.asks)  # before minutes of loading, not after
    phase = Phases()
    print(f"headrace serve {' '.join(args.models)}", file=sys.stderr)
    with Recordings(settings.record, settings.record_plans) as recordings:
        housing = open_housing(args, toml, phase, settings, recordings)
        beside = open_beside(housing, settings, phase, guard, limits)
        try:
            return clock.run(_serve(housing, beside, settings, recordings, phase))
        finally:
            keys.close()


async def _serve(
    housing: Housing, beside: Beside, settings: GatewaySettings, recordings: Recordings, phase: Phases
) -> int:
    """Run the models and the server side by side until a signal drains both."""
    from headrace.gateway.server import serve

    async with living(housing, beside, settings, recordings) as app:
        print(summary(housing, phase), file=sys.stderr)

        manager = Manager(*config.service_manager())
        telling = asyncio.create_task(manager.watched(housing.host.models))

        def ready(url: str) -> None:
            manager.ready()
            print(_HELLO.format(url=url, name=housing.first.known.name), file=sys.stderr, flush=True)

        try:
            await serve(app, housing.host, settings, ready, beside.extras.guard.asks)
        finally:
            telling.cancel()
    return 0


@asynccontextmanager
async def living(
    housing: Housing, beside: Beside, settings: GatewaySettings, recordings: Recordings
) -> AsyncIterator[Any]:
    """The application (ASGI), with everything behind it running and the first model in memory."""
    from headrace.cli.extras import model_of
    from headrace.cli.housing import load_first
    from headrace.gateway.app import application
    from headrace.gateway.models import Models

    running = [asyncio.create_task(housing.host.run())]
    if beside.batcher is not None:
        running.append(asyncio.create_task(beside.batcher.run()))
    try:
        await load_first(housing.host)
        hosted = housing.host.models
        models = [
            model_of(housing, house, settings, recordings.noted(hosted[name])) for name, house in housing.houses.items()
        ]
        yield application(Models(models), settings, beside.extras)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await beside.extras.limits.close()
        housing.door.close()


def summary(housing: Housing, phase: Phases) -> str:
    """What a person wants to know about a server that just started."""
    house, opened = housing.first, housing.first.opened
    assert opened is not None, "the first model was loaded"
    loaded, pid = opened.loaded, getattr(opened.executor, "pid", None)
    where = "" if pid is None else f", process {pid}"
    follows = house.known.engine.token_budget is None and house.known.engine.lanes == "one"
    limit = "at first" if follows else "at most"
    measured = ", ".join(f"{tokens} tokens in {1000 * seconds:.0f} ms" for tokens, seconds in loaded.steps)
    return "\n".join(
        [
            f"{house.known.name}, {loaded.dtype} and {loaded.kv} KV on {loaded.device} ({loaded.kernels}{where}), "
            f"ready in {phase.elapsed_s:.1f} s",
            loaded.memory.table(),
            f"  {'steps':12} {house.token_budget:>10} tokens {limit} (measured: {measured})",
            *(_ledger(housing) if len(housing.houses) > 1 else ()),
        ]
    )


def _ledger(housing: Housing) -> Iterator[str]:
    """How the memory is divided, by what is known of the models."""
    residence = housing.host.residence
    shared = housing.first.known.expected.shared
    beside = f", beside {format_bytes(shared)} that their processes share" if shared else ""
    yield f"{len(housing.houses)} models in {format_bytes(residence.budget)}{beside}, loaded when somebody asks:"
    for name, house in housing.houses.items():
        sizes = house.known.sizes
        parts = [(sizes.weights, "weights"), (sizes.activations, "activations"), (residence.share(name), "KV")]
        parts += [(sizes.process, "its process")] if sizes.process else []
        yield f"  {name}: {', '.join(f'{format_bytes(count)} of {what}' for count, what in parts)}"
