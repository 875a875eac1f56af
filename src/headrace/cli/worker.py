"""The door of the process that computes, which `headrace serve` starts and nobody else: what is to be loaded comes over
the socket that it inherits, whose number is its argument. With `nursery` before that, it is the one that forks them.
Not a command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from headrace.cli.assemble import find_model, grammars_of, looked_at, open_embedding, text_of
from headrace.core.facts import ModelFacts
from headrace.device import nursery, worker

if TYPE_CHECKING:
    from headrace.core.facts import EncoderFacts
    from headrace.device.encoder import Encoder
    from headrace.device.wire import Load, Seen

_TORCH_BYTES = 200 << 20  # about what torch takes, which an embedding model brings with it when it is first asked
_WORDS_BYTES = 25  # of a tokenizer in memory, for each of its file; until it is measured


def load(
    what: Load, phase: Callable[[str], None], opened: Callable[[ModelFacts], None], packed: Callable[[int], None]
) -> worker.Held:
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
            packed=packed,
        )
        loaded.executor.controls = Controls(words.result(), loaded.executor.capacity.vocab)
    encoder = open_embedding(what.embedding, loaded.device, phase) if what.embedding else None
    known, own = _beside(encoder)
    told = replace(loaded.facts(known), process=max(0, own - loaded.memory.weights))
    return worker.Held(loaded.executor, told, encoder[0] if encoder else None)


def look(what: Load) -> Seen:
    """What a model is, and what it will take, in a process of its own; and the embedding model that would be beside."""
    from headrace.device.wire import Seen

    facts, expected = looked_at(what)
    encoder = open_embedding(what.embedding, expected.device, lambda _: None) if what.embedding else None
    known, own = _beside(encoder)
    more, shared = _WORDS_BYTES * len(facts.tokenizer_json), worker.all_bytes() - worker.own_bytes()
    return Seen(facts, replace(expected, process=own + more, shared=shared), known)


def _beside(encoder: tuple[Encoder, str] | None) -> tuple[EncoderFacts | None, int]:
    """What the embedding model beside is, and bytes of this process once that is loaded."""
    if encoder is None:
        return None, worker.own_bytes()
    to_come = 0 if encoder[0].loaded else encoder[0].nbytes + _TORCH_BYTES
    return worker.encoder_facts(*encoder), worker.own_bytes() + to_come


def preload() -> None:
    """Everything that every process needs, before there are any."""
    import headrace.device.checkpoint
    import headrace.device.control
    import headrace.device.grammar
    import headrace.device.load
    import headrace.device.sources
    import headrace.gateway.text
    from headrace.device.native.library import variant

    if variant() in (None, "portable"):
        import headrace.device.reference.forward  # noqa: F401


def run(arguments: list[str]) -> int:
    end = worker.from_argument(arguments[-1] if arguments else "")
    if arguments[0] != "nursery":
        return worker.main(end, load, look)
    preload()
    return nursery.nurse(end, lambda theirs, kv_fd: worker.main(theirs, load, look, kv_fd))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
