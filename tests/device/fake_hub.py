"""A model hub on loopback: the endpoints that huggingface_hub asks, over real HTTP, with faults to order."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """Its repositories, and a log of what was asked."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    commit: str = "a" * 40
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    cut_after: dict[str, int] = field(default_factory=dict)  # file -> bytes, then the connection drops, once
    dies_after: dict[str, int] = field(default_factory=dict)  # the same, and then the hub knows nothing
    dead: bool = False
    swapped: dict[str, bytes] = field(default_factory=dict)  # file -> what is really sent
    claimed_bytes: dict[str, int] = field(default_factory=dict)  # file -> size in the listing
    endpoint: str = ""

    def fetched(self) -> list[str]:
        return [path.rsplit("/", 1)[1] for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]

    def listing(self, repository: str) -> dict[str, Any]:
        files = self.repositories[repository]
        siblings = [self._sibling(name, content) for name, content in files.items()]
        return {"id": repository, "modelId": repository, "sha": self.commit, "siblings": siblings, "private": False}

    def _sibling(self, name: str, content: bytes) -> dict[str, Any]:
        size = self.claimed_bytes.get(name, len(content))
        entry: dict[str, Any] = {"rfilename": name, "size": size, "blobId": git_sha1(content)}
        if is_large(name):
            entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 130}
        return entry


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf"))


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Run the hub in a thread for as long as the block."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        self._answer(send=True)

    def _answer(self, send: bool) -> None:
        path = self.path.split("?")[0]
        self.hub.asked.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        if self.hub.dead:
            self._error(404, "EntryNotFound")
        elif parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]))
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), "/".join(parts[4:]), send)
        else:
            self._error(404, "EntryNotFound")

    def _api(self, repository: str) -> None:
        if repository in self.hub.gated:
            self._error(403, "GatedRepo")
        elif repository not in self.hub.repositories:
            self._error(404, "RepoNotFound")
        else:
            self._send(200, json.dumps(self.hub.listing(repository)).encode(), {"Content-Type": "application/json"})

    def _file(self, repository: str, name: str, send: bool) -> None:
        content = self.hub.repositories.get(repository, {}).get(name)
        if content is None:
            return self._error(404, "EntryNotFound")
        etag = hashlib.sha256(content).hexdigest() if is_large(name) else git_sha1(content)
        content = self.hub.swapped.get(name, content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.hub.commit, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = self._fault(name) if send else None
        self._send(206 if wanted else 200, content[start:], headers, send, cut)

    def _fault(self, name: str) -> int | None:
        """Bytes after which this answer breaks off."""
        if name in self.hub.dies_after:
            self.hub.dead = True
            return self.hub.dies_after[name]
        return self.hub.cut_after.pop(name, None)

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], send: bool = True, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if send and self.command != "HEAD":
            with suppress(ConnectionError):  # of a client that was killed
                self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True
