"""Runs pure functions of bytes in other processes, a few at a time, and gives what came of them as it comes.

Bytes in, bytes out: nothing is pickled. `cluster/ray.py` has the same function for many machines.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess

from headrace.core.types import HeadraceError

Work = Callable[[bytes], bytes]
Each = Callable[[Work, Sequence[bytes]], Iterator[tuple[int, bytes]]]  # (position of the item, what came of it)


class WorkerFailed(HeadraceError):
    """A process ended without a result, or with the error of its work."""


def forked(processes: int) -> Each:
    """Work in up to `processes` children of this one. Needs an operating system that forks."""

    def each(work: Work, items: Sequence[bytes]) -> Iterator[tuple[int, bytes]]:
        forking = multiprocessing.get_context("fork")
        waiting = list(enumerate(items))[::-1]
        running: dict[Connection[bytes, bytes], tuple[int, ForkProcess]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < processes:
                    at, item = waiting.pop()
                    here, there = forking.Pipe(duplex=False)
                    process = forking.Process(target=_work, args=(there, work, item), daemon=True)
                    process.start()
                    there.close()
                    running[here] = at, process
                for ready in wait(list(running)):
                    assert isinstance(ready, Connection)
                    at, process = running.pop(ready)
                    yield at, _received(ready)
                    process.join()
        finally:
            for _, process in running.values():
                process.terminate()

    return each


def here(work: Work, items: Sequence[bytes]) -> Iterator[tuple[int, bytes]]:
    """One after the other in this process."""
    return ((at, work(item)) for at, item in enumerate(items))


def _work(there: Connection, work: Work, item: bytes) -> None:
    """In the other process: a mark, and the result or the words of the error."""
    try:
        result = b"+" + work(item)
    except Exception as error:
        words = str(error) if isinstance(error, HeadraceError) else f"{type(error).__name__}: {error}"
        result = b"-" + words.encode()
    there.send_bytes(result)


def _received(here: Connection) -> bytes:
    try:
        result = here.recv_bytes()
    except EOFError as error:
        raise WorkerFailed("a process ended without a result; was memory short?") from error
    if result[:1] == b"-":
        raise WorkerFailed(result[1:].decode())
    return result[1:]
