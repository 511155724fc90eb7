"""The hot loops of a file in C++, where the package was built with a compiler: the same bytes as numpy. No torch.

Each function has a twin in numpy, which its callers use where :func:`level` is None and tests compare it with.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_muws.errors import FormatError, SettingError

Bytes = NDArray[np.uint8]
Array = NDArray[Any]

VERSION = 2  # MUWS_CODER_VERSION of coder.h
LEVELS = ("portable", "avx512")
SHORT, WRONG, LEFT = -1, -2, -3
LARGE = 4 << 20  # bytes of memory from which large pages pay


class _Costs(ctypes.Structure):
    """``MuwsCosts`` of coder.h, field by field."""

    _fields_: ClassVar = [("table", ctypes.c_int64), ("symbol", ctypes.c_int64), ("logs", ctypes.c_void_p)]


class _Blocks(ctypes.Structure):
    """``MuwsBlocks`` of coder.h, field by field."""

    _fields_: ClassVar = [
        *((name, ctypes.c_int64) for name in ("width", "down", "across", "rows", "cols", "stride")),
        ("patterns", ctypes.c_void_p),
    ]


class _Parts(ctypes.Structure):
    """``MuwsParts`` of coder.h, field by field."""

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("kinds", "signs", "magnitudes", "free")),
        *((name, ctypes.c_int64) for name in ("n_signs", "n_magnitudes", "n_free")),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled coder, or None if it was not built or belongs to another version."""
    path = Path(__file__).parent / "coder.so"
    if sys.byteorder != "little":
        return None
    try:
        found = _declared(ctypes.CDLL(str(path)))
    except (OSError, AttributeError):  # not built, for another machine, or without these functions
        return None
    return found if found.muws_coder_version() == VERSION else None


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the types of the functions of coder.h; raise AttributeError if one is missing."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, arguments, result in (
        ("muws_coder_version", [], number),
        ("muws_coder_level", [], number),
        ("muws_rans_decode", [number, pointer, number, number, number, pointer, pointer], number),
        ("muws_rans_encode", [number, pointer, pointer, number, number, pointer, pointer, number], number),
        ("muws_count", [pointer, number, number, pointer], None),
        ("muws_merge", [pointer, number, pointer, pointer, pointer], number),
        ("muws_crc32", [pointer, number], ctypes.c_uint32),
        ("muws_split_planes", [number, pointer, number, pointer, number], number),
        ("muws_join_planes", [number, pointer, number, pointer], number),
        ("muws_kinds", [pointer, pointer], number),
        ("muws_split_blocks", [pointer, pointer], number),
        ("muws_join_blocks", [pointer, pointer], number),
        ("muws_large_pages", [pointer, number], None),
    ):
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, result
    return found


@functools.cache
def _best() -> int | None:
    found = library()
    return None if found is None else int(found.muws_coder_level())


def level() -> int | None:
    """Return the place in LEVELS of what runs here, None without the library; ``MUWS_CODER`` selects another by name.

    Raises:
        SettingError: ``MUWS_CODER`` is no level of this machine and not ``none``.
    """
    best, wanted = _best(), os.environ.get("MUWS_CODER", "")
    if not wanted or best is None:
        return best
    if wanted == "none":
        return None
    here = LEVELS[: best + 1]
    if wanted not in here:
        raise SettingError(f"MUWS_CODER={wanted!r} is not allowed here: choose one of {', '.join(here)}, or none")
    return here.index(wanted)


def _library() -> ctypes.CDLL:
    """Return the library, which is present: callers looked at :func:`level`."""
    found = library()
    if found is None:
        raise RuntimeError("the native coder is not built")
    return found


def rans_decode(coded: bytes, steps: int, lanes: int) -> Bytes | None:
    """Return the symbols of a stream, ``(steps, lanes)``; None where its tables or states are not those of so many.

    Raises:
        FormatError: More words are needed, or the stream does not end where it should.
    """
    out, states = np.empty((steps, lanes), np.uint8), np.empty(lanes, np.uint32)
    found = _library().muws_rans_decode(
        level() or 0, coded, len(coded), steps, lanes, states.ctypes.data, out.ctypes.data
    )
    if found in (SHORT, LEFT):
        raise FormatError(f"a rans stream {'ends too early' if found == SHORT else 'does not end where it should'}")
    return out if found == 0 else None


def rans_encode(frequencies: Array, symbols: Bytes, states: NDArray[np.uint32]) -> bytes:
    """Encode steps with one table, the last one first: change the states, and return the words that they gave off.

    Args:
        frequencies: ``(256,)`` int64 that sum to 4096.
        symbols: ``(steps, lanes)``, contiguous, each of a frequency above 0.
        states: ``(lanes,)``.
    """
    table, symbols = np.ascontiguousarray(frequencies, np.int64), np.ascontiguousarray(symbols)
    words = np.empty(symbols.size + 1, np.uint16)
    n = _checked(
        _library().muws_rans_encode(
            level() or 0, table.ctypes.data, symbols.ctypes.data, *symbols.shape, states.ctypes.data,
            words.ctypes.data, len(words),
        )
    )  # fmt: skip
    return words[len(words) - n :].tobytes()


