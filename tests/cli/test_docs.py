"""The generated pages of docs/ are current, and what the documents tell a reader to do exists."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from headrace.cli import parser
from headrace.engine.progress import LEGAL

ROOT = Path(__file__).parent.parent.parent
spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
assert spec is not None and spec.loader is not None
make_docs = importlib.util.module_from_spec(spec)
sys.modules["make_docs"] = make_docs
spec.loader.exec_module(make_docs)

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", make_docs.PAGES)
def test_generated_pages_are_current(name: str) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == make_docs.PAGES[name](), "run `make docs`"


def commands(document: Path) -> list[str]:
    """Lines of the fenced blocks that call headrace."""
    blocks = re.findall(r"```[a-z]*\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    joined = [re.sub(r"\\\n\s*", " ", block) for block in blocks]
    lines = [line.split("#")[0].strip() for block in joined for line in block.splitlines()]
    return [line for line in lines if re.match(r"(headrace|\.venv/bin/headrace) [a-z]", line)]


def test_the_table_of_states_is_the_code_s() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("## The life of a request")[1]
    rows = re.findall(r"^\| (\w+) \| [^|]+ \| ([\w, ]*)\|$", text.split("##")[0], re.MULTILINE)
    documented = {state: {name for name in re.split(r"[, ]+", targets) if name} for state, targets in rows}
    documented.pop("state", None)
    assert documented == {state.value: {target.value for target in targets} for state, targets in LEGAL.items()}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_the_documents_parse(document: Path) -> None:
    import shlex

    for line in commands(document):
        words = shlex.split(line)
        words = words[1 : words.index("&")] if "&" in words else words[1:]
        parser().parse_args(words)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_targets_in_the_documents_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^|&& )make ([a-z-]+)", text, re.MULTILINE):
        assert f"\n{target}:" in makefile, f"{document.name} tells of `make {target}`"
    for path in re.findall(r"`((?:benchmarks|docs|scripts|tests)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).exists(), f"{document.name} names {path}"
