"""What let strangers into other servers' machines, tried on ours: code instead of data, files and networks that were
never meant, listeners nobody knew of, readers that never read. The anchors are published advisories of other projects.

What needs keys (routes without one, timing, tenants in the cache) is tested with the keys.
"""

from __future__ import annotations

import ast
import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

import httpx
import psutil
import pytest
import safetensors.torch
import tiny_chat
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "gateway"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from gateway_rig import BYTE_LEVEL, LEAK, RoteService, Running, ask, chat, http_bytes, make_text, read_response, running
from server import serving

from headrace.core.config import GatewaySettings
from headrace.core.metrics import Metrics
from headrace.device import sources
from headrace.device.checkpoint import open_checkpoint
from headrace.device.modelfile import BadModelFile
from headrace.device.store import BadName, HubId
from headrace.gateway.app import build
from headrace.gateway.endpoints import Extras
from headrace.gateway.state.database import Database

SOURCE = Path(__file__).parents[2] / "src" / "headrace"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat.write(tmp_path_factory.mktemp("host") / "tiny", BYTE_LEVEL)


# -- 1, 8: code instead of data ----------------------------------------------------------------------------------------

UNPACK = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "transformers"}  # bytes or names into code
CALLS = {"eval", "exec", "torch.load", "yaml.load", "np.load", "numpy.load", "importlib.import_module"}
METHODS = {"recv_pyobj", "send_pyobj", "exec_module", "from_pretrained"}


