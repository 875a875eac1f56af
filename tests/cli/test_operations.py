"""What docs/operations.md and deploy/ tell people to write exists: flags, keys, commands, files, links, error codes."""

from __future__ import annotations

import argparse
import configparser
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from headrace.cli import parser
from headrace.core.config import DeviceSettings, EngineSettings, GatewaySettings, load
from headrace.gateway.edge import allowed_hosts

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
DEPLOY = ROOT / "deploy"
SOURCE = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src" / "headrace").rglob("*.py"))
TOML = tomllib.loads((DEPLOY / "headrace.toml").read_text(encoding="utf-8"))


def flags(of: argparse.ArgumentParser) -> Iterator[str]:
    """Of a command and all below it."""
    for action in of._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from flags(command)


def unit() -> dict[str, str]:
    read = configparser.ConfigParser(strict=False, interpolation=None)
    read.optionxform = str  # type: ignore[assignment,method-assign]
    read.read(DEPLOY / "headrace.service", encoding="utf-8")
    return dict(read["Service"])


def anchors(text: str) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_flag_exists() -> None:
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))
    named = {flag for code in inline for flag in re.findall(r"(?<!\S)--[a-z][a-z-]+", code)}
    for file in DEPLOY.iterdir():
        named |= set(re.findall(r"# .*?(--[a-z][a-z-]+)", file.read_text(encoding="utf-8")))
    assert len(named) > 25
    assert named <= set(flags(parser())), "flags that nobody knows"


def test_commands_of_a_service_parse() -> None:
    lines = re.findall(r"bin/headrace ((?:run|serve|pull|keys|top)\b[^#\n]*)", PAGE)
    lines.append(unit()["ExecStart"].split("/bin/headrace ")[1])
    assert len(lines) >= 3
    for line in lines:
        parser().parse_args(shlex.split(line))


def test_the_config_file_is_read_without_complaint() -> None:
    for settings in (EngineSettings, DeviceSettings, GatewaySettings):
        load(settings, None, TOML)
    assert TOML.keys() <= {"engine", "device", "gateway"}


def test_the_unit_lets_requests_finish() -> None:
    drain_s = load(GatewaySettings, None, TOML).drain_timeout_s
    assert float(unit()["TimeoutStopSec"]) > drain_s + 10
    assert unit()["KillMode"] == "mixed"  # only the server is told; what it started goes with it


def test_the_proxies_send_a_host_that_is_accepted() -> None:
    assert "localhost" in allowed_hosts(str(TOML["gateway"]["host"]))
    nginx, caddy = ((DEPLOY / name).read_text(encoding="utf-8") for name in ("nginx.conf", "Caddyfile"))
    assert "proxy_set_header Host localhost;" in nginx and "proxy_buffering off;" in nginx
    assert "header_up Host localhost" in caddy and "flush_interval -1" in caddy
    assert all(f"127.0.0.1:{TOML['gateway']['port']}" in text for text in (nginx, caddy))


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)]+)\)", PAGE))))
def test_links_lead_somewhere(target: str) -> None:
    name, _, anchor = unquote(target).partition("#")
    file = ROOT / "docs" / name if name else ROOT / "docs" / "operations.md"
    assert file.exists()
    if anchor:
        assert anchor in anchors(file.read_text(encoding="utf-8"))


def test_files_it_names_exist() -> None:
    for path in re.findall(r"`((?:deploy|dashboards)/[\w.-]+)`", PAGE):
        assert (ROOT / path).exists(), path


def test_words_of_errors_are_the_server_s() -> None:
    table = PAGE.split("## When something is wrong")[1]
    codes = set(re.findall(r"`([a-z]+_[a-z_]+|overloaded|unavailable)`", table)) - {"max_tokens"}
    assert len(codes) >= 5
    for code in codes - {"deadline_s"}:
        assert f'"{code}"' in SOURCE, code
    assert "another server uses the state directory" in SOURCE and "cannot listen on" in SOURCE
