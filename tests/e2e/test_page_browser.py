"""The built-in page in a real browser, headless: a chat with the real engine, and everything that may go wrong.

Chromium is found on the PATH and not fetched; without one these tests say that the page was not tested.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "gateway"))

from browsing import CHROMIUM, PATIENCE_MS, browsing
from gateway_rig import RoteService, byte_level_json, ids_of
from gateway_rig import running as rote
from tiny_chat import serving, write

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: the page is NOT TESTED")
EVIL = '<img src=x onerror="document.title=1"><script>document.title=2</script><b>bold</b>'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as browser:
        yield browser


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The real server with a tiny random model."""
    folder = write(tmp_path_factory.mktemp("tiny"), byte_level_json())
    with serving(folder, "--kv-memory", "8MiB", "--dtype", "fp32", "--embedding-model", "none") as base:
        yield base


@contextmanager
def opened(browser: Any, url: str, refused: int | None = None, route: Any = None) -> Iterator[Any]:
    """The page; afterwards: nothing complained (but of a status that a test provokes), and no other host was asked."""
    context = browser.new_context()
    context.set_default_timeout(PATIENCE_MS)
    tab = context.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    if route is not None:
        tab.route("**/v1/**", route)
    tab.goto(url)
    try:
        yield tab
    finally:
        context.close()
    expected = f"status of {refused}" if refused else "\0"
    assert [text for text in complaints if expected not in text] == []
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


def test_an_answer_is_explained_and_the_server_is_seen_working(browser: Any, url: str) -> None:
    with opened(browser, url) as tab:
        say(tab, "What is a headrace? " * 20, max_tokens="40", temperature="0")
        answered(tab)
        tab.click("article.assistant .link")
        tab.wait_for_selector("#why .words li")
        words, request_id = tab.locator("#why .words").inner_text(), tab.locator("#why .under").inner_text()
        assert "It drew 40 tokens" in words
        assert tab.locator("#why .timeline rect.prefill").count() >= 1
        assert tab.locator("#why .timeline rect.decode").count() == 1
        assert "writing" in tab.locator("#why .legend").inner_text()
        tab.keyboard.press("Escape")
        assert not tab.locator("#why").is_visible()

        tab.locator(f'#requests [data-request="{request_id}"]').press("Enter")
        tab.wait_for_selector("#why .words li")
        assert tab.locator("#why .words").inner_text() == words
        tab.keyboard.press("Escape")
        assert "cached" in tab.locator("#memory").inner_text()
        assert tab.locator("#running").inner_text() == tab.locator("#waiting").inner_text() == "0"
        tab.focus("#steps")
        tab.keyboard.press("ArrowLeft")
        assert "of answers" in tab.locator("#step").inner_text()


def test_a_phone_shows_one_view_at_a_time(browser: Any, url: str) -> None:
    with opened(browser, url) as tab:
        tab.set_viewport_size({"width": 360, "height": 700})
        assert tab.locator("#chat").is_visible() and not tab.locator("#live").is_visible()
        tab.click("[data-show=live]")
        assert tab.locator("#live").is_visible() and not tab.locator("#chat").is_visible()
        tab.locator("#requests tbody tr").first.wait_for()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        tab.click("[data-show=chat]")
        tab.click("#options > summary")
        wide = tab.evaluate("[...document.querySelectorAll('#system, #temperature')].map((box) => box.offsetWidth)")
        assert wide[0] > 300 > 200 > wide[1], "fields do not stand in their grid"


def test_a_server_that_asks_for_a_key_gets_one(browser: Any, url: str) -> None:
    def guarded(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer hr-right":
            route.continue_()
        else:
            refusal = {"error": {"message": "This server needs a key.", "type": "", "param": None, "code": None}}
            route.fulfill(status=401, json=refusal)

    with opened(browser, url, refused=401, route=guarded) as tab:
        tab.wait_for_selector("#door[open]")
        assert "This server needs a key." in tab.locator("#door").inner_text()
        tab.fill("#key", "hr-right")
        tab.press("#key", "Enter")
        say(tab, "hello", max_tokens="3")
        assert answered(tab)
        assert tab.evaluate("sessionStorage.getItem('headrace-key')") == "hr-right"
        assert tab.evaluate("localStorage.length") == 0


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
