"""Settings: flags, bounds, parsing, and the secret that is never saved."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest

from headrace.bench.settings import BenchSettings, Target, parse_extra, parse_range, parse_slo, parse_url
from headrace.core.config import BadSetting, add_flags, load


def from_flags(*flags: str) -> BenchSettings:
    parser = argparse.ArgumentParser()
    add_flags(parser, BenchSettings)
    return load(BenchSettings, parser.parse_args(flags))


def test_flags_reach_the_settings() -> None:
    settings = from_flags("--rate", "inf", "--no-ignore-eos", "--compare", "a.json", "b.json", "--input", "ln:9:1")
    assert settings.rate == math.inf
    assert not settings.ignore_eos
    assert settings.compare == (Path("a.json"), Path("b.json"))
    assert settings.input == "ln:9:1"


def test_the_key_comes_from_the_environment_and_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_API_KEY", "sk-secret")
    settings = from_flags("--save", "x.json", "--rate", "inf")
    assert settings.api_key == "sk-secret"
    saved = json.dumps(settings.public(), allow_nan=False)
    assert "sk-secret" not in saved
    assert json.loads(saved)["rate"] == "inf"


def test_a_toml_list_is_a_list_of_paths() -> None:
    settings = load(BenchSettings, None, {"bench": {"compare": ["a.json", "b.json"]}})
    assert settings.compare == (Path("a.json"), Path("b.json"))


@pytest.mark.parametrize(
    ("url", "target", "authority"),
    [
        ("http://localhost:8000/v1/", Target(False, "localhost", 8000, "/v1"), "localhost:8000"),
        ("https://api.example", Target(True, "api.example", 443, ""), "api.example"),
        ("http://[::1]:81/a/b", Target(False, "::1", 81, "/a/b"), "[::1]:81"),
    ],
)
def test_urls(url: str, target: Target, authority: str) -> None:
    assert parse_url(url) == target
    assert target.authority == authority


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://x", "http://", "http://u:p@h/v1", "http://h/v1?a=1", "http://h/a b", "http://h:99999/",
     "http://h/\r\nX: y", "http://[::1/v1", "http://h/v1#a"],
)  # fmt: skip
def test_bad_urls(url: str) -> None:
    with pytest.raises(BadSetting):
        BenchSettings(url=url)


def test_slo_is_in_seconds() -> None:
    assert parse_slo("ttft=1.0, tpot=0.05,itl=.2") == {"ttft": 1.0, "tpot": 0.05, "itl": 0.2}
    assert parse_slo(None) == {}


@pytest.mark.parametrize("slo", ["ttft", "ttft=", "ttft=0", "ttft=nan", "ttft=inf", "speed=1", "ttft=1ms"])
def test_bad_slo(slo: str) -> None:
    with pytest.raises(BadSetting, match="METRIC=SECONDS"):
        BenchSettings(slo=slo)


def test_ranges_and_extra() -> None:
    assert parse_range("5:7") == range(5, 8)
    assert parse_extra('{"top_p": 0.5}') == {"top_p": 0.5}
    for bad in ("7:5", "5", "-1:4", "a:b", "1:99999999999"):
        with pytest.raises(BadSetting):
            parse_range(bad)
    for bad in ("[]", "{", "[" * 100_000):
        with pytest.raises(BadSetting):
            parse_extra(bad)


@pytest.mark.parametrize(
    "wrong",
    [
        {"requests": 0}, {"rate": 0.0}, {"rate": math.nan}, {"rate": -1.0}, {"burstiness": 0.0}, {"concurrency": 0},
        {"timeout": math.nan}, {"trace_speed": 0.0}, {"groups": 0}, {"shared_prefix": -1}, {"temperature": math.nan},
        {"api_key": "a\r\nX: y"}, {"api_key": "ключ"},
    ],
)  # fmt: skip
def test_numbers_out_of_bounds(wrong: dict[str, float | str]) -> None:
    with pytest.raises(BadSetting, match="--"):
        BenchSettings(**wrong)  # type: ignore[arg-type]
