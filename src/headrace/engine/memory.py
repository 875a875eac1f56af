"""Which KV blocks each request holds: takes them as tokens are planned, adopts those that already hold the same
content, names full ones so that others can find them, and gives them back. Owns the pool and the prefix index.

Prompt blocks are named when their tokens are planned, not when they are computed: within a step all KV writes of a
layer come before its attention, so two requests of one step may share. If that step fails, the new names are dropped.
Generated blocks are named when the request leaves, and those of pending tokens, which have blocks but did not go
through all layers, when they go through the last. Blocks of drafts are taken before their step and never named.

    table of one request      | named, maybe shared | named, own | being filled |   pending   |
    tokens            0       computed by others        computed_tokens ^             ^ + pending_tokens
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from headrace.core.keys import first_key, next_key
from headrace.core.step import Block, Copy
from headrace.core.types import BlockKey
from headrace.engine.pool import Pool
from headrace.engine.prefix import PrefixIndex
from headrace.engine.progress import Progress
from headrace.engine.tiers import Name, Tiers


class Memory:
    """The block tables of one replica's requests."""

    def __init__(
        self, blocks: int, block_tokens: int, prefix_cache: bool, host_blocks: int = 0, least_copied_blocks: int = 1
    ) -> None:
        self.block_tokens = block_tokens
        self._prefix_cache = prefix_cache
        self._host = host_blocks, least_copied_blocks
        self._clear(blocks)

    def _clear(self, blocks: int) -> None:
        host_blocks, least = self._host
        self.index = PrefixIndex()
        self.pool = Pool(blocks, self.index)
        self.tiers = Tiers(host_blocks, self.block_tokens, least, self.index.find) if host_blocks else None

    def enrol(self, progress: Progress) -> None:
        """Decide whether a new request may find blocks of others and be found itself, and how many it may need."""
        request = progress.request
        named = len(request.block_keys) == progress.prompt_tokens // self.block_tokens
        progress.writes_cache = self._prefix_cache and (named or bool(request.block_keys))
        progress.longest_blocks = self.blocks_for(progress.last_tokens)
        progress.reads_cache = self._prefix_cache and request.sampling.prompt_logprobs is None

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def match(self, progress: Progress) -> list[Block]:
        """Blocks that hold the tokens from the block of `computed_tokens` on. The last known token is never among
        them: it must be computed to have logits."""
        if not progress.reads_cache:
            return []
        last = (progress.known_tokens - 1) // self.block_tokens
        return self.index.match(progress.keys, progress.computed_tokens // self.block_tokens, last)

    def missed(self, progress: Progress) -> BlockKey | None:
        """The name of the first block that a request, admitted just now, could have shared and did not find."""
        at, last = len(progress.blocks), (progress.known_tokens - 1) // self.block_tokens
        return progress.keys[at] if progress.reads_cache and at < min(last, len(progress.keys)) else None

    def shares(self, progress: Progress, start: int, other: Progress) -> bool:
        """Whether the block at `start` is one that another request fills with its pending tokens, to name it then."""
        at = start // self.block_tokens
        full = min((other.computed_tokens + other.pending_tokens) // self.block_tokens, len(other.keys))
        wanted = progress.reads_cache and at < min(len(progress.keys), (progress.known_tokens - 1) // self.block_tokens)
        return wanted and other.writes_cache and at < full and progress.keys[at] == other.keys[at]

    def on_host(self, progress: Progress, start: int) -> Sequence[Name]:
        """Copies of the blocks from the token `start` on, for a request that waits."""
        return self.tiers.found(progress, start // self.block_tokens) if self.tiers else ()

    def fetch(self, progress: Progress, names: Sequence[Name]) -> None:
        """Take a block for each of these copies, and copy them in. They get their names on the device with the next
        work, when they are there."""
        assert self.tiers is not None, "what is on the host came from somewhere"
        blocks = self.pool.take(len(names))
        self.tiers.fetch(progress, names, blocks)
        progress.blocks += blocks
        progress.computed_tokens += len(names) * self.block_tokens

    def arriving(self, names: Sequence[Name]) -> bool:
        """Whether some of these are being copied in for somebody else, and can be shared after this step."""
        return bool(names) and self.tiers is not None and self.tiers.arriving(names)

    @property
    def fetching(self) -> bool:
        """Whether the step being planned copies blocks in."""
        return self.tiers is not None and self.tiers.fetching

    @property
    def copying(self) -> bool:
        """Whether it copies any, in or out."""
        return self.tiers is not None and self.tiers.busy

    def copies(self) -> tuple[Copy, ...]:
        """Those of the step that has been planned."""
        return self.tiers.seal() if self.tiers else ()

    def cost(self, hits: Sequence[Block]) -> int:
        """Free blocks that adopting `hits` would use up: those nobody holds."""
        return len(hits) - sum(map(self.pool.held, hits))

    def adopt(self, progress: Progress, hits: Sequence[Block]) -> tuple[tuple[int, Block], ...]:
        """Put `hits` at the end of the table, the first one in place of a partly filled block if there is one.
        Returns what was replaced, as `Work.replaced_blocks` wants it."""
        if not hits:
            return ()
        first = progress.computed_tokens // self.block_tokens
        for block in hits:
            self.pool.share(block)
        dropped = progress.blocks[first:]
        progress.blocks[first:] = hits
        self.pool.release(reversed(dropped), progress.request.tenant)
        progress.computed_tokens = (first + len(hits)) * self.block_tokens
        progress.named_blocks = first + len(hits)
        return tuple((first + at, hits[at]) for at in range(len(dropped)))

    def reachable_tokens(self, progress: Progress) -> int:
        """Tokens the request could have if it took every free block."""
        return (len(progress.blocks) + self.pool.free) * self.block_tokens

    def grow(self, progress: Progress, tokens: int) -> tuple[Block, ...]:
        """Take blocks until the table holds `tokens`; the caller has made sure that they are there."""
        missing = self.blocks_for(tokens) - len(progress.blocks)
        if missing <= 0:
            return ()
        taken = self.pool.take(missing)
        progress.blocks += taken
        return tuple(taken)

    def trim(self, progress: Progress) -> None:
        """Its drafts are over: give back the blocks that hold nothing else. They have no name and no other holder."""
        progress.drafted_tokens = 0
        held = self.blocks_for(progress.computed_tokens + progress.pending_tokens)
        if len(progress.blocks) > held:
            self.pool.release_own(progress.blocks[: held - 1 : -1])
            del progress.blocks[held:]

    def begin(self, some: Sequence[Progress]) -> list[Block]:
        """Take one more block for each; the caller has made sure that they are there."""
        taken = self.pool.take(len(some))
        for progress, block in zip(some, taken, strict=True):
            progress.blocks.append(block)
        return taken

    def name(self, progress: Progress, fresh: list[BlockKey]) -> None:
        """Enter the full blocks whose keys are known into the index; append the keys that are new there to `fresh`."""
        if not progress.writes_cache:
            return
        at, keys, insert = progress.named_blocks, progress.keys, self.index.insert
        full = min(progress.computed_tokens // self.block_tokens, len(keys))
        while at < full:
            if insert(keys[at], progress.blocks[at]):
                fresh.append(keys[at])
            at += 1
        progress.named_blocks = at

    def release(self, progress: Progress, fresh: list[BlockKey], waits: bool = False) -> None:
        """Give all blocks back, last first. Those with a name stay findable until they are needed, so what was
        generated gets its names now: nobody can ask for it sooner than in a next turn. With a host tier it leaves
        copies there; if it `waits`, to go on with."""
        full = progress.computed_tokens // self.block_tokens
        if progress.writes_cache:
            while len(progress.keys) < full and self._next_key(progress):
                pass
            self.name(progress, fresh)
        if self.tiers:
            self.tiers.leave(progress, full, waits)
        if progress.named_blocks:
            self.pool.release(reversed(progress.blocks), progress.request.tenant)
        else:  # nobody else can have found one
            self.pool.release_own(progress.blocks[::-1])
        progress.blocks = []
        progress.computed_tokens = progress.named_blocks = 0
        progress.pending_tokens = progress.passed_layers = progress.drafted_tokens = 0

    def fail(self, keys: Iterable[BlockKey]) -> None:
        """What these keys promise was never computed, and what was to be copied was maybe not."""
        for key in keys:
            block = self.index.find(key)
            if block is not None:
                self.pool.forget(block)
            if self.tiers:
                self.tiers.forget(key)
        if self.tiers:
            self.tiers.fail()

    def lose(self, requests: Iterable[Progress]) -> None:
        """All content is gone, on the device and on the host. Nobody holds anything; those who wait may have left
        copies."""
        self._clear(self.pool.blocks)
        for progress in requests:
            progress.blocks = []
            progress.computed_tokens = progress.named_blocks = progress.cached_blocks = progress.swapped_blocks = 0
            progress.pending_tokens = progress.passed_layers = progress.drafted_tokens = 0

    def check(self, requests: Iterable[Progress]) -> None:
        """Everything held is held by one of `requests`, and every table is just long enough."""
        self.pool.check()
        self.index.check()
        requests = list(requests)
        if self.tiers:
            self.tiers.check(requests)
        self.pool.check_held(progress.blocks for progress in requests)
        for progress in requests:
            held = self.blocks_for(progress.computed_tokens + progress.pending_tokens + progress.drafted_tokens)
            assert len(progress.blocks) == held, "a table is too long or too short"

    def _next_key(self, progress: Progress) -> bool:
        """Continue the chain of keys by one generated block, if its prompt part was named and its tokens are known."""
        keys, size = progress.keys, self.block_tokens
        start = len(keys) * size
        if start + size <= progress.prompt_tokens:
            return False
        ids = progress.token_ids(start, start + size)
        if ids is None:
            return False
        keys.append(next_key(keys[-1] if keys else first_key(progress.request.salt), ids))
        return True
