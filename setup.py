"""Builds two libraries without Python and torch: the native kernels, with one level per instruction set, and the coder.

Both are optional. Without a compiler, or with one that lacks the vector extensions of GCC and clang, the package
is installed without them and uses torch operations and numpy.
"""

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

SOURCE = Path("lightning_muws/runtime/native/src")
CODER = Path("lightning_muws/artifact/src")
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
LEVELS = {"portable": []}
if platform.machine().lower() in {"x86_64", "amd64"}:
    LEVELS |= {
        "avx2": AVX2,
        "avx_vnni": [*AVX2, "-mavxvnni"],
        "avx512": AVX512,
        "avx512_vnni": [*AVX512, "-mavx512vnni"],
        "avx512_bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
    }


class BuildNative(build_ext):
    """Compiles the libraries: of the kernels, level.cpp once for every level that this compiler supports."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return a name without a Python version: the file is no Python module."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile and link; raise an error that setuptools ignores for an optional extension."""
        if self.compiler.compiler_type == "msvc":
            raise PlatformError("the native libraries need GCC or clang; the package works without them")
        objects = self._kernels() if ext is kernels else self._compile(ext.sources, "coder", FLAGS, [])
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, target, extra_postargs=["-pthread"], target_lang="c++")

    def _kernels(self) -> list[str]:
        """Compile the levels of the kernels that this compiler has, and what selects one."""
        objects, macros = [], []
        for name, flags in LEVELS.items():
            try:
                objects += self._compile([str(SOURCE / "level.cpp")], name, [*FLAGS, *flags], [("MUWS_LEVEL", name)])
            except CompileError:  # an older compiler, or one for another machine
                if name == "portable":
                    raise
                continue
            macros.append((f"MUWS_HAVE_{name.upper()}", "1"))
        objects += self._compile([str(SOURCE / "api.cpp")], "dispatch", FLAGS, macros)
        return objects + self._compile(
            [str(SOURCE / name) for name in ("onnx.cpp", "threads.cpp")], "dispatch", FLAGS, []
        )

    def _compile(self, sources: list[str], name: str, flags: list[str], macros: list[tuple[str, str]]) -> list[str]:
        directory = str(Path(self.build_temp) / name)
        return self.compiler.compile(sources, directory, macros, extra_postargs=flags)


class AnyPython(bdist_wheel):
    """Tags the wheel for any Python 3 of this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return any Python 3, no ABI, this platform."""
        return "py3", "none", super().get_tag()[2]


kernels = Extension(
    "lightning_muws.runtime.native.kernels",
    sources=[str(SOURCE / name) for name in ("api.cpp", "level.cpp", "onnx.cpp", "threads.cpp")],
    depends=[str(path) for path in sorted(SOURCE.glob("*.h"))],
    optional=True,
)
coder = Extension(
    "lightning_muws.artifact.coder",
    sources=[str(path) for path in sorted(CODER.glob("*.cpp"))],
    depends=[str(CODER / name) for name in ("coder.h", "varint.h")],
    optional=True,
)
setup(ext_modules=[kernels, coder], cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython})
