"""Entropy coder: bytes to fewer bytes and back. Knows nothing of weights.

Three coders, by name: ``raw`` (as it is), ``zlib``, and ``rans``, an interleaved range coder with static tables
(Duda 2013, arXiv:1311.2540; interleaved as in Giesen 2014, arXiv:1402.3392), vectorised over its lanes.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_muws.errors import FormatError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TABLE_BITS = 12
TOTAL = 1 << TABLE_BITS  # what the frequencies of a table sum to
LOW = 1 << 16  # states are in [LOW, LOW << 16); words are of 16 bits
SYMBOLS_A_LANE = 2048
MAX_LANES = 8192
SAMPLE = 1 << 16  # bytes by which zlib is judged on a longer stream
WORTH = 0.999  # coding has to save this much, or the stream stays raw
MAX_STRETCHES = 256  # that are looked at
MAX_TABLES = 1024  # in a stream: a table takes more memory than bytes
STRETCH = 1 << 12  # symbols, the fewest that may have a table of their own
AT_A_TIME = 1 << 17  # symbols whose table entries are looked up together


def encode(data: Bytes) -> tuple[str, bytes]:
    """Return the name of the coder that makes these bytes smallest, and what it made of them.

    Args:
        data: ``(n,)`` uint8.
    """
    best, coder, coded = WORTH * len(data), "raw", b""
    if len(data) <= SAMPLE or _repeats(data):
        packed = zlib.compress(data.tobytes(), 9 if len(data) <= SAMPLE else 6)
        if len(packed) < best:
            best, coder, coded = len(packed), "zlib", packed
    stretches = _stretches(data)
    if sum(_cost(counts) for _, counts in stretches) < best:
        packed = _rans_encode(data, stretches)
        if len(packed) < best:
            coder, coded = "rans", packed
    return (coder, coded) if coder != "raw" else (coder, data.tobytes())


def decode(coder: str, coded: bytes, n: int) -> Bytes:
    """Return the ``n`` bytes that :func:`encode` was given; never takes more memory than they need.

    Raises:
        FormatError: These bytes are not what that coder makes of ``n`` bytes, or there is no such coder.
    """
    if coder == "raw":
        data = np.frombuffer(coded, np.uint8)
    elif coder == "zlib":
        data = np.frombuffer(inflate(coded, n), np.uint8)
    elif coder == "rans":
        data = _rans_decode(coded, n)
    else:
        raise FormatError(f"coder {coder!r} is not known to this reader, which has raw, zlib and rans: update it")
    if len(data) != n:
        raise FormatError(f"a stream of {len(data)} bytes was found where {n} are needed")
    return data


def inflate(coded: bytes, n: int) -> bytes:
    """Return the ``n`` bytes of a zlib stream, and stop before a stream that holds more takes any memory.

    Raises:
        FormatError: It is no zlib stream of ``n`` bytes.
    """
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(coded, n + 1)
    except zlib.error as error:
        raise FormatError(f"a zlib stream is broken: {error}") from None
    if len(data) != n or not stream.eof or stream.unused_data or stream.unconsumed_tail:
        raise FormatError(f"a zlib stream does not hold the {n} bytes that are needed")
    return data


def count(data: Bytes) -> Ints:
    """Return ``(256,)`` how often each byte occurs; in parts, as bincount takes eight times the memory of its input."""
    parts = (data[start : start + AT_A_TIME] for start in range(0, len(data), AT_A_TIME))
    return sum((np.bincount(part, minlength=256) for part in parts), np.zeros(256, np.int64))


def entropy_bytes(counts: NDArray[Any]) -> float:
    """Return the order-0 entropy, in bytes, of a stream whose symbols occur so often."""
    p = counts[counts > 0].astype(np.float64)
    return float((p * np.log2(p.sum() / p)).sum() / 8) if len(p) else 0.0


def _repeats(data: Bytes) -> bool:
    """Return whether zlib finds more in a sample from the middle than the frequencies of its bytes tell."""
    start = (len(data) - SAMPLE) // 2
    sample = data[start : start + SAMPLE]
    return len(zlib.compress(sample.tobytes(), 6)) < 0.9 * min(entropy_bytes(np.bincount(sample)), WORTH * SAMPLE)


def n_lanes(n: int) -> int:
    """Return over how many lanes ``n`` symbols are spread: symbol i is in lane ``i % n_lanes``."""
    return max(1, min(MAX_LANES, n // SYMBOLS_A_LANE))


def _frequencies(counts: Ints) -> Ints:
    """Return ``(256,)`` frequencies that sum to TOTAL, at least 1 for each symbol that occurs."""
    f = np.where(counts > 0, np.maximum(1, np.floor(counts * (TOTAL / counts.sum()))), 0).astype(np.int64)
    while excess := int(f.sum()) - TOTAL:
        # one more or one less where it costs least: a symbol that occurs c times takes c * log2(TOTAL / f) bits
        if excess > 0:
            f[np.argmin(np.where(f > 1, counts * np.log2(np.maximum(f, 2) / np.maximum(f - 1, 1)), np.inf))] -= 1
        else:
            f[np.argmax(np.where(f > 0, counts * np.log2((f + 1) / np.maximum(f, 1)), -1.0))] += 1
    return f


def _stretches(data: Bytes) -> list[tuple[int, Ints]]:
    """Return how many steps each table holds for, and the counts of its symbols: a new one wherever it pays.

    A stream runs over many tensors, and what is frequent changes from one to the next.
    """
    lanes = n_lanes(len(data))
    steps = max(1, max(STRETCH, len(data) // MAX_STRETCHES) // lanes)
    found: list[tuple[int, Ints]] = []
    cost = 0.0  # of the last one
    for start in range(0, len(data), steps * lanes):
        part = data[start : start + steps * lanes]
        n, counts = -(-len(part) // lanes), np.bincount(part, minlength=256)
        apart, together = _cost(counts), _cost(found[-1][1] + counts) if found else 0.0
        if found and together <= cost + apart:
            found[-1], cost = (found[-1][0] + n, found[-1][1] + counts), together
        else:
            found.append((n, counts))
            cost = apart
    return found


def _cost(counts: Ints) -> float:
    """Return about how many bytes symbols take with a table of their own."""
    there = np.flatnonzero(counts)
    return entropy_bytes(counts) + 1.2 * float(there[-1] - there[0] + 1) + 4 if len(there) else 0.0


def _rans_encode(data: Bytes, stretches: list[tuple[int, Ints]]) -> bytes:
    """Return tables, states and words; symbols are coded last to first, so that they are decoded first to last."""
    lanes, tables = n_lanes(len(data)), [_frequencies(counts) for _, counts in stretches]
    x, stop = np.full(lanes, float(LOW)), sum(steps for steps, _ in stretches)
    words: list[bytes] = []
    for (steps, _), f in zip(reversed(stretches), reversed(tables), strict=True):
        for top in range(stop, stop - steps, -max(1, AT_A_TIME // lanes)):
            bottom = max(stop - steps, top - max(1, AT_A_TIME // lanes))
            symbols = data[bottom * lanes : top * lanes]
            filled = np.full((top - bottom) * lanes, np.argmax(f), np.uint8)
            filled[: len(symbols)] = symbols
            x = _encode_steps(filled.reshape(-1, lanes), f, x, words)
        stop -= steps
    head = _number(len(tables)) + b"".join(_number(steps) for steps, _ in stretches[:-1])
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


def _rans_decode(coded: bytes, n: int) -> Bytes:
    lanes, head = n_lanes(n), _Head(coded)
    steps = -(-n // lanes)
    stretches = head.stretches(steps)
    if len(coded) < head.at + 4 * lanes or (len(coded) - head.at) % 2:
        raise FormatError("a rans stream ends within its states")
    x = np.frombuffer(coded, "<u4", lanes, head.at).astype(np.int64)
    words = np.frombuffer(coded, "<u2", -1, head.at + 4 * lanes)
    out, read, done = np.empty((steps, lanes), np.uint8), 0, 0
    for n_steps, f in stretches:
        symbol = np.repeat(np.arange(256, dtype=np.uint8), f)
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
    if read != len(words) or (x != LOW).any():
        raise FormatError("a rans stream does not end where it should")
    return out.reshape(-1)[:n]


def _number(value: int) -> bytes:
    """Return a number, 7 bits a byte, the lowest first, the top bit set in all bytes but the last."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _table(f: Ints) -> bytes:
    """Return the first and the last symbol that occur, and the frequencies from one to the other."""
    found = np.flatnonzero(f)
    frequencies = f[found[0] : found[-1] + 1].tolist()
    return bytes([found[0], found[-1]]) + b"".join(map(_number, frequencies))


