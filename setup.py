"""Builds the native kernels beside the package, once per variant; without a C++ compiler the package installs without
them and computes with torch. A wheel made with HEADRACE_COMPILED=1 also has compiled what a simulation does in every
step; see `make compiled`."""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = "src/headrace/device/native"
COMMON = ["-std=c++20", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-pthread", "-g0", "-w"]
VARIANTS = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    eight = ["-mavx2", "-mfma", "-mf16c"]
    VARIANTS["avx2"] = ["-DHEADRACE_AVX2", *eight]
    sixteen = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")]
    VARIANTS["avx512"] = ["-DHEADRACE_AVX512", *eight, *sixteen]
    VARIANTS["avx512bf16"] = [*VARIANTS["avx512"], "-mavx512bf16"]


COMPILES = bool(os.environ.get("HEADRACE_COMPILED"))  # noqa: TID251 - nothing is installed yet

# What the scheduler and a simulated step are made of: plain Python without asyncio, compiled by mypyc as it is.
COMPILED = [
    *("core/keys.py", "core/events.py", "core/step.py", "core/types.py"),
    *("engine/beats.py", "engine/memory.py", "engine/planner.py", "engine/pool.py", "engine/prefix.py"),
    *("engine/progress.py", "engine/queue.py", "engine/scheduler.py", "engine/policies/*.py"),
    *("sim/cost/batch.py", "sim/cost/linear.py", "sim/executor.py"),
    *("sim/gaps.py", "sim/sketch.py", "sim/spent.py", "sim/stats.py", "workload/arrival.py"),
]


class Build(build_ext):
    """One library out of sources that need different flags."""

    def build_extension(self, ext: Extension) -> None:
        if ext is not KERNELS:
            return super().build_extension(ext)
        objects = []
        for source in ext.sources:
            objects += self._compiled(source, [], "")
        for name, flags in VARIANTS.items():
            objects += self._compiled(f"{FOLDER}/kernels.cpp", [f"-DHEADRACE_VARIANT={name}", *flags], name)
        path = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, path, extra_postargs=["-pthread"], target_lang="c++")

    def _compiled(self, source: str, flags: list[str], folder: str) -> list[str]:
        return self.compiler.compile(
            [source], output_dir=f"{self.build_temp}/{folder}", extra_postargs=[*COMMON, *flags], depends=[]
        )

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # no compiler, or one that does not know the flags
            if COMPILES:
                raise
            print(f"headrace is built without its native kernels: {error}", file=sys.stderr)  # noqa: T201


SOURCES = [f"{FOLDER}/{name}.cpp" for name in ("pool", "pack", "draw", "step")]
HEADERS = [f"{FOLDER}/{name}.h" for name in ("layout", "vector", "draw", "pool")]
KERNELS = Extension(
    "headrace.device.native.kernels",
    SOURCES,
    depends=[*HEADERS, f"{FOLDER}/kernels.cpp"],
    language="c++",
    optional=True,
)


def compiled() -> list[Extension]:
    """Nothing in a checkout: a compiled module would hide every later edit of its source."""
    asked = {*sys.argv}
    if not COMPILES or not {"bdist_wheel", "build", "build_ext"} & asked:  # pip asks for the metadata first
        return []
    if {"develop", "editable_wheel", "--inplace"} & asked:
        sys.exit("HEADRACE_COMPILED is for wheels: a checkout would go on running what was compiled, whatever you edit")
    from mypyc.build import mypycify

    sources = [str(path) for pattern in COMPILED for path in sorted(Path("src/headrace").glob(pattern))]
    return mypycify(sources, opt_level="3", debug_level="0")


setup(
    ext_modules=[KERNELS, *compiled()],
    cmdclass={"build_ext": Build},
    # compiled modules lie apart from what other builds left: that would end in a wheel
    options={"build": {"build_base": "build/compiled"}} if COMPILES else {},
)
