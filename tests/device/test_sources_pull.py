"""Pulling from a hub over real HTTP on loopback: what is fetched, resumed, verified, refused, and when it appears."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from fake_hub import Hub, serving
from test_gguf_checkpoint import build
from test_weights import folder, shard, tensors

from headrace.core.types import HeadraceError
from headrace.device import sources
from headrace.device.checkpoint import open_checkpoint
from headrace.device.hub import PullFailed
from headrace.device.modelfile import BadModelFile
from headrace.device.store import Record

EVIL = {"pytorch_model.bin": b"pickle", "modeling_evil.py": b"import os", "../escape.json": b"{}", "README.md": b"hi"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    files = contents(folder(tmp_path / "single")) | EVIL
    gguf = {"tiny-q8.gguf": build(tmp_path / "tiny.gguf").read_bytes(), "tiny-q4.gguf": b"GGUF", **EVIL}
    sharded = contents(shard(tmp_path / "sharded")) | EVIL
    with serving(Hub({"org/single": files, "org/sharded": sharded, "org/ggufs": gguf})) as hub:
        yield hub


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def pull(hub: Hub, name: str, home: Path) -> Path:
    return sources.pull(name, home, lambda _: None, hub.endpoint)


@pytest.mark.parametrize("name", ["org/single", "org/sharded"])
def test_a_repository_arrives_whole_and_nothing_else_does(name: str, hub: Hub, tmp_path: Path) -> None:
    path = pull(hub, name, tmp_path / "home")
    expected = {file for file in hub.repositories[name] if file not in EVIL}
    assert {file.name for file in path.iterdir()} == expected | {"headrace.json"}
    assert set(hub.fetched()) == expected
    record = Record.read(path)
    assert (record.source, record.revision, set(record.crc32)) == (name, hub.commit, expected)
    checkpoint = open_checkpoint(path)
    assert checkpoint.name == name and set(checkpoint.names()) == set(tensors())
    assert sources.resolve(name, tmp_path / "home") == path
    assert not list((tmp_path / "home" / "models" / ".partial").iterdir())


def test_one_gguf_file_of_many(hub: Hub, tmp_path: Path) -> None:
    path = pull(hub, "org/ggufs:tiny-q8.gguf", tmp_path)
    assert hub.fetched() == ["tiny-q8.gguf"]
    assert open_checkpoint(path).name == "org/ggufs:tiny-q8.gguf"
    row = next(row for row in sources.list_models(tmp_path) if row.source == "org/ggufs:tiny-q8.gguf")
    assert row.broken is None


def test_progress_is_told_file_by_file(hub: Hub, tmp_path: Path) -> None:
    told: list[str] = []
    sources.pull("org/single", tmp_path, told.append, hub.endpoint)
    assert told[0] == "ask the hub for org/single"
    assert told[1].startswith("1/3 config.json (") and told[-1].startswith("3/3 model.safetensors (")


def test_resolve_fetches_only_when_asked_to(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(HeadraceError, match="headrace pull org/single"):
        sources.resolve("org/single", tmp_path)
    assert hub.asked == []
    path = sources.resolve("org/single", tmp_path, lambda name: pull(hub, name, tmp_path))
    assert path == tmp_path / "models" / "org--single"


def test_a_second_pull_fetches_nothing_until_the_hub_changes(hub: Hub, tmp_path: Path) -> None:
    path = pull(hub, "org/single", tmp_path)
    before = len(hub.fetched())
    assert pull(hub, "org/single", tmp_path) == path
    assert len(hub.fetched()) == before
    hub.commit = "b" * 40
    hub.repositories["org/single"]["generation_config.json"] = b'{"eos_token_id": 5}'
    assert pull(hub, "org/single", tmp_path) == path
    assert Record.read(path).revision == "b" * 40
    assert 5 in open_checkpoint(path).eos_token_ids
    assert [entry.name for entry in (tmp_path / "models").iterdir() if entry.name != ".partial"] == ["org--single"]


def test_an_interrupted_pull_is_invisible_and_keeps_whole_files(hub: Hub, tmp_path: Path) -> None:
    """The hub is gone in the middle of the last shard; later only that shard is asked for.

    Inside one file, huggingface_hub continues within a pull and starts again in the next.
    """
    last = "model-00002-of-00002.safetensors"
    hub.dies_after = {last: 100}
    with pytest.raises(PullFailed):
        pull(hub, "org/sharded", tmp_path)
    row = sources.list_models(tmp_path)[-1]
    assert "continue it with: headrace pull org/sharded" in (row.broken or "")
    with pytest.raises(HeadraceError, match="headrace pull"):
        sources.resolve("org/sharded", tmp_path)

    hub.dies_after, hub.dead, hub.asked = {}, False, []
    assert set(open_checkpoint(pull(hub, "org/sharded", tmp_path)).names()) == set(tensors())
    assert hub.fetched() == [last]


def test_a_dropped_connection_is_continued_where_it_broke(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # what a drop can lose
    large = bytes(range(256)) * (1 << 14)  # 4 MiB
    hub.repositories["org/large"] = {"a.gguf": large}
    hub.cut_after = {"a.gguf": 3 << 20}
    assert (pull(hub, "org/large:a.gguf", tmp_path) / "a.gguf").read_bytes() == large
    ranges = [wanted for method, where, wanted in hub.asked if method == "GET" and "/resolve/" in where]
    assert ranges == [None, f"bytes={3 << 20}-"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_damaged_content_of_the_right_length_is_refused(name: str, hub: Hub, tmp_path: Path) -> None:
    content = hub.repositories["org/single"][name]
    hub.swapped = {name: content[:-1] + bytes([content[-1] ^ 1])}
    with pytest.raises(PullFailed, match=f"{name} of org/single arrived damaged"):
        pull(hub, "org/single", tmp_path)
    assert sources.list_models(tmp_path)[-1].broken
    hub.swapped = {}
    assert open_checkpoint(pull(hub, "org/single", tmp_path)).names()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("harm", ["bit", "cut", "gone"])
def test_what_a_disk_did_to_a_model_is_found_and_pulled_again(name: str, harm: str, hub: Hub, tmp_path: Path) -> None:
    path = pull(hub, "org/single", tmp_path)
    content = (path / name).read_bytes()
    at = len(content) // 3
    (path / name).unlink()
    if harm != "gone":
        damaged = content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :] if harm == "bit" else content[:at]
        (path / name).write_bytes(damaged)
    for model in ("org/single", "single"):
        with pytest.raises(BadModelFile, match=rf"{name} (is damaged|cannot be read).* headrace pull org/single"):
            sources.resolve(model, tmp_path)
    assert pull(hub, "org/single", tmp_path) == path == sources.resolve("single", tmp_path)
    assert (path / name).read_bytes() == content


@pytest.mark.parametrize("sums", [[], {"a/b": 1}, {"..": 1}, {"config.json": "1"}, {"": 1}, {"config.json": True}])
def test_a_record_names_only_files_of_its_folder(sums: object, hub: Hub, tmp_path: Path) -> None:
    path = pull(hub, "org/single", tmp_path)
    (path / "headrace.json").write_text(json.dumps({"source": "a", "revision": "b", "crc32": sums}))
    with pytest.raises(BadModelFile, match="pull it again"):
        sources.resolve("org/single", tmp_path)


def test_an_architecture_that_cannot_run_costs_no_weights(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/single"]["config.json"] = b'{"model_type": "mamba"}'
    with pytest.raises(BadModelFile, match=r"supported are .*llama"):
        pull(hub, "org/single", tmp_path)
    assert hub.fetched() == ["config.json"]


def test_a_full_disk_is_noticed_before_the_download(hub: Hub, tmp_path: Path) -> None:
    hub.claimed_bytes = {"model.safetensors": 1 << 60}
    with pytest.raises(PullFailed, match=r"needs .* and .* are free"):
        pull(hub, "org/single", tmp_path)
    assert hub.fetched() == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("org/none", "no model org/none"),
        ("org/gated", "accept its terms"),
        ("org/ggufs", "name one, as in org/ggufs:tiny-q4.gguf"),
        ("org/ggufs:other.gguf", "it has tiny-q4.gguf, tiny-q8.gguf"),
        ("org/pickled", "neither safetensors nor GGUF"),
        ("org/wordless", "no tokenizer.json"),
    ],
)
def test_refusals_say_what_to_do(name: str, reason: str, hub: Hub, tmp_path: Path) -> None:
    hub.gated = {"org/gated"}
    hub.repositories["org/pickled"] = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    hub.repositories["org/wordless"] = {"config.json": b"{}", "model.safetensors": b"x"}
    with pytest.raises(PullFailed, match=reason):
        pull(hub, name, tmp_path)
    assert hub.fetched() == []


def test_an_unreachable_hub_is_explained(tmp_path: Path) -> None:
    with serving(Hub()) as gone:
        endpoint = gone.endpoint
    with pytest.raises(PullFailed, match=r"could not be fetched .* check the network"):
        sources.pull("org/single", tmp_path, lambda _: None, endpoint)


def test_offline_mode_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PullFailed, match="HF_HUB_OFFLINE is set"):
        sources.pull("org/single", tmp_path, lambda _: None, "http://127.0.0.1:9")


def test_a_link_in_the_store_is_not_written_through(hub: Hub, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "org--single").symlink_to(outside)
    with pytest.raises(PullFailed, match="is a link"):
        pull(hub, "org/single", tmp_path)
    assert list(outside.iterdir()) == []