class _Head:
    """Reads what stands before the states: the number of tables, the steps of each but the last, and the tables."""

    def __init__(self, coded: bytes) -> None:
        self._coded, self.at = coded, 0

    def stretches(self, steps: int) -> list[tuple[int, Ints]]:
        """Return the steps and the frequencies of each table."""
        n_tables = self._number()
        if not 1 <= n_tables <= min(steps, MAX_TABLES):
            raise FormatError(f"a rans stream of {steps} steps speaks of {n_tables} tables")
        lengths = [self._number() for _ in range(n_tables - 1)]
        lengths.append(steps - sum(lengths))
        if min(lengths) < 1:
            raise FormatError(f"the tables of a rans stream are not for its {steps} steps")
        return [(length, self._table()) for length in lengths]

    def _table(self) -> Ints:
        f = np.zeros(256, np.int64)
        first, last = self._byte(), self._byte()
        for symbol in range(first, last + 1):
            f[symbol] = self._number()
        if int(f.sum()) != TOTAL:
            raise FormatError(f"the frequencies of a rans stream sum to {int(f.sum())}, they have to sum to {TOTAL}")
        return f

    def _number(self) -> int:
        value = shift = 0
        while (byte := self._byte()) > 127 and shift < 21:
            value, shift = value | (byte & 127) << shift, shift + 7
        return value | byte << shift

    def _byte(self) -> int:
        if self.at >= len(self._coded):
            raise FormatError("a rans stream ends within its tables")
        self.at += 1
        return self._coded[self.at - 1]
