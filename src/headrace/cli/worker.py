"""The door of the process that computes, which `headrace serve` starts and nobody else: what is to be loaded comes over
the socket that it inherits, whose number is its one argument. Not a command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from headrace.cli.assemble import find_model, grammars_of, open_embedding, text_of
from headrace.core.facts import ModelFacts
from headrace.device import worker

if TYPE_CHECKING:
    from headrace.device.wire import Load


def load(what: Load, phase: Callable[[str], None], opened: Callable[[ModelFacts], None]) -> worker.Held:
    """Everything that plans and texts need, on the thread that will compute."""
    from headrace.device.checkpoint import open_checkpoint
    from headrace.device.control import Controls
    from headrace.device.facts import facts_of
    from headrace.device.kvstore import Kept
    from headrace.device.load import load_here

    path = find_model(what.model, phase)
    checkpoint = open_checkpoint(path)
    facts = facts_of(checkpoint, path)
    opened(facts)
    with ThreadPoolExecutor(1) as beside:
        words = beside.submit(lambda: grammars_of(text_of(facts)))
        loaded = load_here(
            checkpoint,
            what.device,
            what.block_tokens,
            what.max_running,
            what.step_tokens,
            what.host_bytes,
            phase,
            kv=None if what.kv_fd is None else Kept(what.kv_fd, what.kv_kept),
            measured=not (what.again or what.kv_kept),
        )
        loaded.executor.controls = Controls(words.result(), loaded.executor.capacity.vocab)
    encoder = open_embedding(what.embedding, loaded.device.type, phase) if what.embedding else None
    if encoder is None:
        return worker.Held(loaded.executor, loaded.facts())
    return worker.Held(loaded.executor, loaded.facts(worker.encoder_facts(*encoder)), encoder[0])


if __name__ == "__main__":
    sys.exit(worker.main(worker.from_argument(sys.argv[1] if len(sys.argv) == 2 else ""), load))
