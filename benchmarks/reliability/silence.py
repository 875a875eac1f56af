"""Whether anything that is nobody's business is in the log, the metrics or a table of processes: a server with keys is
asked in every way, rightly and wrongly, its worker is killed, and then all that it said is searched."""

from __future__ import annotations

import asyncio
import base64
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from reliability.check import Found, Setting
from reliability.running import HEADRACE, Server, client, serving, until

WORD = "heronspath"  # in every prompt, and in no text of ours
_LEAST_CHARS = 12  # of an answer that is looked for: shorter ones may be anywhere


@dataclass(slots=True)
class Said:
    """What must not be repeated, and what was."""

    secrets: dict[str, str] = field(default_factory=dict)  # text -> what it is
    asked: int = 0

    def found(self, pages: Mapping[str, str]) -> list[str]:
        """In words; the secret itself is not repeated here either."""
        return [
            f"{what} in {name}"
            for name, page in pages.items()
            for secret, what in self.secrets.items()
            if any(form in page for form in forms(secret))
        ]


def forms(secret: str) -> Iterator[str]:
    """As itself, and as careless code might write it."""
    yield secret
    yield base64.b64encode(secret.encode()).decode().rstrip("=")
    yield secret.encode().hex()


async def silent(setting: Setting) -> Found:
    """0 occurrences of keys, prompts or answers in log, metrics and process table at the default level"""
    keys = setting.folder / "keys.sqlite3"
    secret, admin = new_key(keys, "someone"), new_key(keys, "operator", "--admin")
    wrong = secret[:-1] + ("A" if secret[-1] != "A" else "B")
    said = Said({secret: "a key", admin: "an admin's key", wrong: "a wrong key", WORD: "a prompt"})
    flags = ("--keys-file", str(keys), *setting.flags)
    async with serving(setting.model, setting.folder, *flags) as server, client() as http:
        for key in (secret, admin, wrong, ""):
            for _ in range(1 if setting.short else 20):
                await everything(http, server.url, key, said)
        await disturbed(http, server, secret, said)
        bearer = {"authorization": f"Bearer {admin}"}
        pages = {"metrics": (await http.get(server.url + "/metrics", headers=bearer)).text}
        process = psutil.Process(server.process.pid)
        everybody = [process, *process.children(recursive=True)]
        pages["the process table"] = " ".join(word for one in everybody for word in one.cmdline())
        server.signal(signal.SIGTERM)
        await server.ended(60)
        pages["the log"] = "".join(server.lines)
    lines, found = len(server.lines), said.found(pages)
    told = f"{said.asked} requests of {len(requests_of('x'))} kinds and a killed worker, {lines} lines of log"
    seen = pages["the log"].count("finish=") > 0 and "headrace" in pages["metrics"]
    nothing = [] if seen else ["the log or the metrics are empty"]
    return Found("; ".join([f"{told}: {len(found)} occurrences", *found[:3], *nothing]), not found and seen)


def new_key(file: Path, name: str, *flags: str) -> str:
    made = subprocess.run(
        [*HEADRACE, "keys", "add", name, "--keys-file", str(file), *flags], capture_output=True, text=True, check=True
    )
    return made.stdout.strip()


def requests_of(prompt: str) -> list[tuple[str, str, Any]]:
    """(method, path, body): every dialect, right and wrong in the ways that errors like to repeat."""
    chat = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 16, "ignore_eos": True}
    right: list[tuple[str, Any]] = [
        ("/v1/completions", {"prompt": prompt, "max_tokens": 16, "ignore_eos": True}),
        ("/v1/completions", {"prompt": prompt, "max_tokens": 16, "stream": True, "logprobs": 2}),
        ("/v1/chat/completions", chat),
        ("/v1/responses", {"input": prompt, "max_output_tokens": 16}),
        ("/v1/messages", {"model": "any", "max_tokens": 16, "messages": chat["messages"]}),
        ("/api/generate", {"model": "any", "prompt": prompt, "stream": False}),
        ("/v1/embeddings", {"input": prompt}),
        ("/tokenize", {"prompt": prompt}),
    ]
    wrong: list[tuple[str, Any]] = [
        ("/v1/completions", {"prompt": prompt, "max_tokens": 10**6}),
        ("/v1/completions", {"prompt": prompt, prompt: 1}),
        ("/v1/completions", {"prompt": {"text": prompt}}),
        ("/v1/completions", {"prompt": "x", "model": prompt}),
        ("/v1/completions", {"prompt": prompt, "stop": [prompt, 7]}),
        ("/v1/chat/completions", chat | {"response_format": {"type": "json_schema", "json_schema": {prompt: prompt}}}),
        ("/v1/chat/completions", chat | {"messages": [{"role": prompt, "content": prompt}]}),
        ("/v1/completions", '{"prompt": "' + prompt),
        ("/v1/batches", {"input_file_id": prompt, "endpoint": prompt}),
    ]
    bodies = [("POST", path, body) for path, body in right + wrong]
    queries = [("GET", f"{path}?key={prompt}&prompt={prompt}", None) for path in ("/v1/models", "/nothing")]
    return [*bodies, *queries]


async def everything(http: httpx.AsyncClient, url: str, key: str, said: Said) -> None:
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    for method, path, body in requests_of(f"{WORD} {said.asked}"):
        said.asked += 1
        options: dict[str, Any] = {"json": body} if isinstance(body, dict) else {"content": body}
        answer = await http.request(method, url + path, headers=headers, **options)
        if answer.status_code == 200 and path == "/v1/completions" and "choices" in answer.text[:4096]:
            note(answer, said)


def note(answer: httpx.Response, said: Said) -> None:
    if answer.headers["content-type"] == "application/json":
        text = answer.json()["choices"][0]["text"].strip()
        if len(text) >= _LEAST_CHARS:
            said.secrets[text] = "an answer"


async def disturbed(http: httpx.AsyncClient, server: Server, key: str, said: Said) -> None:
    """The worker dies in the middle of an answer, where there is one."""
    try:
        worker = server.worker
    except LookupError:
        return
    body = {"prompt": f"{WORD} at the end", "max_tokens": 200, "ignore_eos": True}
    headers = {"authorization": f"Bearer {key}"}
    asking = asyncio.create_task(http.post(server.url + "/v1/completions", json=body, headers=headers))
    await asyncio.sleep(0.2)
    worker.send_signal(signal.SIGKILL)
    await asyncio.wait((asking,))
    said.asked += 1
    await until(http, server.url, True, 60)
