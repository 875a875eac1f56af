"""Whether a grammar can be used: compiled off the event loop, within a time, before anybody waits for its answer.

Owns one thread; a grammar that takes too long keeps it busy until its fuel is spent, and delays nobody but other
grammars. What compiles is somebody else's, given as a function.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from headrace.core.types import Grammar, InvalidRequest
from headrace.gateway.errors import bad

Compile = Callable[[Grammar], None]  # raises InvalidRequest


class Checks:
    def __init__(self, compile_one: Compile, timeout_s: float) -> None:
        self._compile = compile_one
        self._timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(2, "headrace-grammar")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def __call__(self, grammar: Grammar, param: str) -> None:
        """Raises Refused."""
        compiling = asyncio.get_running_loop().run_in_executor(self._pool, self._compile, grammar)
        try:
            async with asyncio.timeout(self._timeout_s):
                await compiling
        except TimeoutError:
            message = f"{param}: compiling it takes longer than {self._timeout_s:g} s; use a simpler one."
            raise bad(message, param, "invalid_grammar") from None
        except InvalidRequest as error:
            sentence = str(error)
            raise bad(f"{param}: {sentence}.", param, "invalid_grammar") from error
