"""Filters: each turns the bytes of a stream into bytes that a coder makes smaller, and back. Imports no torch.

A new filter is one row of :data:`FILTERS`. A file stores the names of the filters before that of the coder.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_muws.artifact.entropy import Bytes, entropy_bytes
from lightning_muws.artifact.varint import END
from lightning_muws.errors import FormatError

WINDOW, WINDOWS = 1 << 13, 8  # bytes of a sample, and how many samples of a stream
SAMPLE = WINDOW * WINDOWS  # bytes from which to judge a longer stream
PAYS = 0.9  # a filter is tried if it makes the entropy of a sample smaller than this share
FEW = 64  # bytes of a row from which numpy adds rows faster one after the other than all at once

Numbers = tuple[int, ...]


class Filter(NamedTuple):
    """One row of the table.

    Args:
        n_numbers: How many numbers the coded stream begins with, for the reader.
        apply: Takes ``(n,)`` uint8 and the bytes of a row of the tensor, 0 if that is unknown. Returns the numbers and
            the filtered bytes; None where the filter does not pay.
        length: Takes ``n`` and the numbers. Returns how many filtered bytes there are; raises FormatError where the
            numbers are not allowed.
        undo: Takes the filtered bytes, ``n`` and the numbers, which ``length`` took. Returns ``(n,)`` uint8; raises
            FormatError where the filter makes no such bytes.
    """

    n_numbers: int
    apply: Callable[[Bytes, int], tuple[Numbers, Bytes] | None]
    length: Callable[[int, Numbers], int]
    undo: Callable[[Bytes, int, Numbers], Bytes]


def windows(data: Bytes) -> Bytes:
    """Return ``(WINDOWS, WINDOW)`` bytes, spread over longer data from its beginning to its end."""
    starts = [(len(data) - WINDOW) * i // (WINDOWS - 1) for i in range(WINDOWS)]
    return np.stack([data[start : start + WINDOW] for start in starts])


# ---- repeat


def _repeated(data: Bytes, row: int) -> tuple[Numbers, Bytes] | None:
    """Return the first row of each group of equal rows, and of these the first of each group of equal columns."""
    if not row or row >= END or len(data) % row:
        return None
    x = data.reshape(-1, row)
    rows = _period(x[1:] != x[:-1], axis=1) if len(x) > 1 and np.array_equal(x[0], x[1]) else 1
    x = x[::rows]
    cols = _period(x[:, 1:] != x[:, :-1], axis=0) if row > 1 and np.array_equal(x[:64, 0], x[:64, 1]) else 1
    if rows * cols == 1 or rows >= END:
        return None
    return (row, rows, cols), np.ascontiguousarray(x[:, ::cols]).reshape(-1)


def _period(differ: NDArray[np.bool_], axis: int) -> int:
    """Return the largest distance whose multiples are all places where neighbours differ, counted from 1."""
    places = (np.flatnonzero(differ.any(axis)) + 1).tolist()
    return gcd(*places) if places else differ.shape[1 - axis] + 1


def _repeat_length(n: int, numbers: Numbers) -> int:
    row, rows, cols = numbers
    if not row or n % row or not 1 <= rows <= n // row or not 1 <= cols <= row:
        raise FormatError(f"{n} bytes cannot repeat {rows} rows of {row} and {cols} columns")
    return -(-(n // row) // rows) * -(-row // cols)


def _repeat(data: Bytes, n: int, numbers: Numbers) -> Bytes:
    row, rows, cols = numbers
    narrow = data.reshape(-1, -(-row // cols))
    wide = narrow if cols == 1 else np.empty((len(narrow), row), np.uint8)
    if cols > 1:
        _spread(narrow.T, cols, wide.T)
    out = wide if rows == 1 else np.empty((n // row, row), np.uint8)
    if rows > 1:
        _spread(wide, rows, out)
    return out.reshape(-1)


def _spread(few: Bytes, times: int, out: Bytes) -> None:
    """Write each row so many times, the last one until ``out`` is full; in few steps, without memory for more."""
    whole = len(out) // times
    if times < whole:
        for i in range(times):
            out[i : whole * times : times] = few[:whole]
    else:
        for i in range(whole):
            out[i * times : (i + 1) * times] = few[i]
    out[whole * times :] = few[whole:]


# ---- xor and delta


def _delta(data: Bytes, row: int) -> tuple[Numbers, Bytes] | None:
    """Return each byte less the one before it, modulo 256; None if that does not pay on a sample."""
    sample = windows(data) if len(data) > SAMPLE else data[None]
    plain, filtered = (sum(map(_entropy, rows)) for rows in (sample, np.diff(sample, axis=1)))
    return ((), np.diff(data, prepend=np.zeros(1, np.uint8))) if filtered < PAYS * plain else None


def _sum(data: Bytes, n: int, numbers: Numbers) -> Bytes:
    return np.cumsum(data, dtype=np.uint8)


def _xor(data: Bytes, row: int) -> tuple[Numbers, Bytes] | None:
    """Return each byte XOR the one before it, above it or to its upper left, whichever pays most on a sample."""
    if not row:
        return None
    least, distance = PAYS, 0
    for lag in (1, row, row + 1):
        if lag >= min(len(data), END):  # a piece may be shorter than a row
            continue
        later, earlier = data[lag:], data[:-lag]
        if len(later) > SAMPLE:
            later, earlier = windows(later), windows(earlier)
        share = (_entropy(later ^ earlier) + 1) / (_entropy(later) + 1)
        if share < least:
            least, distance = share, lag
    if not distance:
        return None
    found = data.copy()
    found[distance:] ^= data[:-distance]
    return (distance,), found


def _xor_length(n: int, numbers: Numbers) -> int:
    if not 1 <= numbers[0] < n:
        raise FormatError(f"{n} bytes are XOR those {numbers[0]} places before, which is no distance within them")
    return n


def _unxor(data: Bytes, n: int, numbers: Numbers) -> Bytes:
    (lag,), out = numbers, data.copy()
    rows = out[: n // lag * lag].reshape(-1, lag)
    if lag < FEW:
        np.bitwise_xor.accumulate(rows, axis=0, out=rows)
    else:
        for i in range(1, len(rows)):
            rows[i] ^= rows[i - 1]
    out[rows.size :] ^= rows[-1, : n - rows.size]
    return out


def _entropy(data: Bytes) -> float:
    return entropy_bytes(np.bincount(data.reshape(-1), minlength=1))


# ---- bits


def _bits(data: Bytes, row: int) -> tuple[Numbers, Bytes] | None:
    """Return eight bytes that are 0 or 1 as one, the first one in the lowest bit; None if there are others."""
    return ((), np.packbits(data, bitorder="little")) if len(data) and data.max() <= 1 else None


def _bytes(data: Bytes, n: int, numbers: Numbers) -> Bytes:
    if n % 8 and data[-1] >> n % 8:
        raise FormatError("the last bits of a stream are followed by others than zeros")
    return np.unpackbits(data, count=n, bitorder="little")


# In the order in which they are applied.
FILTERS: dict[str, Filter] = {
    "repeat": Filter(3, _repeated, _repeat_length, _repeat),
    "xor": Filter(1, _xor, _xor_length, _unxor),
    "delta": Filter(0, _delta, lambda n, numbers: n, _sum),
    "bits": Filter(0, _bits, lambda n, numbers: -(-n // 8), _bytes),
}


class Filtered(NamedTuple):
    """Filtered bytes.

    Args:
        names: The filters, in the order in which they were applied.
        numbers: Those of all filters.
        data: ``(n,)`` uint8.
    """

    names: tuple[str, ...]
    numbers: Numbers
    data: Bytes

    def then(self, name: str, row: int) -> Filtered | None:
        """Return what another filter makes of it; None where it does not pay."""
        found = FILTERS[name].apply(self.data, row)
        return found and Filtered((*self.names, name), self.numbers + found[0], found[1])


def candidates(data: Bytes, row: int) -> list[Filtered]:
    """Return the bytes after each choice of filters that may pay.

    Args:
        data: ``(n,)`` uint8.
        row: The bytes of a row of the tensor that they are of; 0 if that is unknown.
    """
    first = Filtered((), (), data)
    if not len(data):
        return []
    if repeated := first.then("repeat", row):
        first, row = repeated, -(-row // repeated.numbers[2])
    xored = first.then("xor", row)
    found = [one for one in (first, xored) if one]
    found += [one for one in [one.then("delta", row) for one in found] if one]
    found = [one.then("bits", row) or one for one in found]
    return [one for one in found if one.names]
