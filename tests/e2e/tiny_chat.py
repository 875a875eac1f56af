"""A tiny random model that chats, behind the real engine and the real gateway: in this process, on a socket."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "cli"))
import tiny_model

from headrace.cli import parser
from headrace.cli.assemble import Phases, assemble
from headrace.cli.extras import Beside, model_of, open_beside
from headrace.core import clock
from headrace.core.config import GatewaySettings, load
from headrace.gateway.app import application
from headrace.gateway.keys import Guard
from headrace.gateway.models import Models
from headrace.gateway.server import serve

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking %}<think>\n"
    "{% else %}<think>\n\n</think>\n\n{% endif %}"
)
END = "<|im_end|>"


def write(folder: Path, tokenizer_json: str, context_tokens: int = 2048) -> Path:
    """A model folder. It reasons if it is asked to, in a template's way, and writes whatever its noise says."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    config = {"eos_token_id": tokenizer.token_to_id(END), "max_position_embeddings": context_tokens}
    tiny_model.write(folder, tokenizer, **config)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "chat_template": TEMPLATE}))
    return folder


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[str]:
    """The URL of `headrace serve FOLDER FLAGS`, in a thread of its own."""
    args = parser().parse_args(["serve", str(folder), "--port", "0", *flags])
    settings = load(GatewaySettings, args, {})
    assembled = assemble(args, {}, Phases(), settings.served_name or "tiny", gateway=settings)
    beside = open_beside(assembled, settings, Phases(), Guard())
    listening = threading.Event()
    found: dict[str, Any] = {}

    def announce(url: str) -> None:
        found["url"] = url
        listening.set()

    async def main() -> None:
        found["loop"], found["task"] = asyncio.get_running_loop(), asyncio.current_task()
        app = application(Models([model_of(assembled, assembled.engine, settings)]), settings, beside.extras)
        running = [asyncio.create_task(run) for run in _beside(assembled.run(), beside)]
        try:
            await serve(app, assembled.engine, settings, announce)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await assembled.executor.close()

    thread = threading.Thread(target=_run, args=(main, listening))
    thread.start()
    try:
        assert listening.wait(30) and "url" in found
        yield found["url"]
    finally:
        found["loop"].call_soon_threadsafe(found["task"].cancel)
        thread.join(30)
        assert not thread.is_alive()


def _beside(engine: Any, beside: Beside) -> list[Any]:
    return [engine] if beside.batcher is None else [engine, beside.batcher.run()]


def _run(main: Any, listening: threading.Event) -> None:
    try:
        clock.run(main())
    except asyncio.CancelledError:
        pass
    finally:
        listening.set()
