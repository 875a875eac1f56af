"""The cores of a CPU divided among lanes: steps of each lane run on a thread of its own, with its own team of compute
threads pinned to its own cores. Owns these threads; which share a lane has, its plans say.

    cores     0  1  2  3  4  5  6  7
    (50, 50)  |-- lane 0 -||-- lane 1 --|
    (80, 60)  |----- lane 0 ------|             promised twice: both on the cores in between
                       |---- lane 1 ----|

A thread keeps its team and its cores for good; a lane that gets another share goes on, with its next step, on another
thread. On a device with streams of its own the threads are the same and the steps wait for each other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from headrace.core.step import Lane


class Workers:
    """`cores` are those of all lanes together, by default as many as torch was told to use."""

    def __init__(self, cores: Sequence[int] | None = None) -> None:
        self.cores = tuple(_usable() if cores is None else cores)
        self._threads: dict[tuple[int, ...], dict[int, ThreadPoolExecutor]] = {}  # by cores and lane

    def of(self, lane: int, lanes: Sequence[Lane]) -> ThreadPoolExecutor:
        """Where a step of this lane runs under these shares."""
        cores = divided(self.cores, [one.share for one in lanes])[lane]
        made = self._threads.setdefault(cores, {})
        if lane not in made:
            made[lane] = ThreadPoolExecutor(1, f"headrace-lane-{lane}", initializer=_settle, initargs=(cores,))
        return made[lane]

    def close(self) -> None:
        for made in self._threads.values():
            for thread in made.values():
                thread.shutdown(wait=True, cancel_futures=True)


def divided(cores: Sequence[int], shares: Sequence[float]) -> list[tuple[int, ...]]:
    """The cores of two lanes: the first ones and the last ones, at least one each, as many as the shares come to when
    rounded. They overlap only if the shares add up to more than the device, or if there is one core for both."""
    count = len(cores)
    first, last = (min(max(round(share * count), 1), count) for share in shares)
    if sum(shares) <= 1.0 + 1e-9 and count > 1:
        first = min(first, count - 1)
        last = min(last, count - first)
    return [tuple(cores[:first]), tuple(cores[count - last :])]


def _usable() -> list[int]:
    """The cores this process may run on, as many as torch computes with."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return allowed[: max(1, torch.get_num_threads())]


def _settle(cores: Sequence[int]) -> None:
    """First thing on a new thread: torch makes its team when it first computes, and the team inherits the cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
