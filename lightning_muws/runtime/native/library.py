"""Finds and loads the compiled kernels. Knows the structures that cross the C interface, and nothing of layers."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from pathlib import Path
from typing import ClassVar

import torch

from lightning_muws.errors import SettingError

BFLOAT16_LEVEL = "avx512_bf16"  # the one that has a dot product of bfloat16


class Layer(ctypes.Structure):
    """``MuwsLayer`` of api.h, field by field."""

    _fields_: ClassVar = [
        *((name, ctypes.c_int64) for name in ("n", "c", "h", "w", "o", "oh", "ow")),
        *((name, ctypes.c_int64) for name in ("kh", "kw", "sh", "sw", "ph", "pw", "groups")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "row_blocks", "n_logical")),
        *((name, ctypes.c_void_p) for name in ("starts", "columns", "logical", "weights", "bias")),
        *((name, ctypes.c_int64) for name in ("relu", "bfloat16", "batch_last_in", "batch_last_out", "batch_lanes")),
        ("threads", ctypes.c_int64),
    ]


class Signs(ctypes.Structure):
    """``MuwsSigns`` of api.h, field by field."""

    _fields_: ClassVar = [
        *((name, ctypes.c_int64) for name in ("o", "rows", "cols", "row_blocks")),
        *((name, ctypes.c_void_p) for name in ("starts", "columns", "magnitudes", "minus")),
        ("relu", ctypes.c_int64),
    ]


class Int8(ctypes.Structure):
    """``MuwsInt8`` of api.h, field by field."""

    _fields_: ClassVar = [
        *((name, ctypes.c_int64) for name in ("n", "c", "h", "w", "o", "oh", "ow")),
        *((name, ctypes.c_int64) for name in ("kh", "kw", "sh", "sw", "ph", "pw", "groups")),
        *((name, ctypes.c_int64) for name in ("rows", "row_blocks", "loose", "linear", "dynamic")),
        *((name, ctypes.c_void_p) for name in ("starts", "columns", "weights", "sums", "scales", "bias")),
        ("relu", ctypes.c_int64),
        ("activation", ctypes.c_void_p),
        ("bytes_in", ctypes.c_int64),
        ("next", ctypes.c_void_p),
    ]


class Step(ctypes.Structure):
    """``MuwsStep`` of api.h, field by field."""

    _fields_: ClassVar = [
        ("kind", ctypes.c_int64),
        ("layer", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("x", "onto", "y", "q", "rows", "width", "relu", "more")),
        *((name, ctypes.c_void_p) for name in ("next", "bias")),
        ("number", ctypes.c_double),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None if they were not built or belong to another version."""
    for path in sorted(Path(__file__).parent.glob("kernels*.so")):
        try:
            found = _declared(ctypes.CDLL(str(path)))
        except (OSError, AttributeError):  # built for another machine, or not with these functions
            continue
        if [found.muws_layout(i) for i in range(4)] == [ctypes.sizeof(kind) for kind in (Layer, Signs, Int8, Step)]:
            _share_threads(found)
            return found
    return None


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the types of the functions of api.cpp; raise AttributeError if one is missing."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, arguments, result in (
        ("muws_layout", [number], number),
        ("muws_nth_level", [number], pointer),
        ("muws_level_name", [pointer], ctypes.c_char_p),
        ("muws_plan", [pointer, pointer], pointer),
        ("muws_run", [pointer, pointer, pointer, pointer, pointer, number], ctypes.c_int),
        ("muws_free_plan", [pointer, pointer], None),
        ("muws_gemv", [pointer, pointer, pointer, pointer, number], None),
        ("muws_signs", [pointer, pointer, pointer, pointer, number], None),
        ("muws_int8", [pointer, pointer, pointer, pointer, pointer, number], None),
        ("muws_program", [pointer, pointer, number, pointer, pointer, number], ctypes.c_int),
        ("muws_use_team", [pointer, pointer, pointer], None),
    ):
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, result
    return found


def _share_threads(found: ctypes.CDLL) -> None:
    """Let the kernels run on the threads of torch's OpenMP; without it they start their own."""
    with contextlib.suppress(OSError, AttributeError):  # torch is not linked with an OpenMP that has these
        openmp = ctypes.CDLL(torch._C.__file__)
        team = openmp.GOMP_parallel, openmp.omp_get_thread_num, openmp.omp_get_num_threads
        found.muws_use_team(*(ctypes.cast(function, ctypes.c_void_p) for function in team))


@functools.cache
def _addresses() -> dict[str, int]:
    """Return the address of each level that this CPU can run, by name, the best first."""
    found = library()
    addresses: dict[str, int] = {}
    while found is not None and (address := found.muws_nth_level(len(addresses))):
        addresses[found.muws_level_name(address).decode()] = int(address)
    return addresses


def levels() -> tuple[str, ...]:
    """Return the instruction sets (``avx512``, ...) that are compiled in and that this CPU has, the best first."""
    return tuple(_addresses())


def level() -> str | None:
    """Return the instruction set in use, or None without native kernels; ``MUWS_LEVEL`` selects another by name.

    Raises:
        SettingError: ``MUWS_LEVEL`` is none of this machine's levels and not ``none``.
    """
    wanted, present = os.environ.get("MUWS_LEVEL", ""), _addresses()
    if wanted == "none" or not present:
        return None
    if wanted and wanted not in present:
        raise SettingError(f"MUWS_LEVEL={wanted!r} is not allowed here: choose one of {', '.join(present)}, or none")
    return wanted or next(iter(present))


def handle(name: str) -> tuple[ctypes.CDLL, int]:
    """Return the library and the address of one of its :func:`levels`.

    Raises:
        SettingError: This machine does not have the level.
    """
    found, addresses = library(), _addresses()
    if found is None or name not in addresses:
        raise SettingError(f"level {name!r} is not allowed here: choose one of {', '.join(addresses) or 'none'}")
    return found, addresses[name]
