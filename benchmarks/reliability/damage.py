"""Files of models that a kill, a disk or a bad copy left: found, said in words, got again, and never served."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from headrace.core.types import HeadraceError
from headrace.device import sources
from headrace.device.checkpoint import open_checkpoint
from reliability.check import Found, Setting, s
from reliability.running import HEADRACE, tiny_model

NAME = "org/tiny"
_DEVICE_TESTS = Path(__file__).parents[2] / "tests" / "device"


async def found(setting: Setting) -> Found:
    """a pull killed at any moment goes on; a pulled file that is cut, has a flipped bit or is gone is found, said, and
    never served"""
    return await asyncio.to_thread(_found, setting)


def _found(setting: Setting) -> Found:
    kills, cuts, flips, mib = (2, 30, 30, 8) if setting.short else (40, 500, 2000, 64)
    sys.path.insert(0, str(_DEVICE_TESTS))
    import fake_hub  # type: ignore[import-not-found]

    model = tiny_model(setting.folder / "original")
    files = {path.name: path.read_bytes() for path in sorted(model.iterdir())}
    files["model.safetensors"] = padded(files["model.safetensors"], mib << 20)  # so that a pull takes its time
    home, rng = setting.folder / "home", random.Random(0)
    with fake_hub.serving(fake_hub.Hub({NAME: files})) as hub:
        wrong, took_s = killed_pulls(hub.endpoint, home, kills, rng)
    folder = sources.resolve(NAME, home)
    wrong += [f"{name} is another one" for name, content in files.items() if (folder / name).read_bytes() != content]
    missed = [told for told in damages(folder, files, cuts, flips, rng) if told]
    served = serve_damaged(folder, home)
    told = f"{kills} pulls killed, then whole in {s(took_s)}: {len(wrong)} wrong; "
    told += f"{cuts} files cut, {flips:,} bits flipped, {len(files)} files gone: {len(missed)} missed"
    told += "" if (refused := "is damaged" in served) else f"; a damaged model: {served[-200:]}"
    return Found("; ".join([told, *wrong[:1], *missed[:1]]), not wrong and not missed and refused)


def padded(safetensors: bytes, more_bytes: int) -> bytes:
    """With one tensor more, which no model asks for."""
    length = int.from_bytes(safetensors[:8], "little")
    header: dict[str, Any] = json.loads(safetensors[8 : 8 + length])
    data = safetensors[8 + length :]
    header["padding"] = {"dtype": "U8", "shape": [more_bytes], "data_offsets": [len(data), len(data) + more_bytes]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data + random.Random(1).randbytes(more_bytes)


def killed_pulls(endpoint: str, home: Path, kills: int, rng: random.Random) -> tuple[list[str], float]:
    """What was wrong after a kill, and how long the pull took that nobody killed."""
    wrong = list[str]()
    begin = time.monotonic()
    alone = pull(endpoint, home.with_name("elsewhere"))
    whole_s = time.monotonic() - begin
    if alone.returncode:
        return [f"a pull failed: {alone.stderr[-300:]}"], 0.0
    for _ in range(kills):
        process = subprocess.Popen(pull_command(), env=environment(endpoint, home), **_QUIET)
        try:
            process.wait(rng.uniform(0.2, 1.0) * whole_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        wrong += half_a_model(home)
    begin = time.monotonic()
    last = pull(endpoint, home)
    if last.returncode:
        wrong.append(f"the pull after the kills failed: {last.stderr[-300:]}")
    return wrong, time.monotonic() - begin


_QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def pull_command() -> list[str]:
    return [*HEADRACE, "pull", NAME]


def pull(endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    command = pull_command()
    return subprocess.run(command, env=environment(endpoint, home), capture_output=True, text=True, check=False)


def environment(endpoint: str, home: Path) -> dict[str, str]:
    more = {"HF_ENDPOINT": endpoint, "HEADRACE_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    return os.environ | more


def half_a_model(home: Path) -> list[str]:
    """A killed pull leaves the whole model or none that could be served."""
    try:
        sources.resolve(NAME, home)
    except sources.NoSuchModel:
        return []
    except HeadraceError as error:
        return [f"after a kill: {error}"]
    return []


def damages(folder: Path, files: dict[str, bytes], cuts: int, flips: int, rng: random.Random) -> list[str]:
    """One harm after the other, undone each time; what was not found."""
    missed = list[str]()
    for at in range(cuts + flips):
        name = rng.choice(list(files))
        path, content = folder / name, files[name]
        place = rng.randrange(min(len(content), 1 << 20)) if at % 2 else rng.randrange(len(content))
        with path.open("r+b") as file:
            if at < cuts:
                file.truncate(place)
            else:
                file.seek(place)
                file.write(bytes([content[place] ^ (1 << rng.randrange(8))]))
        missed += unnoticed(folder, f"{name} {'cut' if at < cuts else 'flipped'} at {place}")
        with path.open("r+b") as file:
            file.seek(place)
            file.write(content[place:] if at < cuts else content[place : place + 1])
    for name in files:
        away = (folder / name).rename(folder.parent / "away")
        missed += unnoticed(folder, f"{name} gone")
        away.rename(folder / name)
    return missed


def unnoticed(folder: Path, harm: str) -> list[str]:
    """By the name that a user would write."""
    try:
        open_checkpoint(sources.resolve(NAME, folder.parents[1]))
    except HeadraceError:
        return []
    return [harm]


def serve_damaged(folder: Path, home: Path) -> str:
    """The last line of `headrace serve` for a model with one wrong bit."""
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))
    command = [*HEADRACE, "serve", NAME, "--port", "0"]
    done = subprocess.run(command, env=environment("", home), capture_output=True, text=True, check=False, timeout=60)
    return (done.stderr.strip().splitlines() or [""])[-1] if done.returncode else "it was served"
