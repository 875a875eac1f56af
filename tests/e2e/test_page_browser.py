"""The built-in page in a real browser, headless: a chat with the real engine, and everything that may go wrong.

Chromium is found on the PATH and not fetched; without one these tests say that the page was not tested.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent / "gateway"))

from gateway_rig import RoteService, byte_level_json, ids_of
from gateway_rig import running as rote
from tiny_chat import serving, write

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: the page is NOT TESTED")
EVIL = '<img src=x onerror="document.title=1"><script>document.title=2</script><b>bold</b>'
PATIENCE_MS = 60_000  # a machine that is busy with other tests


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The real server with a tiny random model."""
    folder = write(tmp_path_factory.mktemp("tiny"), byte_level_json())
    with serving(folder, "--kv-memory", "8MiB", "--dtype", "fp32", "--embedding-model", "none") as base:
        yield base


@contextmanager
def opened(browser: Any, url: str, refused: int | None = None) -> Iterator[Any]:
    """The page; afterwards: nothing complained (but of a status that a test provokes), and no other host was asked."""
    context = browser.new_context()
    context.set_default_timeout(PATIENCE_MS)
    tab = context.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(url)
    try:
        yield tab
    finally:
        context.close()
    expected = f"status of {refused}" if refused else "\0"
    assert [text for text in complaints if expected not in text and "status of 404" not in text] == []
    assert asked and all(one.startswith((f"{url}/", "data:")) for one in asked)


def say(tab: Any, text: str, **options: str) -> None:
    tab.wait_for_selector("#model option", state="attached")
    if options:
        tab.locator("#options > summary").click()
        for name, value in options.items():
            tab.fill(f"#{name.replace('_', '-')}", value)
    tab.fill("#prompt", text)
    tab.press("#prompt", "Enter")


def answered(tab: Any) -> str:
    """The last answer, once it is complete."""
    tab.wait_for_selector("#send", state="visible")
    return str(tab.locator("article.assistant > .text").last.inner_text())


def test_a_conversation_streams_and_is_remembered(browser: Any, url: str) -> None:
    with opened(browser, url) as tab:
        say(tab, "What is a headrace?", max_tokens="12", temperature="0", system="You are a mill.")
        first = answered(tab)
        assert first
        assert "12 tokens" in tab.locator("article.assistant footer").inner_text()
        say(tab, "And a tailrace?")
        assert answered(tab)
        assert tab.locator("article").count() == 4
        tab.reload()
        assert tab.locator("article.assistant > .text").first.inner_text() == first
        assert tab.input_value("#system") == "You are a mill."
        tab.click("#fresh")
        assert tab.locator("article").count() == 0
        assert tab.locator("#welcome").is_visible()


def test_stop_ends_the_request(browser: Any) -> None:
    service = RoteService(pace_s=0.01)
    with rote(service) as server, opened(browser, server.url) as tab:
        say(tab, "Go on for ever", max_tokens="4000")
        tab.locator("article.assistant > .text", has_text="feeds the wheel").wait_for()
        tab.click("#stop")
        assert answered(tab).startswith("The headrace feeds the wheel")
        assert "stopped" in tab.locator("article.assistant footer").inner_text()
        for _ in range(200):
            if not service.open:
                break
            tab.wait_for_timeout(20)
        assert not service.open and service.aborted


def test_what_a_model_writes_stays_text(browser: Any) -> None:
    with rote(RoteService(answer=ids_of(EVIL))) as server, opened(browser, server.url) as tab:
        say(tab, EVIL, max_tokens=str(len(ids_of(EVIL))))
        assert answered(tab) == EVIL
        assert tab.locator("article.user > .text").inner_text() == EVIL
        assert tab.locator("#log img, #log script, #log b").count() == 0
        assert tab.title() == "Headrace"


def test_refusals_are_shown_as_the_server_words_them(browser: Any, url: str) -> None:
    with opened(browser, url, refused=400) as tab:
        say(tab, "hello", temperature="-1")
        tab.wait_for_selector("article .refused")
        assert "temperature" in tab.locator("article .refused").inner_text()
        assert tab.input_value("#prompt") == "hello"  # to be sent again
        tab.fill("#temperature", "0")
        tab.fill("#max-tokens", "3")
        say(tab, "hello")
        assert answered(tab)
        assert tab.locator("article.user").count() == 1
