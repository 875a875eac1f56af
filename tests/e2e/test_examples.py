"""The examples of the documents, against a server: every curl is run by a shell, every Python program by Python."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_chat

sys.path.insert(0, str(Path(__file__).parent.parent / "gateway"))
from gateway_rig import BYTE_LEVEL

from headrace.device.sources import EMBEDDING_DEFAULT, NoSuchModel, resolve

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/endpoints.md", "docs/api.head.md")
HERE = re.compile(r"(?:localhost|127\.0\.0\.1):8000")


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """(language, content) of the fenced blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    yield from re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def examples() -> Iterator[tuple[str, str, str]]:
    """(page, kind, program) of everything that talks to a server, or is a body of chat completions."""
    for page in PAGES:
        for language, content in blocks(page):
            if language == "json":
                yield page, "body", content
            elif language == "python" and "openai" in content:
                yield page, "python", content
            elif HERE.search(content) and re.search(r"^(?:curl|python)\b", content, re.MULTILINE):
                yield page, "shell", content


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("examples")
    model = tiny_chat.write(folder / "tiny", BYTE_LEVEL)
    flags = ("--kv-memory", "64MiB", "--state-dir", str(folder / "state"), "--served-name", "smollm2")
    with tiny_chat.serving(model, *flags) as found:
        yield found


EXAMPLES = list(examples())


def test_there_are_examples() -> None:
    kinds = [kind for _, kind, _ in EXAMPLES]
    assert kinds.count("shell") >= 5 and kinds.count("python") >= 1 and kinds.count("body") >= 1


@pytest.mark.parametrize(
    ("page", "kind", "program"), EXAMPLES, ids=[f"{page} {at}" for at, (page, _, _) in enumerate(EXAMPLES)]
)
def test_an_example_does_what_it_says(page: str, kind: str, program: str, url: str, tmp_path: Path) -> None:
    if EMBEDDING_DEFAULT in program and not _is_installed(EMBEDDING_DEFAULT, tmp_path):
        pytest.skip("the embedding model is not installed")
    if "curl" in program and shutil.which("curl") is None:
        pytest.skip("there is no curl")
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    (tmp_path / "requests.jsonl").write_text(json.dumps(line | {"body": body}))
    program = HERE.sub(url.removeprefix("http://"), program)
    if kind == "body":
        program = f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{program}'"
    if kind == "python":
        command = [sys.executable, "-c", program]
    else:
        program = re.sub(r"^curl\b", "curl -sS --fail-with-body", program, flags=re.MULTILINE)
        command = ["bash", "-euc", f'python() {{ "{sys.executable}" "$@"; }}\n{program}']
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, f"{page}:\n{program}\n{done.stdout}\n{done.stderr}"


def _is_installed(model: str, home: Path) -> bool:
    try:
        return resolve(model, home).exists()
    except NoSuchModel:
        return False
