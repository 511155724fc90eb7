"""Drives the reader in C (lightning_muws/artifact/src/reader) through ctypes; `make lib` builds it, once per change."""

import ctypes
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
HEADER = ROOT / "lightning_muws" / "artifact" / "src" / "reader" / "muws.h"
MAX_BYTES = 1 << 30
OK, REFUSED, TOO_LARGE, NO_FILE, NO_MEMORY, ARGUMENT = range(6)
OWN, FLOAT32 = range(2)
VALUES, SIGNS = range(2)


class Error(ctypes.Structure):
    _fields_: ClassVar = [("code", ctypes.c_int32), ("message", ctypes.c_char * 508)]


class Tensor(ctypes.Structure):
    _fields_: ClassVar = [
        ("name", ctypes.c_void_p),
        ("name_bytes", ctypes.c_uint64),
        ("dtype", ctypes.c_char_p),
        ("stored", ctypes.c_char_p),
        ("shape", ctypes.POINTER(ctypes.c_uint64)),
        ("n_axes", ctypes.c_uint64),
        ("numel", ctypes.c_uint64),
        ("n_bytes", ctypes.c_uint64),
        ("block", ctypes.c_uint64 * 2),
        ("kinds", ctypes.c_uint64 * 3),
        ("error", ctypes.c_double),
        ("same_as", ctypes.c_int64),
        ("is_copy", ctypes.c_int32),
    ]


class BlockList(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, ctypes.c_uint64) for name in ("rows", "cols", "row_blocks", "n_blocks")),
        ("starts", ctypes.POINTER(ctypes.c_int32)),
        ("columns", ctypes.POINTER(ctypes.c_uint16)),
    ]


class BlocksInfo(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, ctypes.c_uint64) for name in ("outputs", "inputs", "n_bytes")),
        ("values", BlockList),
        ("weights", ctypes.POINTER(ctypes.c_float)),
        ("signs", BlockList),
        ("magnitudes", ctypes.POINTER(ctypes.c_float)),
        ("minus", ctypes.POINTER(ctypes.c_uint8)),
    ]


class Conv2d(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, ctypes.c_uint64) for name in ("n", "channels", "height", "width")),
        *((name, ctypes.c_uint64 * 2) for name in ("kernel", "stride", "padding")),
    ]


class ReaderError(Exception):
    """What the library says: its code and its message."""

    def __init__(self, error: Error) -> None:
        self.code, message = error.code, error.message.decode("utf-8", "surrogatepass")
        super().__init__(message)


