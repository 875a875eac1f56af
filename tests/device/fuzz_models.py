"""`make fuzz`: mutants of model files are opened, or refused with the one error that says what is wrong with them.

    original --mutate--> file or folder --open, map, check shapes, take every tensor, pack, tokenizer--> fine | refused

Anything else is a finding: another exception, memory that is not bounded by the file's size, time, a crash. Mutants are
made from (seed, number) alone, so a finding is a number; GGUF files are cut along their own fields (counts, lengths,
offsets, types, whole entries), JSON along its values.

    python tests/device/fuzz_models.py [MUTANTS] [--workers N] [--seed N] [--first NUMBER] [--only NUMBER]
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "cli"), str(HERE.parent / "gateway")]

import test_gguf_checkpoint as gguf_model  # noqa: E402
import tiny_model  # noqa: E402
from gateway_rig import BYTE_LEVEL, TEMPLATE  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from headrace.cli.assemble import text_of  # noqa: E402
from headrace.device import gguf  # noqa: E402
from headrace.device.checkpoint import open_checkpoint  # noqa: E402
from headrace.device.modelfile import BadModelFile  # noqa: E402
from headrace.device.native.forward import why_not  # noqa: E402
from headrace.device.native.weights import Packer, pack  # noqa: E402
from headrace.device.reference.llama import Llama, LlamaConfig  # noqa: E402
from headrace.gateway.text import BadTokenizer  # noqa: E402

MOST_MORE_BYTES = 256 << 20  # of address space, for any mutant of a file of some 100 KiB
MOST_CPU_S = 2.0
HANGS_AFTER_S = 120.0
CHUNK = 250
TYPED = (BadModelFile, BadTokenizer)
EXTREMES = (
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    255,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, -(2**63), 10**40, 0.5, -0.5, 1e308, float("nan"), float("inf")),
    *("", "a", "\0", "\ud800", "ü" * 5000, "../../etc/passwd", "llama", "0", [], {}, [[]], [0], [-1], [2**63, 2**63]),
    *({"a": 1}, ["a", 1], [None], [1e308]),
)


@dataclass(frozen=True)
class Original:
    """A folder's files (or one GGUF file), and what a mutation may aim at."""

    files: dict[str, bytes]
    numbers: tuple[tuple[int, int], ...] = ()  # of a GGUF file: where a count, length, offset or type is, and its bytes
    entries: tuple[tuple[int, int], ...] = ()  # of a GGUF file: where pairs and tensors begin and end