def test_nothing_in_the_sources_turns_bytes_into_objects() -> None:
    """ShadowMQ (CVE-2024-50050, CVE-2025-30165, CVE-2026-26220): `recv_pyobj` on a socket, copied between projects."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not UNPACK & {alias.name.split(".")[0] for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert str(node.module).split(".")[0] not in UNPACK, path
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in CALLS and called.split(".")[-1] not in METHODS, f"{path}:{node.lineno}"
                assert "trust_remote_code" not in {word.arg for word in node.keywords}, f"{path}:{node.lineno}"


def canary(path: Path) -> bytes:
    """A pickle, protocol 0, that runs `touch` on a path when it is loaded."""
    return f"cposix\nsystem\n(S'touch {path}'\ntR.".encode()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth", "weights.pkl", "a.ckpt"])
def test_a_pickle_instead_of_weights_is_refused_and_not_loaded(name: str, model: Path, tmp_path: Path) -> None:
    """CVE-2025-67729: weights that run code."""
    folder, seen = tmp_path / "repo", tmp_path / "seen"
    folder.mkdir()
    for part in ("config.json", "tokenizer.json"):
        (folder / part).write_bytes((model / part).read_bytes())
    (folder / name).write_bytes(canary(seen))
    for path in (folder, folder / name):
        with pytest.raises(BadModelFile):
            open_checkpoint(path)
    (folder / "model.safetensors").write_bytes(canary(seen))
    with pytest.raises(BadModelFile):
        open_checkpoint(folder)
    assert not seen.exists()


def test_code_of_a_repository_is_never_imported(model: Path, tmp_path: Path) -> None:
    """CVE-2025-66448, CVE-2026-22807: auto_map ran without being trusted."""
    seen = tmp_path / "seen"
    repo = tiny_chat.write(tmp_path / "repo", BYTE_LEVEL)
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "__init__", "sitecustomize"):
        (repo / f"{name}.py").write_text(f"open({str(seen)!r}, 'w').close()")
    mapped = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    for name, more in (
        ("config.json", {"auto_map": mapped, "trust_remote_code": True}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization_evil.T", None]}}),
    ):
        (repo / name).write_text(json.dumps(json.loads((repo / name).read_text()) | more))
    assert open_checkpoint(repo).names() == open_checkpoint(model).names()
    assert not seen.exists()


# -- 1, 2: listeners and slow readers ----------------------------------------------------------------------------------


def test_there_is_one_listener_and_it_is_on_loopback(model: Path, tmp_path: Path) -> None:
    """CVE-2025-30202, CVE-2026-7301: sockets on all interfaces that nobody asked for. A pickle sent to ours is a bad
    request."""
    seen = tmp_path / "seen"
    flags = ("--kv-memory", "16MiB", "--embedding-model", "none", "--state-dir", str(tmp_path / "state"))
    with serving(str(model), *flags) as (url, pid):
        host, port = url.removeprefix("http://").split(":")
        server = psutil.Process(pid)
        found = {
            (one.laddr.ip, one.laddr.port)
            for process in (server, *server.children(recursive=True))
            for one in process.net_connections("inet")
            if one.status == psutil.CONN_LISTEN or (one.type == socket.SOCK_DGRAM and one.laddr)
        }
        assert found == {("127.0.0.1", int(port))}
        for data in (canary(seen), b"\x80\x04" + canary(seen), http_bytes(CHAT, canary(seen))):
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                connection.sendall(data + b"\r\n\r\n")
                assert connection.recv(1000).startswith(b"HTTP/1.1 400")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(http_bytes("/health/ready", b"", method="GET"))
            assert read_response(connection)[0] == 200
    assert not seen.exists()


def test_readers_that_never_read_slow_nobody_and_hold_little() -> None:
    """CVE-2025-30202: a subscriber that never reads stops the publisher."""
    with running(RoteService(context_tokens=1 << 20)) as up:
        body = chat(stream=True, max_tokens=100_000, logprobs=True, top_logprobs=20)
        before = psutil.Process().memory_info().rss
        slow = [up.connect() for _ in range(8)]
        for connection in slow:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(http_bytes(CHAT, body))
        for _ in range(20):
            _served(up)
        assert psutil.Process().memory_info().rss - before < 64 << 20
        for connection in slow:
            connection.close()
        while up.service.open:
            _served(up)


def _served(up: Running) -> None:
    with up.connect() as connection:
        connection.sendall(http_bytes(CHAT, chat(max_tokens=50)))
        assert read_response(connection)[0] == 200


# -- 3: the server's network and disk ----------------------------------------------------------------------------------

HOSTS = (
    *("127.0.0.1", "localhost", "0.0.0.0", "0", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "[::1]", "[::]"),
    *("[::ffff:127.0.0.1]", "[::ffff:a9fe:a9fe]", "169.254.169.254", "169.254.169.254.nip.io", "metadata.internal"),
    *("a\\@127.0.0.1", "127.0.0.1\\@a", "a@127.0.0.1", "127.0.0.1#@a", "127。0。0。1", "①②⑦.0.0.1", "10.0.0.1"),
)  # fmt: skip
OTHERS = (
    *("file:///etc/passwd", "file://a/etc/passwd", "FILE:///etc/passwd", "/etc/passwd", "../../etc/passwd", "~/.ssh"),
    *("ftp://{at}/x", "gopher://{at}/_x", "dict://{at}/x", "ldap://{at}/x", "jar:http://{at}/x!/", "//{at}/x"),
    *("\\\\{at}\\x", "data:text/html,<script>", "data:image/svg+xml;base64,PHN2Zy8+", "http:{at}/x", "http:///{at}"),
    *("unix:/run/docker.sock", "javascript:alert(1)", "blob:http://{at}/x", "http://{at}/x?u=http://{at}/y"),
)  # fmt: skip


@contextmanager
def trap() -> Iterator[tuple[int, list[object]]]:
    """A port that remembers who came."""
    came: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        over = threading.Event()

        def wait() -> None:
            while not over.is_set():
                try:
                    came.append(listener.accept()[1])
                except TimeoutError:
                    continue

        thread = threading.Thread(target=wait)
        thread.start()
        try:
            yield listener.getsockname()[1], came
        finally:
            over.set()
            thread.join()


def bodies(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Everywhere that other servers take a URL."""
    said = {"model": "rote", "max_tokens": 2}
    for part in (
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "file", "file": {"file_id": url}},
    ):
        yield CHAT, said | {"messages": [{"role": "user", "content": [part]}]}
    source = {"type": "image", "source": {"type": "url", "url": url}}
    yield "/v1/messages", said | {"messages": [{"role": "user", "content": [source]}]}
    item = {"role": "user", "content": [{"type": "input_image", "image_url": url}]}
    yield "/v1/responses", {"model": "rote", "input": [item]}
    yield "/api/chat", {"model": "rote", "messages": [{"role": "user", "content": "a", "images": [url]}]}
    yield CHAT, said | {"messages": [{"role": "user", "content": "a"}], "chat_template": url}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": url}}}
    yield CHAT, said | {"messages": [{"role": "user", "content": "a"}], "response_format": schema}


