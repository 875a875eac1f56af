"""Where each KV block lives beside the device: copies in the host's memory, found by the same keys. Plans copies and
makes none. Owns which host block holds what, which copy is given up first, and the copies of the step being planned.

Who leaves the device leaves its full blocks here: at its end, for a later turn of the conversation, or when it yields,
to go on later. A full block never changes, so it is copied out once. Who starts finds what follows its device hits:

    known tokens     | on the device, shared | on the host: copied in | computed |
    step n           adopted                 taken, copied in           nothing: others go on beside the copies
    step n + 1                                                          as after any prefix hit

A block that has no key, for sharing is off or its tokens have no names, is known by its request and its place.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from headrace.core.step import DEVICE, HOST, Block, Copy
from headrace.core.types import BlockKey
from headrace.engine.progress import Progress


class Own(NamedTuple):
    """The name of a block that only its request may find."""

    arrival_number: int
    at: int  # in the block table


Name = BlockKey | Own
Rank = tuple[bool, int]  # (its request waits for it, priority): the lowest is given up first


class Runs:
    """The free blocks of a memory as runs of neighbours. A group gets the first run that holds it, or else the longest
    ones, at last single blocks; what comes back joins its neighbours."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.free = blocks
        self._starts = [0] if blocks else []  # of the runs, rising
        self._end = {0: blocks} if blocks else {}  # start -> end of each

    def take(self, count: int) -> list[Block]:
        """So many blocks, rising within each run; there must be as many."""
        assert count <= self.free, "no block is free"
        taken: list[Block] = []
        while len(taken) < count:
            taken += self._cut(count - len(taken))
        return taken

    def release(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            self._join(block)

    def check(self) -> None:
        assert self._starts == sorted(self._end), "a run is lost"
        edges = [edge for start in self._starts for edge in (start, self._end[start])]
        assert edges == sorted(set(edges)), "runs overlap, touch or are empty"
        assert self.free == sum(end - start for start, end in self._end.items())
        assert not edges or (edges[0] >= 0 and edges[-1] <= self.blocks)

    def _cut(self, count: int) -> range:
        start = next((one for one in self._starts if self._end[one] - one >= count), None)
        if start is None:
            start = max(self._starts, key=lambda one: self._end[one] - one)
        end = self._end.pop(start)
        cut = range(start, min(start + count, end))
        at = bisect_left(self._starts, start)
        if cut.stop < end:
            self._starts[at] = cut.stop
            self._end[cut.stop] = end
        else:
            del self._starts[at]
        self.free -= len(cut)
        return cut

    def _join(self, block: Block) -> None:
        at = bisect_left(self._starts, block)
        before = self._starts[at - 1] if at else None
        end = block + 1
        if at < len(self._starts) and self._starts[at] == end:
            end = self._end.pop(self._starts.pop(at))
        if before is not None and self._end[before] == block:
            self._end[before] = end
        else:
            insort(self._starts, block)
            self._end[block] = end
        self.free += 1


class HostTier:
    """The copies in host memory: name -> block. Given up first are those of the lowest rank, among them those used
    longest ago, and of one request the last blocks first, useless without those before."""

    def __init__(self, blocks: int) -> None:
        self.runs = Runs(blocks)
        self._block: dict[Name, Block] = {}
        self._rank: dict[Name, Rank] = {}
        self._by_rank: dict[Rank, OrderedDict[Name, None]] = {}
        self._busy: set[Name] = set()  # in a copy of the step being planned: must stay where they are

    def __len__(self) -> int:
        return len(self._block)

    def __contains__(self, name: Name) -> bool:
        return name in self._block

    def __getitem__(self, name: Name) -> Block:
        return self._block[name]

    def keep(self, names: Sequence[Name], rank: Rank) -> list[tuple[Name, Block]]:
        """Give these names, in the order of a block table, room and this rank. Returns those that were not here with
        the blocks they get, the first of them if there is no room for all without copies of a higher rank."""
        missing = [name for name in names if name not in self._block]
        room = self._make_room(len(missing), rank, set(names)) if missing else 0
        new = list(zip(missing[:room], self.runs.take(room), strict=True))
        self._block.update(new)
        self._busy.update(name for name, _ in new)
        self.touch(names, rank)
        return new

    def touch(self, names: Sequence[Name], rank: Rank) -> None:
        """They are used now, and worth this."""
        for name in reversed(names):
            if name in self._block:
                self._unrank(name)
                self._rank[name] = rank
                self._by_rank.setdefault(rank, OrderedDict())[name] = None

    def hold(self, names: Iterable[Name]) -> None:
        """They are read in the step being planned."""
        self._busy.update(names)

    def settle(self) -> None:
        """The step is planned."""
        self._busy.clear()

    def forget(self, name: Name) -> None:
        """A name that is not here is none of our business."""
        block = self._block.pop(name, None)
        if block is not None:
            self._unrank(name)
            del self._rank[name]
            self._busy.discard(name)
            self.runs.release((block,))

    def check(self) -> None:
        """Every block is free or holds one copy, and every copy has one rank."""
        self.runs.check()
        assert len(set(self._block.values())) == len(self._block) == self.runs.blocks - self.runs.free
        assert self._rank.keys() == self._block.keys() >= self._busy
        ranked = {name: rank for rank, names in self._by_rank.items() for name in names}
        assert ranked == self._rank, "a copy is ranked twice, or wrongly"
        assert all(self._by_rank.values()), "a rank nobody has"

    def _make_room(self, wanted: int, rank: Rank, keeping: Collection[Name]) -> int:
        names = (name for one in sorted(self._by_rank) if one <= rank for name in self._by_rank[one])
        idle = (name for name in names if name not in self._busy and name not in keeping)
        for name in list(islice(idle, max(0, wanted - self.runs.free))):
            self.forget(name)
        return min(wanted, self.runs.free)

    def _unrank(self, name: Name) -> None:
        rank = self._rank.get(name)
        if rank is not None:
            del self._by_rank[rank][name]
            if not self._by_rank[rank]:
                del self._by_rank[rank]


class Tiers:
    """The host tier of one replica, and the copies of the step that is being planned. `named` finds the device block
    of a key. Runs of fewer than `least` blocks are quicker to compute again."""

    def __init__(self, blocks: int, block_tokens: int, least: int, named: Callable[[BlockKey], Block | None]) -> None:
        self.host = HostTier(blocks)
        self._block_tokens = block_tokens
        self._least = least
        self._named = named
        self._out: dict[Name, tuple[Block, Block]] = {}  # (device block, host block)
        self._in: list[tuple[Block, Block]] = []  # (host block, device block)
        self._arriving: set[Name] = set()
        self._sealed: tuple[Name, ...] = ()  # what the step in flight copies out

    @property
    def busy(self) -> bool:
        """Whether the step being planned copies anything."""
        return bool(self._out or self._in)

    @property
    def fetching(self) -> bool:
        """Whether it copies for somebody who is to go on."""
        return bool(self._in)

    def found(self, progress: Progress, first: int) -> list[Name]:
        """The copies that hold the tokens from block `first` on. The last known token must be computed."""
        if progress.request.sampling.prompt_logprobs is not None:
            return []
        names: list[Name] = []
        for at in range(first, (progress.known_tokens - 1) // self._block_tokens):
            name = self._name(progress, at)
            if name not in self.host:
                break
            names.append(name)
        return names if len(names) >= self._least else []

    def arriving(self, names: Iterable[Name]) -> bool:
        """Whether somebody else is already copying some of these in: it can share them after the step."""
        return not self._arriving.isdisjoint(names)

    def fetch(self, progress: Progress, names: Sequence[Name], blocks: Sequence[Block]) -> None:
        """Copy these into `blocks` of the device. The copies stay: they need not be copied out again."""
        self.host.touch(names, _rank(progress, waits=False))
        self.host.hold(names)
        self._arriving.update(names)
        self._in += zip(map(self.host.__getitem__, names), blocks, strict=True)

    def leave(self, progress: Progress, full_blocks: int, waits: bool) -> None:
        """Who gives its blocks back leaves copies of the first `full_blocks`: all of them if it is to go on, those
        with keys, for others, if it has ended."""
        if waits and progress.request.sampling.prompt_logprobs is not None:
            return
        if waits:
            progress.swapped_blocks = max(progress.swapped_blocks, full_blocks)
        else:
            self._forget_own(progress)
        source: dict[Name, Block] = {}
        for at in range(full_blocks):
            name = self._name(progress, at)
            block = self._source(name, progress.blocks[at], waits)
            if block is None:
                break
            source[name] = block
        if len(source) >= self._least:
            for name, block in self.host.keep(tuple(source), _rank(progress, waits)):
                self._out[name] = (source[name], block)

    def seal(self) -> tuple[Copy, ...]:
        """The copies of the step that has been planned: out before in, neighbours in host memory next to each other."""
        if not self.busy:
            return ()
        out = sorted(self._out.values(), key=lambda pair: pair[1])
        copies = (Copy(DEVICE, HOST, tuple(out)), Copy(HOST, DEVICE, tuple(sorted(self._in))))
        self._sealed = tuple(self._out)
        self._out, self._in = {}, []
        self._arriving.clear()
        self.host.settle()
        return tuple(copy for copy in copies if copy.pairs)

    def forget(self, name: Name) -> None:
        """What this name promises is not so, or nobody needs it."""
        self._out.pop(name, None)
        self.host.forget(name)

    def fail(self) -> None:
        """Nobody knows what the step in flight copied."""
        for name in self._sealed:
            self.forget(name)
        self._sealed = ()

    def check(self, requests: Iterable[Progress]) -> None:
        """Every copy on its way has its block, and names of its own are those of requests that live."""
        self.host.check()
        assert all(self.host[name] == block for name, (_, block) in self._out.items()), "a copy goes nowhere"
        live = {progress.arrival_number: progress.swapped_blocks for progress in requests}
        own = [name for name in self.host._block if isinstance(name, Own)]
        assert all(name.at < live.get(name.arrival_number, 0) for name in own), "a copy that nobody can find"

    def _forget_own(self, progress: Progress) -> None:
        for at in range(progress.swapped_blocks):
            self.forget(Own(progress.arrival_number, at))
        progress.swapped_blocks = 0

    def _name(self, progress: Progress, at: int) -> Name:
        keyed = progress.writes_cache and at < len(progress.keys)
        return progress.keys[at] if keyed else Own(progress.arrival_number, at)

    def _source(self, name: Name, held: Block, waits: bool) -> Block | None:
        """The device block to copy from. Of a key that is the block it names, whatever the request holds: the content
        of that one is certain, or forgotten with its key."""
        if isinstance(name, Own):
            return held if waits else None
        return self._named(name)


def _rank(progress: Progress, waits: bool) -> Rank:
    return waits, progress.request.priority
