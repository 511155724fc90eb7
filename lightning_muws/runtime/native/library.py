"""Finds and loads the compiled kernels. Knows the layout of what they are handed, and nothing of layers."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from pathlib import Path
from typing import ClassVar

import torch

from lightning_muws.errors import SettingError

LEVELS = ("avx512_bf16", "avx512", "avx2", "portable")  # "portable" is NEON on ARM: every 64-bit one has it
BFLOAT16_LEVEL = "avx512_bf16"  # the one that has a dot product of bfloat16
_POINTERS = ("starts", "columns", "logical", "weights", "bias")


class Layer(ctypes.Structure):
    """``MuwsLayer`` of api.h, field by field."""

    _fields_: ClassVar = [
        *((name, ctypes.c_int64) for name in ("n", "c", "h", "w", "o", "oh", "ow")),
        *((name, ctypes.c_int64) for name in ("kh", "kw", "sh", "sw", "ph", "pw", "groups")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "row_blocks", "n_logical")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
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


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where they were not built or are another version's."""
    for path in sorted(Path(__file__).parent.glob("kernels*.so")):
        try:
            found = ctypes.CDLL(str(path))
            found.muws_layout.argtypes, found.muws_layout.restype = [ctypes.c_int64], ctypes.c_int64
        except (OSError, AttributeError):  # built for another machine, or no library of ours
            continue
        if (found.muws_layout(0), found.muws_layout(1)) == (ctypes.sizeof(Layer), ctypes.sizeof(Signs)):
            return _declared(found)
    return None


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, arguments, result in (
        ("muws_level", [ctypes.c_char_p], pointer),
        ("muws_plan", [pointer, pointer], pointer),
        ("muws_run", [pointer, pointer, pointer, pointer, pointer, number], ctypes.c_int),
        ("muws_free_plan", [pointer, pointer], None),
        ("muws_gemv", [pointer, pointer, pointer, pointer, number], None),
        ("muws_signs", [pointer, pointer, pointer, pointer, number], None),
    ):
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, result
    with contextlib.suppress(OSError, AttributeError):  # torch is not linked with an OpenMP that has it
        openmp = ctypes.CDLL(torch._C.__file__)
        team = openmp.GOMP_parallel, openmp.omp_get_thread_num, openmp.omp_get_num_threads
        found.muws_use_team.argtypes = [pointer] * 3
        found.muws_use_team(*(ctypes.cast(function, pointer) for function in team))
    return found


def levels() -> tuple[str, ...]:
    """Return the sets of instructions that are compiled in and that this CPU has, the best first."""
    found = library()
    return tuple(name for name in LEVELS if found is not None and found.muws_level(name.encode()))


def level() -> str | None:
    """Return the set of instructions in use, None for no native kernels; ``MUWS_LEVEL`` chooses one by name.

    Raises:
        SettingError: If ``MUWS_LEVEL`` is none of this machine's levels and not ``none``.
    """
    wanted = os.environ.get("MUWS_LEVEL", "")
    if wanted == "none":
        return None
    there = levels()
    if wanted and there and wanted not in there:
        raise SettingError(f"MUWS_LEVEL={wanted!r} is not allowed here: choose one of {', '.join(there)}, or none")
    return wanted if wanted in there else next(iter(there), None)


@functools.cache
def handle(name: str) -> tuple[ctypes.CDLL, int]:
    """Return the library and the address of a level that :func:`levels` names."""
    found = library()
    address = found.muws_level(name.encode()) if found is not None else None
    if found is None or not address:
        raise SettingError(f"level {name!r} is not allowed here: choose one of {', '.join(levels()) or 'none'}")
    return found, int(address)
