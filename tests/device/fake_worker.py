"""A process that computes with the strict executor of the engine's tests instead of a model, and misbehaves on request:
what is in the folder that it is told to load says how. Each file is used up by the process that obeys it.

    refuse   loading is refused, with the words in the file    die, stop, endless   in the step of this number
    break    loading fails unexpectedly                        nonsense   the same, by an answer of no format
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from null_executor import VOCAB, NullExecutor

from headrace.core.facts import EncoderFacts, LoadFacts, Memory, ModelFacts
from headrace.core.ports import Capacity, Encoding
from headrace.core.step import StepPlan, StepResult
from headrace.core.types import HeadraceError
from headrace.device import nursery, wire, worker

CAPACITY = Capacity(blocks=64, block_tokens=4, max_context_tokens=100, vocab=VOCAB, layers=1)


def faults(folder: Path, step: int) -> str | None:
    """What to do in this step, if anything."""
    for kind in ("die", "stop", "endless", "nonsense"):
        found = folder / kind
        if found.exists() and int(found.read_text()) <= step:
            found.unlink()
            return kind
    return None


class Executor:
    """As `ModelExecutor`, as far as the worker knows it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._null = NullExecutor(CAPACITY)

    def step(self, plan: StepPlan) -> StepResult:
        match faults(self._folder, plan.step):
            case "die":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "endless":
                threading.Event().wait()
            case "nonsense":
                os.write(int(sys.argv[1]), b"\xff\xff\xff\xff what?")
        if self._folder.joinpath("fail").exists():
            self._folder.joinpath("fail").unlink()
            self._null.begin(plan)
            self._null.end(plan)
            self._null.spoil(plan)
            raise RuntimeError("the device fell over")
        return self._null.perform(plan)

    async def run(self, plan: StepPlan) -> StepResult:
        self._null.begin(plan)
        return self._null.end(plan)


class Encoder:
    loaded, nbytes = True, 0

    def step(self, sequences: Any) -> list[bytes]:
        return [bytes(sequence) for sequence in sequences]


def load(
    what: wire.Load, phase: Callable[[str], None], opened: Callable[[ModelFacts], None], packed: Callable[[int], None]
) -> worker.Held:
    folder = Path(what.model)
    phase("open the folder")
    refuse = folder / "refuse"
    if refuse.exists():
        words = refuse.read_text()
        refuse.unlink()
        raise HeadraceError(words)
    if (folder / "break").exists():
        raise ZeroDivisionError("nobody foresaw this")
    files = tuple((str(file), file.stat().st_size, 0) for file in sorted(folder.glob("*.gguf")))
    opened(ModelFacts("fake", "none", 0, 0, "gguf", "{}", None, None, None, frozenset(), False, files))
    phase("think")
    packed(1)
    if what.kv_fd is not None:
        os.pwrite(what.kv_fd, b"kept", 0)
    memory = Memory(0, 0, 64 * 16, 1 << 30, 16, 4, 100)
    encoder = EncoderFacts(Encoding("fake", 4, 100, 100, "bert"), "{}", 0)
    facts = LoadFacts(CAPACITY, memory, "fp32", "cpu", ((1, 0.001), (2, 0.002)), 0, "fp32", "none", encoder)
    executor: Any = Executor(folder)
    embedding: Any = Encoder()
    return worker.Held(executor, facts, embedding)


if __name__ == "__main__":
    end = worker.from_argument(sys.argv[-1])
    if sys.argv[1] != "nursery":
        sys.exit(worker.main(end, load))
    sys.exit(nursery.nurse(end, lambda theirs, kv_fd: worker.main(theirs, load, kv_fd=kv_fd)))
