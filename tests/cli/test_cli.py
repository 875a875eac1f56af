"""The command line: help that teaches, errors in one sentence, settings from flags, environment and file."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cli import main
from headrace.core import config
from headrace.core.config import BadSetting, Bytes, DeviceSettings, EngineSettings, GatewaySettings


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "headrace.cli", *words], capture_output=True, text=True, check=False)


def test_help_is_quick_and_names_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    for command in ("serve", "run", "bench", "pull", "models"):
        assert command in done.stdout
    loaded = "import sys; import headrace.cli as c; c.parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], check=False).returncode == 0, "help imports torch"


@pytest.mark.parametrize(
    "words,expected",
    [
        (["serve", "no/such/model.gguf"], "no/such/model.gguf"),
        (["serve", "--kv-memory", "lots"], "not a size"),
        (["serve", "--config", "missing.toml"], "missing.toml"),
        (["serve", "--host", "0.0.0.0"], "--insecure"),
        (["run", "smollm2", "hello", "--temperature", "-1"], "--temperature"),
        (["run", "smollm2", "hello", "--max-tokens", "0"], "--max-tokens"),
        (["pull", "../../etc/passwd"], "passwd"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(words)
    except SystemExit as error:  # argparse's own
        status = int(error.code or 0)
    printed = capsys.readouterr().err
    assert status == 2
    assert expected in printed
    assert "Traceback" not in printed


def test_flags_beat_environment_beats_file(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    config.add_flags(parser, EngineSettings)
    toml = {"engine": {"max_running": 1, "block_tokens": 2, "token_budget": 3}}
    monkeypatch.setenv("HEADRACE_MAX_RUNNING", "10")
    monkeypatch.setenv("HEADRACE_BLOCK_TOKENS", "20")
    settings = config.load(EngineSettings, parser.parse_args(["--max-running", "100"]), toml)
    assert (settings.max_running, settings.block_tokens, settings.token_budget) == (100, 20, 3)
    assert settings.ordering == EngineSettings().ordering


@pytest.mark.parametrize(
    "settings,toml,expected",
    [
        (EngineSettings, {"engine": {"max_runing": 1}}, "max_runing"),
        (EngineSettings, {"engine": {"max_running": "many"}}, r"\[engine\] max_running"),
        (DeviceSettings, {"device": {"dtype": "int3"}}, "auto, fp32, bf16"),
        (GatewaySettings, {"gateway": {"insecure": "perhaps"}}, "neither true nor false"),
    ],
)
def test_bad_files_name_the_key(settings: type, toml: dict[str, dict[str, object]], expected: str) -> None:
    with pytest.raises(BadSetting, match=expected):
        config.load(settings, None, toml)


@given(st.integers(0, 2**50))
def test_sizes_round_trip(count: int) -> None:
    assert config.parse_bytes(str(count)) == count
    assert config.parse_bytes(f"{count}B") == count


@pytest.mark.parametrize(
    "text,expected",
    [("2GiB", 2 << 30), ("512M", 512 * 10**6), ("1.5 KiB", 1536), ("7", 7), ("1Ti", 1 << 40), ("3gb", 3 * 10**9)],
)
def test_sizes(text: str, expected: int) -> None:
    assert config.parse_bytes(text) == Bytes(expected)


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "1 2", "1XB", "nan", "١"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        config.parse_bytes(text)


def test_a_config_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "headrace.toml"
    path.write_text('[device]\nkv_memory = "2GiB"\ndtype = "fp32"\n')
    settings = config.load(DeviceSettings, None, config.read_toml(path))
    assert (settings.kv_memory, settings.dtype) == (2 << 30, "fp32")