class _Watched(gguf._Cursor):
    """Remembers where it has read numbers."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.seen: list[tuple[int, int]] = []

    def u32(self, what: str) -> int:
        self.seen.append((self.position, 4))
        return super().u32(what)

    def u64(self, what: str) -> int:
        self.seen.append((self.position, 8))
        return super().u64(what)


def _gguf(folder: Path, window: bool) -> Original:
    def fill(writer: Any) -> None:
        writer.add_chat_template(TEMPLATE)
        writer.add_array("a.scores", [0.5, -1.0])
        writer.add_bool("a.flag", True)
        if window:
            writer.add_sliding_window(64)

    path = gguf_model.build(folder / "model.gguf", fill=fill, tied=window)
    cursor = _Watched(gguf._map(path), path)
    tensors, pairs = gguf._read_preamble(cursor)
    edges = [cursor.position]
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        metadata |= gguf._read_metadata(cursor, 1)
        edges.append(cursor.position)
    for _ in range(tensors):
        gguf._read_tensor(cursor, gguf._alignment(metadata, path))
        edges.append(cursor.position)
    return Original({path.name: path.read_bytes()}, tuple(cursor.seen), tuple(pairwise(edges)))


def _folder(folder: Path, **config: object) -> Original:
    tokenizer = Tokenizer.from_str(BYTE_LEVEL)
    tiny_model.write(folder, tokenizer, **config)
    special = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|bos|>"}, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
    return Original({path.name: path.read_bytes() for path in sorted(folder.iterdir())})


def _sharded(original: Original) -> Original:
    """The same in two files, with an index."""
    content = original.files["model.safetensors"]
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    names, files, placed = sorted(header), dict(original.files), {}
    del files["model.safetensors"]
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard, stored, bytes_ = f"model-0000{number}-of-00002.safetensors", {}, b""
        for name in part:
            begin, end = header[name]["data_offsets"]
            stored[name] = header[name] | {"data_offsets": [len(bytes_), len(bytes_) + end - begin]}
            bytes_ += data[begin:end]
            placed[name] = shard
        files[shard] = _safetensors(json.dumps(stored).encode(), bytes_)
    files["model.safetensors.index.json"] = json.dumps({"weight_map": placed}).encode()
    return Original(files)


def _safetensors(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@cache
def originals() -> tuple[Original, ...]:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        plain = _folder(root / "plain", rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}, eos_token_id=2)  # fmt: skip
        window = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}
        mistral = _folder(root / "mistral", **window)
        return (_gguf(root, window=False), _gguf(root, window=True), plain, _sharded(plain), mistral)


# -- mutations ---------------------------------------------------------------------------------------------------------


def mutant(seed: int, number: int) -> tuple[str, dict[str, bytes]]:
    """What was done, and the files."""
    rng = Random(f"{seed} {number}")
    original = rng.choice(originals())
    if original.numbers:
        name, content = next(iter(original.files.items()))
        told, content = _gguf_mutant(original, content, rng)
        return told, {name: content}
    name = rng.choice([name for name in original.files for _ in range(4 if "safetensors" in name else 2)])
    content = original.files[name]
    how = _header_mutant if name.endswith(".safetensors") else _json_mutant
    told, content = (how if rng.random() < 0.8 else _bytes_mutant)(content, rng)
    return f"{name}: {told}", original.files | {name: content}


def _gguf_mutant(original: Original, content: bytes, rng: Random) -> tuple[str, bytes]:
    kind = rng.choice(("number", "number", "numbers", "entry", "entries", "bytes", "nest"))
    if kind == "bytes":
        return _bytes_mutant(content, rng)
    if kind in ("number", "numbers"):
        changed = bytearray(content)
        for _ in range(1 if kind == "number" else rng.randint(2, 4)):
            at, size = rng.choice(original.numbers)
            old = int.from_bytes(content[at : at + size], "little")
            new = rng.choice((*EXTREMES, old + 1, old - 1, 2 * old, old // 2, -old)) % (1 << 8 * size)
            changed[at : at + size] = new.to_bytes(size, "little")
        return f"{kind} at {at}: {old} -> {new}", bytes(changed)
    (begin, end), (other, to) = rng.choice(original.entries), rng.choice(original.entries)
    if kind == "entry":  # again, or not at all: the counts follow or not
        twice = rng.random() < 0.5
        changed = content[:end] + content[begin:end] * twice + content[end if twice else to :]
        return f"entry {begin}:{end} {'twice' if twice else 'cut'}", _counted(changed, rng)
    if kind == "entries":
        return f"entry {other}:{to} in place of {begin}:{end}", content[:begin] + content[other:to] + content[end:]
    deep = struct.pack("<IQ", 9, rng.choice((1, 2, 2**20))) * rng.randint(1, 200)
    pair = struct.pack("<Q", 1) + b"z" + struct.pack("<I", 9) + deep + struct.pack("<IQ", 4, 0)
    return "nested arrays", _counted(content[:begin] + pair + content[begin:], rng)


def _counted(content: bytes, rng: Random) -> bytes:
    """With one pair or tensor more or less declared."""
    tensors, pairs = struct.unpack_from("<QQ", content, 8)
    more = rng.choice((-1, 0, 1))
    tensors, pairs = (max(0, tensors + more), pairs) if rng.random() < 0.5 else (tensors, max(0, pairs + more))
    return content[:8] + struct.pack("<QQ", tensors, pairs) + content[24:]


def _header_mutant(content: bytes, rng: Random) -> tuple[str, bytes]:
    """Of a safetensors file: its header as JSON, or its length."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.15:
        declared = rng.choice((*EXTREMES, length - 1, length + 1, len(content)))
        return f"a header of {declared} bytes", _safetensors(header, data, declared)
    if rng.random() < 0.3:
        entries = json.loads(header)
        one, other = (entries[name] for name in rng.sample([name for name in entries if name != "__metadata__"], 2))
        field_ = rng.choice(("data_offsets", "shape", "dtype"))
        one[field_] = other[field_] if rng.random() < 0.5 else _twisted(one[field_], rng)
        return f"{field_} of another tensor", _safetensors(json.dumps(entries).encode(), data)
    told, text = _json_mutant(header, rng)
    return told, _safetensors(text, data)


