"""The built-in page without a browser: who gets it, under which policy, and that it needs nothing but this server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gateway_rig import RoteService, ask, make_text

from headrace.core import clock
from headrace.core.config import GatewaySettings
from headrace.core.metrics import Metrics
from headrace.gateway import page
from headrace.gateway.app import build

APP = build(RoteService(), make_text(), GatewaySettings(), Metrics())
FOLDER = Path(page.__file__).parent
FILES = sorted(path for path in FOLDER.iterdir() if path.suffix in (".html", ".css", ".js", ".svg"))
BROWSER = "text/html,application/xhtml+xml,*/*;q=0.8"


def get(path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    return clock.run(ask(APP, path, method="GET", headers={k.replace("_", "-"): v for k, v in headers.items()}))


@pytest.mark.parametrize("accept", ["*/*", "application/json", ""])
def test_programs_get_the_index(accept: str) -> None:
    status, headers, body = get("/", accept=accept)
    assert (status, headers["content-type"], headers["vary"]) == (200, "application/json", "accept")
    assert b'"/v1/chat/completions"' in body


def test_browsers_get_the_page() -> None:
    status, headers, body = get("/", accept=BROWSER)
    assert (status, headers["content-type"], headers["vary"]) == (200, "text/html; charset=utf-8", "accept")
    assert body == (FOLDER / "index.html").read_bytes()


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_every_part_comes_under_the_policy_and_is_not_sent_twice(file: Path) -> None:
    path = f"/page/{file.name}"
    status, headers, body = get(path)
    assert (status, body) == (200, file.read_bytes())
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert headers["x-content-type-options"] == "nosniff"
    again = get(path, if_none_match=headers["etag"])
    assert (again[0], again[2]) == (304, b"")
    assert get(path, if_none_match='"old"')[0] == 200


@pytest.mark.parametrize("name", ["__init__.py", "nothing.js", "..%2fapp.py", ".."])
def test_nothing_else_of_the_folder_is_served(name: str) -> None:
    assert get(f"/page/{name}")[0] == 404


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_no_part_needs_another_host_or_makes_markup_of_text(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    hosts = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[\w/.-]*", text)) - {"http://www.w3.org/2000/svg"}
    assert not hosts
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text)
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=\"", text)


def test_what_the_page_names_is_there() -> None:
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    named = set(re.findall(r'(?:href|src)="page/([\w.-]+)"', html))
    for file in FILES:
        named |= set(re.findall(r'from "\./([\w.-]+)"', file.read_text(encoding="utf-8")))
    assert named == {file.name for file in FILES} - {"index.html"}


def test_every_element_that_a_script_asks_for_is_on_the_page() -> None:
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    asked = {name for file in FILES for name in re.findall(r'byId\("([\w-]+)"\)', file.read_text(encoding="utf-8"))}
    assert asked and asked <= set(re.findall(r'\bid="([\w-]+)"', html))


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in FILES) < 48_000
