"""The reliability table in short: every check against a server that is started as a user starts it, with a tiny model.
What is wrong is wrong here as well; what is slow is so only if it is far slower than promised, for others may use this
machine. The table itself is `make reliability`."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from reliability.check import Check, Setting
from reliability.control_plane import answers
from reliability.drain import drained
from reliability.gaps import unbroken
from reliability.running import Answer, Server, ask, client, serving, status_of, tiny_model
from reliability.startup import starts
from reliability.worker import hung, killed

SLACK = 10.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(killed, id="R2-killed"),
        pytest.param(hung, id="R4-hung"),
        pytest.param(drained, id="R5-drained"),
        pytest.param(unbroken, id="R11-unbroken"),
        pytest.param(answers, id="R12-pages"),
        pytest.param(starts, id="R18-starts"),
    ],
)
def test_it_stays_up(check: Check, tiny: Path, tmp_path: Path) -> None:
    found = asyncio.run(check(Setting(True, str(tiny), tmp_path, slack=SLACK)))
    assert found.held, found.ours


@pytest.mark.slow
def test_a_model_whose_files_are_gone_is_served_until_it_has_to_be_loaded_again(tiny: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "soon-gone"))

    async def main() -> tuple[Answer, Answer, dict[str, str]]:
        async with serving(str(model), tmp_path) as server, client() as http:
            shutil.rmtree(model)
            before = await ask(http, server.url, "river", 8)
            server.worker.send_signal(signal.SIGKILL)
            await failed(server)
            told = (await http.get(f"{server.url}/health/live")).json()
            return before, await ask(http, server.url, "river", 8), told

    before, after, told = asyncio.run(main())
    assert before.complete
    assert (after.status, told["status"]) == (503, "failed")
    assert "SIGKILL" in told["error"] and "soon-gone" in told["error"], "what happened, and what is missing"


async def failed(server: Server) -> None:
    """Until it says that it cannot go on."""
    async with client() as http, asyncio.timeout(200):
        while await status_of(http, server.url, "/health/live") == 200:
            await asyncio.sleep(0.05)
