"""rANS, an interleaved range coder with static tables, vectorised over its lanes. Imports no torch.

Source: Duda 2013, arXiv:1311.2540; interleaved as in Giesen 2014, arXiv:1402.3392.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_muws.artifact import native
from lightning_muws.artifact.entropy import Bytes, Ints
from lightning_muws.artifact.stretches import POINT, counts, merged
from lightning_muws.artifact.varint import Cursor, number
from lightning_muws.errors import FormatError

Floats = NDArray[np.float64]
Frequencies = tuple[list[int], list[int]]  # the symbols that occur, in order, and how often
Words = NDArray[np.uint16]

TABLE_BITS = 12
TOTAL = 1 << TABLE_BITS  # what the frequencies of a table sum to
LOW = 1 << 16  # states are in [LOW, LOW << 16); words are of 16 bits
SYMBOLS_A_LANE = 2048
MAX_LANES = 8192
MAX_STRETCHES = 256  # that are looked at
MAX_TABLES = 1024  # in a stream: a table takes more memory than bytes
FEW_LANES = 20  # a step over all lanes takes numpy as long as so many symbols one by one
FEW_SYMBOLS = 128  # and a table as long as so many
STRETCH = 1 << 12  # symbols, the fewest that may have a separate table
AT_A_TIME = 1 << 17  # symbols whose table entries are looked up together


def encode(data: Bytes, size: float) -> bytes | None:
    """Return tables, states and words; None where the tables and the entropy alone would not fit below ``size`` bytes.

    Args:
        data: ``(n,)`` uint8.
        size: In bytes.
    """
    stretches, cost = _stretches(data)
    return _encode(data, stretches) if cost < size else None


def n_lanes(n: int) -> int:
    """Return over how many lanes ``n`` symbols are spread: symbol i is in lane ``i % n_lanes``."""
    return max(1, min(MAX_LANES, n // SYMBOLS_A_LANE))


def _frequencies(counts: Ints) -> Ints:
    """Return ``(256,)`` frequencies that sum to TOTAL, at least 1 for each symbol that occurs."""
    f = np.where(counts > 0, np.maximum(1, np.floor(counts * (TOTAL / counts.sum()))), 0).astype(np.int64)
    excess = int(f.sum()) - TOTAL
    # one more or one less where it costs least: a symbol that occurs c times takes c * log2(TOTAL / f) bits
    change = -1 if excess > 0 else 1
    costs = _cost_of_change(counts, f, change)
    for _ in range(abs(excess)):
        at = int(np.argmin(costs))
        f[at] += change
        costs[at : at + 1] = _cost_of_change(counts[at : at + 1], f[at : at + 1], change)
    return f


def _cost_of_change(counts: Ints, f: Ints, change: int) -> Floats:
    """Return how many bits more symbols take if their frequency changes by 1; infinity where it may not."""
    if change < 0:
        return np.where(f > 1, counts * np.log2(np.maximum(f, 2) / np.maximum(f - 1, 1)), np.inf)
    return np.where(f > 0, -(counts * np.log2((f + 1) / np.maximum(f, 1))), np.inf)


def _stretches(data: Bytes) -> tuple[list[tuple[int, Ints]], float]:
    """Return how many steps each table holds for and the counts of its symbols, and about how many bytes all take.

    A stream runs over many tensors, and what is frequent changes from one to the next.
    """
    lanes = n_lanes(len(data))
    steps = max(1, max(STRETCH, len(data) // MAX_STRETCHES) // lanes)
    firsts, tables, cost = merged(counts(data, steps * lanes))
    lengths = np.diff(firsts * steps, append=-(-len(data) // lanes)).tolist()
    return list(zip(lengths, tables, strict=True)), cost / (8 << POINT)


def _encode(data: Bytes, stretches: list[tuple[int, Ints]]) -> bytes:
    """Return tables, states and words; symbols are coded last to first, so that they are decoded first to last."""
    lanes, tables = n_lanes(len(data)), [_frequencies(counts) for _, counts in stretches]
    is_native = native.level() is not None
    x: NDArray[Any] = np.full(lanes, LOW, np.uint32 if is_native else np.float64)
    stop = sum(steps for steps, _ in stretches)
    words: list[bytes] = []
    for (steps, _), f in zip(reversed(stretches), reversed(tables), strict=True):
        for top in range(stop, stop - steps, -max(1, AT_A_TIME // lanes)):
            bottom = max(stop - steps, top - max(1, AT_A_TIME // lanes))
            symbols = data[bottom * lanes : top * lanes]
            missing = (top - bottom) * lanes - len(symbols)
            filled = np.append(symbols, np.full(missing, np.argmax(f), np.uint8)) if missing else symbols
            if is_native:
                words.append(native.rans_encode(f, filled.reshape(-1, lanes), x))
            else:
                x = _encode_steps(filled.reshape(-1, lanes), f, x, words)
        stop -= steps
    head = number(len(tables)) + b"".join(number(steps) for steps, _ in stretches[:-1])
    return b"".join([head, *map(_table, tables), x.astype("<u4").tobytes(), *words[::-1]])


def _encode_steps(symbols: Bytes, f: Ints, x: Floats, words: list[bytes]) -> Floats:
    """Return the states after some steps ``(steps, lanes)``, last one first; append the words they gave off."""
    # Floats hold states below 2**32 exactly, and floor((x + 0.5) / f) is x // f without an integer division.
    start, inverse = (np.cumsum(f) - f).astype(np.float64), 1 / np.maximum(f, 1)
    fs, starts, inverses = f.astype(np.float64)[symbols], start[symbols], inverse[symbols]
    limits, halves, rests = fs * float(LOW << 16 >> TABLE_BITS), inverses * 0.5, TOTAL - fs
    for t in range(len(symbols) - 1, -1, -1):
        full = (x >= limits[t]).nonzero()[0]
        if len(full):
            states = x[full].astype(np.uint32)
            words.append(states.astype("<u2").tobytes())
            x[full] = states >> 16
        x += np.floor(x * inverses[t] + halves[t]) * rests[t] + starts[t]
    return x


def decode(coded: bytes, n: int) -> Bytes:
    """Return the ``n`` bytes from which :func:`encode` made ``coded``.

    The time is bounded by ``n`` and the length of ``coded``, whatever a file declares: numpy takes as long for a step
    over few lanes as for one over many, so few lanes are decoded one symbol at a time.

    Raises:
        FormatError: ``coded`` is not what it makes of ``n`` bytes.
    """
    lanes, head = n_lanes(n), _Head(coded)
    steps = -(-n // lanes)
    if native.level() is not None and (found := native.rans_decode(coded, steps, lanes)) is not None:
        return found.reshape(-1)[:n]
    stretches = head.stretches(steps)
    if len(coded) < head.at + 4 * lanes or (len(coded) - head.at) % 2:
        raise FormatError("a rans stream ends within its states")
    x = np.frombuffer(coded, "<u4", lanes, head.at).astype(np.int64)
    words = np.frombuffer(coded, "<u2", -1, head.at + 4 * lanes)
    is_few = lanes < FEW_LANES or n < FEW_SYMBOLS * len(stretches)
    out, x, read = (_decode_symbols if is_few else _decode_steps)(stretches, x, words)
    if read != len(words) or (x != LOW).any():
        raise FormatError("a rans stream does not end where it should")
    return out[:n]


def _decode_steps(stretches: list[tuple[int, Frequencies]], x: Ints, words: Words) -> tuple[Bytes, Ints, int]:
    """Return the symbols, the last states and how many words were read; all lanes take a step together."""
    out, read, done = np.empty((sum(steps for steps, _ in stretches), len(x)), np.uint8), 0, 0
    for n_steps, (symbols, frequencies) in stretches:
        f = np.array(frequencies)
        symbol = np.repeat(np.array(symbols, np.uint8), f)
        frequency = np.repeat(f, f)
        offset = np.arange(TOTAL) - np.repeat(np.cumsum(f) - f, f)
        for t in range(done, done + n_steps):
            slot = x & (TOTAL - 1)
            out[t] = symbol[slot]
            x >>= TABLE_BITS
            x *= frequency[slot]
            x += offset[slot]
            low = (x < LOW).nonzero()[0]
            if len(low):
                fresh = words[read : read + len(low)]
                if len(fresh) < len(low):
                    raise FormatError("a rans stream ends too early")
                x[low] = (x[low] << 16) | fresh
                read += len(low)
        done += n_steps
    return out.reshape(-1), x, read


def _decode_symbols(stretches: list[tuple[int, Frequencies]], x: Ints, words: Words) -> tuple[Bytes, Ints, int]:
    """Return what :func:`_decode_steps` does, from one symbol after the other."""
    states, left = x.tolist(), iter(words.tolist())
    out = bytearray()
    try:
        for n_steps, (symbols, frequencies) in stretches:
            starts = [0, *accumulate(frequencies[:-1])]
            table = list(zip(symbols, frequencies, starts, strict=True))
            for _ in range(n_steps):
                for lane, state in enumerate(states):
                    slot = state & (TOTAL - 1)
                    symbol, frequency, start = table[bisect_right(starts, slot) - 1]
                    state = frequency * (state >> TABLE_BITS) + slot - start
                    states[lane] = state if state >= LOW else state << 16 | next(left)
                    out.append(symbol)
    except StopIteration:
        raise FormatError("a rans stream ends too early") from None
    return np.frombuffer(bytes(out), np.uint8), np.array(states, np.int64), len(words) - sum(1 for _ in left)


def _table(f: Ints) -> bytes:
    """Return the first and the last symbol that occur, and the frequencies from one to the other."""
    found = np.flatnonzero(f)
    frequencies = f[found[0] : found[-1] + 1].tolist()
    return bytes([found[0], found[-1]]) + b"".join(map(number, frequencies))


class _Head(Cursor):
    """Reads what stands before the states: the number of tables, the steps of each but the last, and the tables."""

    def __init__(self, coded: bytes) -> None:
        super().__init__(coded, "the tables of rans")

    def stretches(self, steps: int) -> list[tuple[int, Frequencies]]:
        """Return the steps and the frequencies of each table."""
        n_tables = self.number()
        if not 1 <= n_tables <= min(steps, MAX_TABLES):
            raise FormatError(f"a rans stream of {steps} steps declares {n_tables} tables")
        lengths = [self.number() for _ in range(n_tables - 1)]
        lengths.append(steps - sum(lengths))
        if min(lengths) < 1:
            raise FormatError(f"the tables of a rans stream are not for its {steps} steps")
        return [(length, self._table()) for length in lengths]

    def _table(self) -> Frequencies:
        first, last = self.byte(), self.byte()
        found = {symbol: n for symbol in range(first, last + 1) if (n := self.number())}
        if (total := sum(found.values())) != TOTAL:
            raise FormatError(f"the frequencies of a rans stream sum to {total}, they have to sum to {TOTAL}")
        return list(found), list(found.values())
