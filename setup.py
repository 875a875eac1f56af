"""Builds the native kernels beside the package, once per variant; without a C++ compiler the package installs without
them and computes with torch."""

import platform
import sys

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


class Build(build_ext):
    """One library out of sources that need different flags."""

    def build_extension(self, ext: Extension) -> None:
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

setup(ext_modules=[KERNELS], cmdclass={"build_ext": Build})
