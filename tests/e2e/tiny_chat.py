"""A tiny random model that chats, behind the real engine and the real gateway: in this process, on a socket."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "cli"))
import tiny_model

from headrace.cli import parser
from headrace.cli.assemble import Phases
from headrace.cli.extras import open_beside
from headrace.cli.housing import open_housing
from headrace.cli.recordings import Recordings
from headrace.cli.serve import living
from headrace.core import clock
from headrace.core.config import GatewaySettings, load
from headrace.gateway.keys import Guard
from headrace.gateway.limits import InProcess, Ledger
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
def serving(folders: Path | Sequence[Path | str], *flags: str) -> Iterator[str]:
    """The URL of `headrace serve FOLDERS FLAGS`, in a thread of its own. One model alone is called tiny."""
    folders = [folders] if isinstance(folders, Path) else folders
    name = () if len(folders) > 1 or "--served-name" in flags else ("--served-name", "tiny")
    args = parser().parse_args(["serve", *map(str, folders), "--port", "0", *name, *flags])
    settings = load(GatewaySettings, args, {})
    recordings = Recordings(None, None)
    housing = open_housing(args, {}, Phases(), settings, recordings)
    beside = open_beside(housing, settings, Phases(), Guard(), InProcess(Ledger(), clock.now))
    listening = threading.Event()
    found: dict[str, Any] = {}

    def announce(url: str) -> None:
        found["url"] = url
        listening.set()

    async def main() -> None:
        found["loop"], found["task"] = asyncio.get_running_loop(), asyncio.current_task()
        async with living(housing, beside, settings, recordings) as app:
            await serve(app, housing.host, settings, announce)

    thread = threading.Thread(target=_run, args=(main, listening))
    thread.start()
    try:
        assert listening.wait(120) and "url" in found
        yield found["url"]
    finally:
        found["loop"].call_soon_threadsafe(found["task"].cancel)
        thread.join(30)
        assert not thread.is_alive()


def _run(main: Any, listening: threading.Event) -> None:
    try:
        clock.run(main())
    except asyncio.CancelledError:
        pass
    finally:
        listening.set()