def _twisted(value: Any, rng: Random) -> Any:
    if not isinstance(value, list):
        return rng.choice(("F64", "F8_E4M3", "I64", "BOOL", "", "U8"))
    extremes = (0, -1, 1, 2**31, 2**62, 2**63, 2**64, -(2**63), 1.0, True, "1", None)
    return rng.choice((value[::-1], [rng.choice(extremes) for _ in value], [*value, 1], value[:-1], [2**20] * 9))


def _json_mutant(content: bytes, rng: Random) -> tuple[str, bytes]:
    """A value replaced, removed, moved or given twice."""
    root = json.loads(content)
    places = list(_places(root))
    holder, key = rng.choice(places[: rng.choice((12, len(places)))] or places)
    kind = rng.choice(("replace", "replace", "remove", "move", "twice", "deep"))
    told = f"{kind} {key!r:.60}"
    if kind == "replace":
        holder[key] = rng.choice(VALUES)
    elif kind == "remove":
        del holder[key]
    elif kind == "move":
        other, at = rng.choice(places)
        if at in other if isinstance(other, dict) else at < len(other):
            holder[key] = json.loads(json.dumps(other[at]))
    elif kind == "deep":
        holder[key] = "DEEP"
        depth, (begin, end) = rng.choice((10, 2000, 200_000)), rng.choice((("[", "]"), ('{"a":', "}")))
        text = json.dumps(root).replace('"DEEP"', begin * depth + "1" + end * depth)
        return told, text.encode()
    elif isinstance(holder, dict):
        text, name = json.dumps(holder[key]), json.dumps(key)
        twice = f"{name}: {text}, {name}: {json.dumps(rng.choice(VALUES))}"
        return told, json.dumps(root).replace(f"{name}: {text}", twice, 1).encode()
    return told, json.dumps(root, ensure_ascii=rng.random() < 0.9).encode(errors="surrogatepass")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every value as what holds it and under which key, outermost first; of long lists and tables only some."""
    level = [value]
    while level:
        inner: list[Any] = []
        for holder in level:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            for key in keys[:40]:
                yield holder, key
                if isinstance(holder[key], dict | list):
                    inner.append(holder[key])
        level = inner


def _bytes_mutant(content: bytes, rng: Random) -> tuple[str, bytes]:
    """Bits flipped, stretches put, inserted or removed, the end cut off."""
    kind = rng.choice(("flip", "cut", "put", "insert", "remove", "utf-8"))
    early = min(len(content), 4096) if rng.random() < 0.7 else len(content)
    at = rng.randrange(early)
    if kind == "flip":
        changed = bytearray(content)
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(early)] ^= 1 << rng.randrange(8)
        return kind, bytes(changed)
    if kind == "cut":
        return f"cut at {at}", content[:at]
    new = b"\xff\xfe\xc0\x80" if kind == "utf-8" else rng.randbytes(rng.choice((1, 2, 4, 8, 40)))
    keep = {"insert": 0, "remove": len(new)}.get(kind, len(new))
    return f"{kind} at {at}", content[:at] + (b"" if kind == "remove" else new) + content[at + keep :]


# -- what becomes of them ----------------------------------------------------------------------------------------------


def opened(path: Path) -> None:
    """All of what `headrace serve` does with a model's files before it has memory for KV."""
    checkpoint = open_checkpoint(path)
    config = LlamaConfig.from_hf(checkpoint.config)
    with torch.inference_mode():
        Llama(config, checkpoint.tensor, lambda weight, bias: torch.relu, torch.float32, torch.device("cpu"))
    if why_not(config, 16) is None:
        pack(config, Packer(checkpoint.tensors, None, 1))
    text_of(checkpoint).close()


