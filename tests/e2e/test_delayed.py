"""Who delayed me: two tenants with keys at a server that is started as a user starts it, and a long prompt of one
before a short one of the other. What the other, and an admin, are told: by the API, on the page in a browser, and in
`headrace top` in a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "gateway"))

from browsing import CHROMIUM, PATIENCE_MS, browsing
from gateway_rig import byte_level_json
from tiny_chat import write

HEADRACE = (sys.executable, "-m", "headrace.cli")
PROMPT_TOKENS = 15_000  # read in so many steps that waiting for it is worth a word on a fast machine too
PATIENCE_S = 60.0
SAID = r"in the queue.*while a prompt of 15,\d\d\d tokens of another tenant was computed"


@dataclass(frozen=True, slots=True)
class Crowd:
    """A server, who has which key, and the ids of the long request and of the one that waited for it."""

    url: str
    keys: dict[str, str]
    long: str
    short: str

    def get(self, who: str, path: str) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.keys[who]}"}
        return httpx.get(self.url + path, headers=headers, timeout=PATIENCE_S, trust_env=False)

    def post(self, who: str, prompt: str, tokens: int) -> str:
        """Returns the id of a completion."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        headers = {"authorization": f"Bearer {self.keys[who]}"}
        answer = httpx.post(
            f"{self.url}/v1/completions", json=body, headers=headers, timeout=PATIENCE_S, trust_env=False
        )
        return str(answer.raise_for_status().json()["id"])


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crowd]:
    folder = tmp_path_factory.mktemp("crowd")
    model = write(folder / "tiny", byte_level_json(), context_tokens=16_384)
    file = ("--keys-file", str(folder / "keys.sqlite3"))
    keys = {who: new_key(who, *file, *(("--admin",) if who == "ops" else ())) for who in ("alice", "bob", "ops")}
    flags = ["--port", "0", "--state-dir", str(folder / "state"), "--embedding-model", "none", "--dtype", "fp32", *file]
    flags += ["--kv-memory", "64MiB", "--token-budget", "32"]
    process = subprocess.Popen(
        [*HEADRACE, "serve", str(model), *flags], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        yield delayed(Crowd(listening(process), keys, "", ""))
    finally:
        process.kill()
        process.communicate()


def new_key(name: str, *flags: str) -> str:
    made = subprocess.run([*HEADRACE, "keys", "add", name, *flags], capture_output=True, text=True, check=True)
    return made.stdout.strip()


def listening(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"Listening on (\S+)", line):
            return found[1]
    raise AssertionError("".join(lines))


def delayed(server: Crowd) -> Crowd:
    """Bob asks while alice's prompt is being read."""
    with ThreadPoolExecutor(1) as beside:
        asked = beside.submit(server.post, "alice", "a" * PROMPT_TOKENS, 4)
        until(lambda: states(server) == ["prefilling"], "alice's prompt to be read")
        short = server.post("bob", "What is a headrace?", 4)
        long = asked.result(PATIENCE_S)
    return Crowd(server.url, server.keys, long, short)


def states(server: Crowd) -> list[str]:
    return [row["state"] for row in server.get("ops", "/v1/requests?state=live").json()["data"]]


def until(true: Any, what: str) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end_s, f"waited in vain for {what}"


def test_the_api_says_so(crowd: Crowd) -> None:
    why = f"/v1/requests/{crowd.short}/explain"
    bobs, ops = crowd.get("bob", why).text, crowd.get("ops", why).text
    assert re.search(SAID, json.loads(bobs)["words"][0])
    assert "alice" not in bobs and crowd.long not in bobs
    assert f"of tenant alice ({crowd.long})" in json.loads(ops)["words"][0]
    (row,) = crowd.get("bob", "/v1/requests").json()["data"]
    assert (row["id"], row["waits_for"]) == (crowd.short, "prompts of other tenants")
    assert crowd.get("bob", f"/v1/requests/{crowd.long}/explain").status_code == 404
    assert crowd.get("bob", "/v1/steps").status_code == 403


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: the page is NOT TESTED")
def test_the_page_says_so(crowd: Crowd) -> None:
    with browsing() as browser:
        tab = browser.new_context().new_page()
        tab.set_default_timeout(PATIENCE_MS)
        tab.goto(crowd.url)
        tab.fill("#key", crowd.keys["bob"])
        tab.press("#key", "Enter")
        tab.locator("#requests tbody tr").first.wait_for()
        assert tab.locator("#requests tr.reason").inner_text() == "waited for prompts of other tenants"
        assert not tab.locator("#memory").is_visible() and not tab.locator("#steps").is_visible()
        assert "your tenant’s" in tab.locator("#requests-note").inner_text()
        tab.locator("#requests tbody button").click()  # there is but one
        tab.wait_for_selector("#why .words li")
        assert re.search(SAID, tab.locator("#why .words").inner_text())
        assert tab.locator("#why .timeline rect.queue").count() == 1
        assert "alice" not in tab.content() and crowd.long not in tab.content()


def test_an_admins_page_names_them(crowd: Crowd) -> None:
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH: the page is NOT TESTED")
    with browsing() as browser:
        tab = browser.new_context().new_page()
        tab.set_default_timeout(PATIENCE_MS)
        tab.goto(crowd.url)
        tab.fill("#key", crowd.keys["ops"])
        tab.press("#key", "Enter")
        tab.click(f'#requests [data-request="{crowd.short}"]')
        tab.wait_for_selector("#why .words li")
        assert f"of tenant alice ({crowd.long})" in tab.locator("#why .words").inner_text()
        assert tab.locator("#memory").is_visible() and tab.locator("#steps").is_visible()


def test_top_says_so(crowd: Crowd) -> None:
    with_bobs_key = terminal(crowd, "bob", ("j", "\r"), r"waited .* in the queue")
    told = " ".join(with_bobs_key.split())
    assert "prompts of other tenants" in told and re.search(SAID, told)
    assert "alice" not in told and crowd.long not in told
    assert f"of tenant alice ({crowd.long})" in " ".join(terminal(crowd, "ops", ("j", "\r"), "tenant alice").split())


def terminal(crowd: Crowd, who: str, keys: tuple[str, ...], last: str) -> str:
    """What a terminal of 200 by 40 has shown of `headrace top` once it showed `last`, after each key a frame later."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    size = {"COLUMNS": "200", "LINES": "40"}  # whoever runs the tests may have said something else
    environment = os.environ | size | {"HEADRACE_API_KEY": crowd.keys[who], "TERM": "xterm"}
    top = subprocess.Popen([*HEADRACE, "top", "--url", crowd.url], stdin=its, stdout=its, stderr=its, env=environment)
    os.close(its)
    shown = ""
    try:
        shown += read_until(ours, "q quit")
        for key in keys:
            os.write(ours, key.encode())
            shown += read_until(ours, "q quit")
        shown += read_until(ours, last) if not re.search(last, shown) else ""
        os.write(ours, b"q")
        assert top.wait(PATIENCE_S) == 0
    finally:
        top.kill()
        top.wait()
        os.close(ours)
    return shown


def read_until(descriptor: int, what: str) -> str:
    shown, end_s = "", time.monotonic() + PATIENCE_S
    while not re.search(what, shown):
        ready, _, _ = select.select([descriptor], [], [], max(0.0, end_s - time.monotonic()))
        assert ready, f"waited in vain for {what!r}; there was: {shown[-2000:]}"
        shown += re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", os.read(descriptor, 65536).decode(errors="replace"))
    return shown
