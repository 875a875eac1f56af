"""`headrace serve MODEL`: an OpenAI-compatible server in front of one model.

Example:
  headrace serve smollm2
  headrace serve ./my-model.gguf --kv-memory 2GiB --port 9000
  headrace serve smollm2 --record traffic.jsonl      # then: headrace simulate --trace traffic.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from typing import Any

from headrace.cli.assemble import Assembled, Phases, add_model, assemble, summary
from headrace.cli.extras import Beside, model_of, open_beside
from headrace.cli.keys import file_of, guard_of, limits_of
from headrace.cli.recordings import Recordings
from headrace.core import clock, config
from headrace.core.config import GatewaySettings, KeySettings

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
        "serve", help="serve a model to any OpenAI client", description=__doc__, formatter_class=Formatter
    )
    add_model(parser)
    config.add_flags(parser, GatewaySettings)
    config.add_flags(parser, KeySettings)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from headrace.gateway.server import check

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    toml = config.read_toml(args.config)
    settings = config.load(GatewaySettings, args, toml)
    keys = file_of(args, toml)
    guard = guard_of(keys)
    check(settings, guard.asks)  # before minutes of loading, not after
    phase = Phases()
    print(f"headrace serve {args.model}", file=sys.stderr)
    with Recordings(settings.record, settings.record_plans) as recordings:
        assembled = assemble(args, toml, phase, settings.served_name, recordings.watched, settings)
        beside = open_beside(assembled, settings, phase, guard, limits_of(keys))
        print(summary(assembled, phase), file=sys.stderr)
        try:
            return clock.run(_serve(assembled, beside, settings, recordings))
        finally:
            keys.close()


async def _serve(assembled: Assembled, beside: Beside, settings: GatewaySettings, recordings: Recordings) -> int:
    """Run the engine and the server side by side until a signal drains both."""
    from headrace.gateway.app import application
    from headrace.gateway.models import Models
    from headrace.gateway.server import serve

    service = recordings.noted(assembled.engine)
    app = application(Models([model_of(assembled, service, settings)]), settings, beside.extras)

    def ready(url: str) -> None:
        print(_HELLO.format(url=url, name=assembled.name), file=sys.stderr, flush=True)

    running = [asyncio.create_task(assembled.run())]
    if beside.batcher is not None:
        running.append(asyncio.create_task(beside.batcher.run()))
    try:
        await serve(app, service, settings, ready, beside.extras.guard.asks)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await assembled.executor.close()
    return 0