@dataclass
class Found:
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    def add(self, other: Found) -> None:
        self.outcomes += other.outcomes
        self.findings += other.findings
        self.slowest_s = max(self.slowest_s, other.slowest_s)


def play(seed: int, numbers: range, folder: Path, opening: Callable[[Path], None] = opened) -> Found:
    """Open some mutants. `folder` is where they are written, one after the other."""
    found = Found()
    place = folder / f"mutant-{os.getpid()}"
    place.mkdir(exist_ok=True)
    for number in numbers:
        told, files = mutant(seed, number)
        (folder / f"at-{os.getpid()}").write_text(f"mutant {number} ({told})")
        for name in os.listdir(place):
            if name not in files:
                (place / name).unlink()
        for name, content in files.items():
            (place / name).write_bytes(content)
        faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=True)
        begin_s = time.process_time()
        try:
            opening(place)
            found.outcomes["opened"] += 1
        except TYPED as error:
            found.outcomes[type(error).__name__] += 1
        except BaseException as error:  # a panic of native code is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            found.outcomes["wrong"] += 1
            last = "".join(traceback.format_exception(error)[-4:])[-800:]
            found.findings.append(f"mutant {number} ({told}): {type(error).__name__}: {str(error)[:200]}\n{last}")
        taken_s = time.process_time() - begin_s
        faulthandler.cancel_dump_traceback_later()
        found.slowest_s = max(found.slowest_s, taken_s)
        if taken_s > MOST_CPU_S:
            found.findings.append(f"mutant {number} ({told}) took {taken_s:.1f} s")
    return found


def limited() -> None:
    """For a worker: so much more memory than good models take, and no more."""
    torch.set_num_threads(1)
    for original in originals():
        with tempfile.TemporaryDirectory() as folder:
            for name, content in original.files.items():
                (Path(folder) / name).write_bytes(content)
            opened(Path(folder))
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    if pages:
        most = pages * resource.getpagesize() + MOST_MORE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def play_all(seed: int, first: int, end: int, workers: int) -> Found:
    total, begin_s, count = Found(), time.perf_counter(), end - first
    parts = [range(at, min(at + CHUNK, end)) for at in range(first, end, CHUNK)]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder = Path(name)
        try:
            with ProcessPoolExecutor(workers, get_context("spawn"), limited) as pool:
                for done in as_completed([pool.submit(play, seed, part, folder) for part in parts]):
                    total.add(done.result())
                    _tell(total, count, time.perf_counter() - begin_s)
        except BrokenProcessPool:
            last = ", ".join(path.read_text() for path in folder.glob("at-*"))
            total.findings.append(f"a worker died; it was at one of: {last}")
    return total


def _tell(found: Found, count: int, taken_s: float) -> None:
    done = found.outcomes.total()
    full, left_s = round(30 * done / count), taken_s / done * (count - done)
    begin, end = ("\r", "") if sys.stderr.isatty() else ("", "\n")
    bar = f"[{'#' * full}{'.' * (30 - full)}] {done} of {count}, {len(found.findings)} findings"
    print(f"{begin}{bar}, {left_s / 60:.1f} min left ", end=end, file=sys.stderr, flush=True)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("mutants", nargs="?", type=int, default=50_000)
    options.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--first", type=int, default=0, metavar="NUMBER", help="go on from this mutant")
    options.add_argument("--only", type=int, metavar="NUMBER", help="open one mutant in this process")
    args = options.parse_args()
    if args.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            found = play(args.seed, range(args.only, args.only + 1), Path(folder))
    else:
        found = play_all(args.seed, args.first, args.mutants, args.workers)
    print("\n\n".join(found.findings[:20]))
    outcomes = ", ".join(f"{count} {kind}" for kind, count in found.outcomes.most_common())
    print(f"{found.outcomes.total()} mutants, seed {args.seed}: {outcomes}; slowest {1000 * found.slowest_s:.0f} ms")
    print(f"{len(found.findings)} findings")
    asked = 1 if args.only is not None else args.mutants - args.first
    return int(bool(found.findings) or found.outcomes.total() < asked)


if __name__ == "__main__":
    sys.exit(main())