@functools.cache
def build() -> Path:
    """Return the library, built if it is older than its source."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or shutil.which("make") is None:
        pytest.skip("no C++ compiler or no make: the reader in C is not built")
    subprocess.run(["make", "--silent", "lib"], cwd=ROOT, check=True, capture_output=True)  # noqa: S607  our own Makefile
    return ROOT / "build" / "libmuws.so"


@functools.cache
def library() -> ctypes.CDLL:
    """Return the library with its types declared."""
    found = ctypes.CDLL(str(build()))
    pointer, number, error = ctypes.c_void_p, ctypes.c_uint64, ctypes.POINTER(Error)
    for name, arguments, result in (
        ("muws_abi", [], ctypes.c_int32),
        ("muws_open", [ctypes.c_char_p, number, error], pointer),
        ("muws_open_memory", [ctypes.c_char_p, number, number, error], pointer),
        ("muws_close", [pointer], None),
        ("muws_format_version", [pointer], ctypes.c_char_p),
        ("muws_extra", [pointer, ctypes.POINTER(number)], pointer),
        ("muws_n_tensors", [pointer], number),
        ("muws_tensor", [pointer, number, ctypes.POINTER(Tensor), error], ctypes.c_int32),
        ("muws_find", [pointer, ctypes.c_char_p], ctypes.c_int64),
        ("muws_decode", [pointer, number, ctypes.c_int32, pointer, number, error], ctypes.c_int32),
        ("muws_verify", [pointer, error], ctypes.c_int32),
        ("muws_peak_bytes", [pointer], number),
        ("muws_stored_bytes", [pointer, pointer, number, error], ctypes.c_int32),
        ("muws_pack", [pointer, number, ctypes.c_int32, error], pointer),
        ("muws_free_packed", [pointer], None),
        ("muws_packed", [pointer, ctypes.POINTER(BlocksInfo)], None),
        (
            "muws_conv2d",
            [pointer, ctypes.POINTER(Conv2d), pointer, pointer, number, pointer, ctypes.c_int32, error],
            ctypes.c_int32,
        ),
        (
            "muws_linear",
            [pointer, pointer, number, pointer, number, number, pointer, ctypes.c_int32, error],
            ctypes.c_int32,
        ),
    ):
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, result
    return found


def compiled(source: str, folder: Path, *flags: str, compiler: str = "cc", run: bool = True) -> str:
    """Compile a C program against the library, and return what it prints; or, without ``run``, an empty string."""
    found = shutil.which(compiler) or pytest.skip(f"no {compiler}")
    (folder / "program.c").write_text(source, encoding="utf-8")
    lib = build().parent
    command = [found, *flags, "program.c", f"-I{lib}", f"-L{lib}", "-lmuws", f"-Wl,-rpath,{lib}", "-o", "program"]
    subprocess.run(command, cwd=folder, check=True)  # noqa: S603  our own code
    if not run:
        return ""
    return subprocess.run([folder / "program"], check=True, capture_output=True, text=True).stdout  # noqa: S603


class Reader:
    """An open file: the C functions, with exceptions in the place of codes."""

    def __init__(self, source: Path | bytes, max_bytes: int = MAX_BYTES) -> None:
        error, self._kept = Error(), source
        if isinstance(source, bytes):
            self._file = library().muws_open_memory(source, len(source), max_bytes, error)
        else:
            self._file = library().muws_open(os.fsencode(source), max_bytes, error)
        if not self._file:
            raise ReaderError(error)

    def close(self) -> None:
        library().muws_close(self._file)
        self._file = None

    @property
    def version(self) -> str:
        return library().muws_format_version(self._file).decode()

    @property
    def extra(self) -> bytes:
        n = ctypes.c_uint64()
        return ctypes.string_at(library().muws_extra(self._file, n), n.value)

    @property
    def peak_bytes(self) -> int:
        return library().muws_peak_bytes(self._file)

    def __len__(self) -> int:
        return library().muws_n_tensors(self._file)

    def tensor(self, index: int) -> Tensor:
        found, error = Tensor(), Error()
        if library().muws_tensor(self._file, index, found, error):
            raise ReaderError(error)
        return found

    def name(self, index: int) -> str:
        found = self.tensor(index)
        return ctypes.string_at(found.name, found.name_bytes).decode("utf-8", "surrogatepass")

    def shape(self, index: int) -> tuple[int, ...]:
        found = self.tensor(index)
        return tuple(found.shape[: found.n_axes])

    def find(self, name: str) -> int:
        return library().muws_find(self._file, name.encode("utf-8", "surrogatepass"))

    def decode(self, index: int, how: int = OWN, n_bytes: int | None = None) -> bytes:
        """Return the bytes of a tensor; ``n_bytes`` is the memory that is given, by default as much as is needed."""
        found = self.tensor(index)
        if n_bytes is None:
            n_bytes = 4 * found.numel if how == FLOAT32 else found.n_bytes
        out, error = np.empty(n_bytes // 8 + 1, np.uint64), Error()
        if library().muws_decode(self._file, index, how, out.ctypes.data, n_bytes, error):
            raise ReaderError(error)
        return out.view(np.uint8)[:n_bytes].tobytes()

    def verify(self) -> None:
        error = Error()
        if library().muws_verify(self._file, error):
            raise ReaderError(error)

    def stored_bytes(self) -> list[float]:
        out, error = np.empty(len(self)), Error()
        if library().muws_stored_bytes(self._file, out.ctypes.data, len(out), error):
            raise ReaderError(error)
        return out.tolist()

    def pack(self, index: int, form: int = VALUES) -> "Packed":
        error = Error()
        packed = library().muws_pack(self._file, index, form, error)
        if not packed:
            raise ReaderError(error)
        return Packed(packed)


class Packed:
    """A packed weight; it is freed with the object."""

    def __init__(self, address: int) -> None:
        self.address, self.info = address, BlocksInfo()
        library().muws_packed(address, self.info)

    def __del__(self) -> None:
        library().muws_free_packed(self.address)

    def dense(self) -> np.ndarray:
        """Return the matrix that the packed blocks make, ``(outputs, inputs)`` float32."""
        info = self.info
        rows, cols = (info.values.rows, info.values.cols) if info.values.n_blocks else (1, 1)
        found = np.zeros((info.outputs + 16, info.inputs), np.float32)
        for first, at, k in places(info.values):
            block = np.ctypeslib.as_array(info.weights, (info.values.n_blocks, cols, rows))[k]
            found[first : first + rows, at : at + cols] = block.T
        for first, at, k in places(info.signs):
            rows, cols = info.signs.rows, info.signs.cols
            n, wide = rows * cols // 8, min(8, cols)
            bits = np.unpackbits(
                np.ctypeslib.as_array(info.minus, (info.signs.n_blocks, n))[k], bitorder="little"
            ).reshape(cols // wide, rows, wide)
            signs = 1 - 2 * bits.transpose(1, 0, 2).reshape(rows, cols).astype(np.float32)
            assert not found[first : first + rows, at : at + cols].any()
            found[first : first + rows, at : at + cols] = info.magnitudes[k] * signs
        assert not found[info.outputs :].any()
        return found[: info.outputs]

    def conv2d(
        self,
        x: np.ndarray,
        shape: Conv2d,
        out: tuple[int, ...],
        bias: np.ndarray | None = None,
        *,
        relu: bool = False,
    ) -> np.ndarray:
        y, error = np.full(out, np.nan, np.float32), Error()
        b = None if bias is None else bias.ctypes.data
        if library().muws_conv2d(self.address, shape, x.ctypes.data, y.ctypes.data, y.size, b, relu, error):
            raise ReaderError(error)
        return y

    def linear(
        self,
        x: np.ndarray,
        bias: np.ndarray | None = None,
        *,
        relu: bool = False,
        widths: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Return ``x W^T + bias``; ``widths`` are the inputs and outputs that are given, by default the layer's."""
        n_in, n_out = widths or (self.info.inputs, self.info.outputs)
        y, error = np.full((len(x), self.info.outputs), np.nan, np.float32), Error()
        b = None if bias is None else bias.ctypes.data
        if library().muws_linear(self.address, x.ctypes.data, n_in, y.ctypes.data, n_out, len(x), b, relu, error):
            raise ReaderError(error)
        return y


def places(blocks: BlockList) -> Iterator[tuple[int, int, int]]:
    """Yield the first row and column of each block, and its number."""
    for b in range(blocks.row_blocks):
        for k in range(blocks.starts[b], blocks.starts[b + 1]):
            yield b * blocks.rows, blocks.columns[k], k


@contextmanager
def opened(source: Path | bytes, max_bytes: int = MAX_BYTES) -> Iterator[Reader]:
    """Open a file, and close it."""
    reader = Reader(source, max_bytes)
    try:
        yield reader
    finally:
        reader.close()