def count(data: Bytes, stretch: int) -> NDArray[np.int64]:
    """Return how often each byte occurs in every ``stretch`` bytes, ``(ceil(n / stretch), 256)``."""
    data = np.ascontiguousarray(data)
    counts = np.empty((-(-len(data) // stretch), 256), np.int64)
    _library().muws_count(data.ctypes.data, len(data), stretch, counts.ctypes.data)
    return counts


def merge(counts: NDArray[np.int64], costs: tuple[int, int, Array]) -> tuple[Array, Array, int]:
    """Return what :func:`lightning_muws.artifact.stretches.merged` does; changes ``counts``.

    Args:
        counts: ``(n, 256)``, contiguous.
        costs: Of a table, of a symbol in it, and ``(4097,)`` int64 logarithms.
    """
    firsts, total = np.empty(len(counts), np.int64), ctypes.c_int64()
    about = _Costs(costs[0], costs[1], costs[2].ctypes.data)
    n = _library().muws_merge(
        counts.ctypes.data, len(counts), ctypes.byref(about), firsts.ctypes.data, ctypes.byref(total)
    )
    return firsts[:n], counts[:n], total.value


def crc32(data: bytes) -> int:
    """Return the CRC-32 of bytes, as zlib does."""
    return zlib.crc32(data) if level() is None else int(_library().muws_crc32(data, len(data)))


def split_planes(values: Array) -> Bytes:
    """Return the bytes ``(width, n)`` of values ``(n,)`` that are turned left by one bit, the lowest byte first."""
    values = np.ascontiguousarray(values)
    planes = np.empty((values.itemsize, len(values)), np.uint8)
    found = _library().muws_split_planes(
        values.itemsize, values.ctypes.data, len(values), planes.ctypes.data, len(values)
    )
    _checked(found)
    return planes


def join_planes(planes: Sequence[Bytes], out: Array) -> None:
    """Undo :func:`split_planes` into ``out``, contiguous ``(n,)``; planes are contiguous ``(n,)``."""
    if len(planes) != out.itemsize or any(len(plane) != len(out) for plane in planes):
        raise ValueError(f"{len(planes)} planes do not make {len(out)} values of {out.itemsize} bytes")
    addresses = (ctypes.c_void_p * len(planes))(*(plane.ctypes.data for plane in planes))
    _checked(_library().muws_join_planes(out.itemsize, addresses, len(out), out.ctypes.data))


def kinds(u: Array, block_shape: tuple[int, int]) -> Bytes:
    """Return the kind of each block of a matrix of whole blocks, ``(down, across)``."""
    blocks = _blocks(u, block_shape)
    found = np.empty((blocks.down, blocks.across), np.uint8)
    _checked(_library().muws_kinds(ctypes.byref(blocks), found.ctypes.data))
    return found


def split_blocks(u: Array, block_shape: tuple[int, int]) -> tuple[Bytes, Bytes, Array, Array]:
    """Return the kinds, signs, magnitudes and free patterns of a matrix of whole blocks, each ``(n,)``."""
    blocks = _blocks(u, block_shape)
    n = blocks.down * blocks.across
    lists = np.empty(n, np.uint8), np.empty(u.size, np.uint8), np.empty(n, u.dtype), np.empty(u.size, u.dtype)
    parts = _Parts(*(one.ctypes.data for one in lists), u.size, n, u.size)
    _checked(_library().muws_split_blocks(ctypes.byref(blocks), ctypes.byref(parts)))
    found, signs, magnitudes, free = lists
    return found, signs[: parts.n_signs].copy(), magnitudes[: parts.n_magnitudes].copy(), free[: parts.n_free].copy()


def join_blocks(
    found: Bytes, signs: Array, magnitudes: Array, free: Array, out: Array, block_shape: tuple[int, int]
) -> None:
    """Undo :func:`split_blocks` into a matrix whose rows are contiguous."""
    blocks = _blocks(out, block_shape)
    lists = [np.ascontiguousarray(one) for one in (found, signs, magnitudes, free)]
    if len(found) != blocks.down * blocks.across or any(one.dtype != out.dtype for one in lists[2:]):
        raise ValueError(f"{len(found)} kinds are not those of {blocks.down} x {blocks.across} blocks of {out.dtype}")
    parts = _Parts(*(one.ctypes.data for one in lists), signs.size, magnitudes.size, free.size)
    _checked(_library().muws_join_blocks(ctypes.byref(parts), ctypes.byref(blocks)))


def _blocks(u: Array, block_shape: tuple[int, int]) -> _Blocks:
    (rows, cols), (n_rows, n_cols) = block_shape, u.shape
    if n_rows % rows or n_cols % cols or (u.size and u.strides[1] != u.itemsize):
        raise ValueError(
            f"a matrix of shape {u.shape} and strides {u.strides} is none of whole blocks of {block_shape}"
        )
    stride = u.strides[0] // u.itemsize if n_rows > 1 else n_cols
    return _Blocks(u.itemsize, n_rows // rows, n_cols // cols, rows, cols, stride, u.ctypes.data)


def large_pages(address: int, n_bytes: int) -> None:
    """Let the system back new memory by large pages, which take less time to fill."""
    if n_bytes >= LARGE and level() is not None:
        _library().muws_large_pages(address, n_bytes)


def _checked(result: int) -> int:
    """Return what a function returned; raise RuntimeError where it refused its arguments."""
    if result < 0:
        raise RuntimeError(f"the native coder refused its arguments ({result})")
    return int(result)