def test_no_url_of_a_client_is_ever_followed() -> None:
    """CVE-2026-24779, CVE-2026-33626, GHSA-3f6c-7fw2-ppm4: the validator and the fetcher read a URL differently. Here
    is no fetcher: every form is refused, nobody comes to the trap, and no file is told of."""
    service = RoteService()
    app = build(service, make_text(), GatewaySettings(), Metrics())
    with trap() as (port, came):
        places = [f"{scheme}://{host}:{port}/x" for scheme in ("http", "HtTpS") for host in HOSTS]
        places += [other.replace("{at}", f"127.0.0.1:{port}") for other in OTHERS]
        assert len(places) > 60
        for url in places:
            for path, body in bodies(url):
                status, _, answer = asyncio.run(ask(app, path, json.dumps(body).encode()))
                assert status in (400, 404), (path, url, status)
                assert b"root:" not in answer and not LEAK.search(answer.replace(url.encode(), b"")), answer
    assert not came and not service.started


# -- 9: numbers in model files: `make fuzz`, and negative ones here ----------------------------------------------------


@pytest.mark.parametrize("value", [-1, -(2**31), -(2**63), 2**63, 2**64 - 1, 1.5, "8", True, None, [8]])
def test_no_number_of_a_config_is_believed(value: Any, tmp_path: Path) -> None:
    """CVE-2026-21869, CVE-2026-7482: negative counts, offsets beyond the file."""
    from headrace.device.reference.llama import LlamaConfig

    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "head_dim")
    repo = tiny_chat.write(tmp_path / "repo", BYTE_LEVEL)
    config = json.loads((repo / "config.json").read_text())
    for name in names:
        if value is None and name == "head_dim":
            continue  # may be left out
        (repo / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(BadModelFile):
            LlamaConfig.from_hf(open_checkpoint(repo).config)


# -- 10: names that become paths ---------------------------------------------------------------------------------------

NAMES = (
    *("../evil", "a/../b", "..\\evil", "/etc/passwd", "a/b/../../c", "a/b\0c", "a/b\n", ".", "..", "", "a/..", "a//b"),
    *("C:\\x", "\\\\host\\share", "CON", "a/NUL", "a/b:../../x.gguf", "a/b:/etc/passwd", "sha256:../../x", "a/%2e%2e"),
    *("a/b?x", "a/b#x", "a/b c", "-rf/x", "a/-o", "ａ/b", "a/b\u202egpj", "a" * 300 + "/b", "file:///etc/passwd"),
    *("~root/x", "a/b@../c"),
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_name_never_leaves_the_store(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2024-37032, CVE-2024-39719, CVE-2024-45436: digests and names as paths."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadName):
        HubId.parse(name)
    if not os.path.exists(name.replace("\0", "?")):
        with pytest.raises((BadName, sources.NoSuchModel)):
            sources.resolve(name, tmp_path / "home")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shard", ["../out.safetensors", "/tmp/out.safetensors", "a/b.safetensors", "..\\x"])
def test_an_index_names_no_file_outside(shard: str, model: Path, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    repo.mkdir()
    for part in ("config.json", "tokenizer.json"):
        (repo / part).write_bytes((model / part).read_bytes())
    safetensors.torch.save_file({"w": torch.zeros(1)}, tmp_path / "out.safetensors")
    (repo / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(BadModelFile, match="not a safetensors file of its folder"):
        open_checkpoint(repo)


# What may stand in braces in a statement: names of columns and tables, marks, orders; all of them constants of ours.
WORDS = {"_FIELDS", "marks", "column", "status", "fields", "table", "where", "after", "sign", "order"}
VERBS = ("SELECT ", "INSERT ", "UPDATE ", "DELETE ", "AND ", "WHERE ")
HOSTILE = (
    "'; DROP TABLE files; --",
    "' OR '1'='1",
    '" OR ""="',
    "%' UNION SELECT content FROM files --",
    "\\'; --",
    "\0",
)


def test_statements_are_never_put_together_from_values() -> None:
    """CVE-2026-42208: a key inside a statement. A new name in one fails here until somebody has looked at it."""
    seen = set[str]()
    for path in sorted((SOURCE / "gateway" / "state").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr) and ast.unparse(node)[2:].startswith(VERBS):
                seen |= {ast.unparse(part.value) for part in node.values if isinstance(part, ast.FormattedValue)}
    assert seen == WORDS
    with_sql = [path for path in SOURCE.rglob("*.py") if "import sqlite3" in path.read_text()]
    assert {path.parent for path in with_sql} == {SOURCE / "gateway" / "state"}


def test_values_are_no_part_of_statements(tmp_path: Path) -> None:
    """Whatever a client calls its files, batches, lines and pages, it gets its own words back or a refusal."""
    database = Database(tmp_path)
    app = build(RoteService(), make_text(), GatewaySettings(), Metrics(), Extras(database=database))

    async def main() -> None:
        for name in HOSTILE:
            line = json.dumps({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}})
            body, headers = form(line.encode(), name.replace('"', "").replace("\0", ""))
            status, _, made = await ask(app, "/v1/files", body, headers=headers)
            assert status == 200, made
            asked = {"input_file_id": json.loads(made)["id"], "endpoint": "/v1/completions", "metadata": {"a": name}}
            status, _, batch = await ask(app, "/v1/batches", json.dumps(asked).encode())
            assert status == 200 and json.loads(batch)["metadata"] == {"a": name}
            bad = json.dumps(asked | {"input_file_id": name}).encode()
            assert (await ask(app, "/v1/batches", bad))[0] in (400, 404)
            for page in (
                f"/v1/files/{name}",
                f"/v1/batches/{name}",
                f"/v1/files/{name}/content",
                f"/v1/responses/{name}",
            ):
                status, _, answer = await ask(app, page, method="GET")
                assert status == 404 and not LEAK.search(answer), (page, answer)
            for query in ("after", "order", "purpose", "limit"):
                status, _, answer = await ask(app, f"/v1/files?{query}={quote(name)}", method="GET")
                assert status in (400, 404) or not json.loads(answer)["data"], (query, name, answer)
        _, _, listed = await ask(app, "/v1/files", method="GET")
        assert len(json.loads(listed)["data"]) == len(HOSTILE)

    try:
        asyncio.run(main())
    finally:
        database.close()


def form(content: bytes, name: str) -> tuple[bytes, dict[str, str]]:
    """An upload for a batch."""
    head = '--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b\r\n'
    head += f'Content-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
    return head.encode() + content + b"\r\n--b--\r\n", {"content-type": "multipart/form-data; boundary=b"}


# -- 14: what others have asked ----------------------------------------------------------------------------------------


def test_whether_a_prompt_was_asked_before_shows_to_its_own_tenant_only(model: Path, tmp_path: Path) -> None:
    """CVE-2025-46570: hits of the prefix cache tell what other tenants asked. The attacker guesses from the tokens
    that came from the cache, which is what times would tell, without their noise: right as often as a coin."""
    secrets_ = {name: add_key(tmp_path / "keys", name) for name in ("victim", "attacker")}
    flags = ("--kv-memory", "16MiB", "--embedding-model", "none", "--state-dir", str(tmp_path / "state"))
    rng = Random(0)
    with (
        serving(str(model), *flags, "--keys-file", str(tmp_path / "keys")) as (url, _),
        httpx.Client(base_url=url) as http,
    ):

        def cached(name: str, prompt: str) -> int:
            body = {"prompt": prompt, "max_tokens": 1}
            answer = http.post("/v1/completions", json=body, headers={"x-api-key": secrets_[name]}).json()
            return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

        def area(guesser: str) -> float:
            """Under the curve: how often an asked prompt looks more like a hit than another one, ties by halves."""
            asked = [" ".join(rng.choices(WORDS_SAID, k=40)) for _ in range(12)]
            fresh = [" ".join(rng.choices(WORDS_SAID, k=40)) for _ in range(12)]
            for prompt in asked:
                cached("victim", prompt)
            hits, misses = ([cached(guesser, prompt) for prompt in group] for group in (asked, fresh))
            return sum((hit > miss) + (hit == miss) / 2 for hit in hits for miss in misses) / len(hits) / len(misses)

        assert area("victim") == 1.0  # the measure is no blind one
        assert area("attacker") == 0.5


WORDS_SAID = "river wheel mill water stone grain flour gate dam channel".split()


def add_key(file: Path, name: str) -> str:
    """The secret of a new key, whose tenant has its name."""
    command = [sys.executable, "-m", "headrace.cli", "keys", "add", name, "--tenant", name, "--keys-file", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
