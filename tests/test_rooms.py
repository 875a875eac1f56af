"""The direction of knowledge, as assertions over the source: who may import whom, who may know time, how big is big.

Upper rooms may import lower ones, never sideways, never up. `docs/design.md` explains why.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "headrace"

MAY_IMPORT = {  # room -> the rooms below it that it may know
    "core": set[str](),
    "engine": {"core"},
    "device": {"core"},
    "cluster": {"core", "engine"},
    "gateway": {"core"},
    "workload": {"core"},
    "draw": set[str](),
    "bench": {"core", "workload", "draw"},
    "sim": {"core", "workload", "draw", "engine", "cluster"},
    "cli": {"core", "engine", "device", "cluster", "gateway", "workload", "bench", "sim", "draw"},
}
ONLY_IN = {  # a package -> the places that may import it
    "torch": {"device/reference", *(f"device/{name}.py" for name in ("arrays", "checkpoint", "cuda", "memory"))},
    "llguidance": {"device"},
    "huggingface_hub": {"device"},
    "psutil": {"device"},
    "starlette": {"gateway"},
    "uvicorn": {"gateway"},
    "jinja2": {"gateway"},
    "tokenizers": {"gateway"},
    "prometheus_client": {"gateway"},
    "opentelemetry": {"gateway/traces.py"},
    "redis": {"gateway/shared_limits.py"},
    "httptools": {"bench"},
    "ray": {"cluster/ray.py"},
    "highspy": {"sim/plan/mix.py"},
    "numpy": {"device", "sim", "bench"},
    "time": {"core/clock.py"},
    "asyncio": {
        *("core/clock.py", "engine/loop.py", "engine/embedding.py", "engine/host.py"),
        *("device/executor.py", "device/encoder.py", "device/apart.py", "device/worker.py"),
        *("gateway", "bench", "cluster", "sim", "cli"),
    },
    "argparse": {"core/config.py", "cli"},
    "pickle": set[str](),
    "marshal": set[str](),
    "shelve": set[str](),
}
CLOCKS = ("asyncio.sleep", "loop.time", "threading.Timer", "datetime.now", "datetime.datetime.now", "datetime.utcnow")
NEVER_CALLED = ("eval", "exec", "compile", "__import__")
PURE = ("engine",)  # no randomness, no threads, no I/O: `now` and generators are arguments
IMPURE = {"random", "threading", "socket", "os", "subprocess", "logging", "concurrent"}
MOST_LINES_OF_A_FILE = 500
MOST_LINES_OF_A_FUNCTION = 80


def modules() -> Iterator[Path]:
    yield from sorted(SOURCE.rglob("*.py"))


def place(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def room(path: Path) -> str:
    return place(path).split("/")[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported, at any depth of nesting."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.fixture(params=list(modules()), ids=place)
def module(request: pytest.FixtureRequest) -> tuple[Path, ast.Module]:
    path: Path = request.param
    return path, ast.parse(path.read_text(encoding="utf-8"))


def test_rooms_know_only_what_is_below_them(module: tuple[Path, ast.Module]) -> None:
    path, tree = module
    allowed = MAY_IMPORT.get(room(path), set()) | {room(path), "__version__"}
    known = {name.split(".")[1] for name in imports(tree) if name.startswith("headrace.")}
    assert known <= allowed, f"{place(path)} may not know {sorted(known - allowed)}"


def test_packages_stay_in_their_rooms(module: tuple[Path, ast.Module]) -> None:
    path, tree = module
    for name in imports(tree):
        package = name.split(".")[0]
        homes = ONLY_IN.get(package)
        if homes is not None:
            assert {place(path), place(path.parent), room(path)} & homes, f"{place(path)} may not import {package}"
        if room(path) == "core":
            assert package in sys.stdlib_module_names | {"headrace"}, f"core may not import {package}"
        if room(path) in PURE and not place(path).endswith("loop.py"):
            assert package not in IMPURE, f"{place(path)} decides; it may not import {package}"


def test_nobody_sleeps_reads_clocks_or_the_environment_elsewhere(module: tuple[Path, ast.Module]) -> None:
    path, tree = module
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if place(path) != "core/clock.py":
                assert dotted not in CLOCKS, f"{place(path)}: {dotted}"
            if place(path) != "core/config.py":
                assert dotted not in ("os.environ", "os.getenv"), f"{place(path)}: {dotted}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in NEVER_CALLED, f"{place(path)}:{node.lineno} calls {node.func.id}"


def test_no_module_level_mutable_state(module: tuple[Path, ast.Module]) -> None:
    """Constants are fine in any container; names of mutable ones are upper case and nothing in the module changes
    them."""
    path, tree = module
    for statement in tree.body:
        if not isinstance(statement, ast.Assign | ast.AnnAssign):
            continue
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(statement.value, ast.Dict | ast.List | ast.Set):
                assert re.fullmatch(r"_*[A-Z][A-Z0-9_]*|__all__", target.id), f"{place(path)}: {target.id} is mutable"
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"{place(path)}: global {getattr(node, 'names', '')}"


def test_sizes_stay_readable(module: tuple[Path, ast.Module]) -> None:
    path, tree = module
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MOST_LINES_OF_A_FILE, f"{place(path)} has {lines} lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MOST_LINES_OF_A_FUNCTION, f"{place(path)}:{node.name} has {length} lines"


def test_every_module_says_what_it_is_for(module: tuple[Path, ast.Module]) -> None:
    path, tree = module
    assert ast.get_docstring(tree), f"{place(path)} has no docstring"
