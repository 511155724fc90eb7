"""Entropy coder: bytes to fewer bytes and back. Knows nothing of weights.

Three coders, by name: ``raw`` (as it is), ``zlib``, and ``rans``, an interleaved range coder with one static table
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
AT_A_TIME = 1 << 17  # symbols whose table entries are looked up together


def encode(data: Bytes) -> tuple[str, bytes]:
    """Return the name of the coder that makes these bytes smallest, and what it made of them.

    Args:
        data: ``(n,)`` uint8.
    """
    counts = np.bincount(data, minlength=256)
    best, coder, coded = WORTH * len(data), "raw", b""
    expected = entropy_bytes(counts)
    if len(data) <= SAMPLE or _repeats(data):
        packed = zlib.compress(data.tobytes(), 9 if len(data) <= SAMPLE else 6)
        if len(packed) < best:
            best, coder, coded = len(packed), "zlib", packed
    if expected < best:
        packed = _rans_encode(data, _frequencies(counts))
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
        data = stream.decompress(coded, n) if n else stream.decompress(coded, 1)
        data += stream.flush(1) if not stream.eof else b""
    except zlib.error as error:
        raise FormatError(f"a zlib stream is broken: {error}") from None
    if len(data) != n or not stream.eof or stream.unused_data or stream.unconsumed_tail:
        raise FormatError(f"a zlib stream does not hold the {n} bytes that are needed")
    return data


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


def _rans_encode(data: Bytes, f: Ints) -> bytes:
    """Return table, states and words; symbols are coded last to first, so that they are decoded first to last."""
    lanes, n = n_lanes(len(data)), len(data)
    steps = -(-n // lanes)
    start = np.cumsum(f) - f
    frequency, base = f.astype(np.float64), start.astype(np.float64)
    inverse = 1 / np.maximum(frequency, 1)
    # Floats hold states below 2**32 exactly, and floor((x + 0.5) / f) is x // f without an integer division.
    x, words = np.full(lanes, float(LOW)), []
    rows = max(1, AT_A_TIME // lanes)
    for top in range(steps, 0, -rows):
        bottom = max(0, top - rows)
        symbols = data[bottom * lanes : top * lanes]
        if (missing := (top - bottom) * lanes - len(symbols)) > 0:
            symbols = np.concatenate([symbols, np.full(missing, np.argmax(f), np.uint8)])
        shape = (top - bottom, lanes)
        fs, cs, invs = (table[symbols].reshape(shape) for table in (frequency, base, inverse))
        limits, halves, rests = fs * float(1 << 20), invs * 0.5, TOTAL - fs
        for t in range(top - bottom - 1, -1, -1):
            full = np.flatnonzero(x >= limits[t])
            if len(full):
                states = x[full].astype(np.uint32)
                words.append(states.astype(np.uint16))
                x[full] = states >> 16
            q = np.floor(x * invs[t] + halves[t])
            x += q * rests[t] + cs[t]
    stream = np.concatenate(words[::-1]) if words else np.zeros(0, np.uint16)
    return _table(f) + x.astype("<u4").tobytes() + stream.astype("<u2").tobytes()


def _rans_decode(coded: bytes, n: int) -> Bytes:
    f, at = _read_table(coded)
    lanes = n_lanes(n)
    if len(coded) < at + 4 * lanes or (len(coded) - at) % 2:
        raise FormatError("a rans stream ends within its states")
    x = np.frombuffer(coded, "<u4", lanes, at).astype(np.int64)
    words = np.frombuffer(coded, "<u2", -1, at + 4 * lanes).astype(np.int64)
    symbol = np.repeat(np.arange(256, dtype=np.uint8), f)
    frequency = np.repeat(f, f)
    offset = np.arange(TOTAL) - np.repeat(np.cumsum(f) - f, f)
    steps, read = -(-n // lanes), 0
    out = np.empty((steps, lanes), np.uint8)
    for t in range(steps):
        slot = x & (TOTAL - 1)
        out[t] = symbol[slot]
        x >>= TABLE_BITS
        x *= frequency[slot]
        x += offset[slot]
        low = np.flatnonzero(x < LOW)
        if len(low):
            fresh = words[read : read + len(low)]
            if len(fresh) < len(low):
                raise FormatError("a rans stream ends too early")
            x[low] = (x[low] << 16) | fresh
            read += len(low)
    if read != len(words) or (x != LOW).any():
        raise FormatError("a rans stream does not end where it should")
    return out.reshape(-1)[:n]


def _table(f: Ints) -> bytes:
    """Return the first and the last symbol that occur, and the frequencies from one to the other, 7 bits a byte."""
    found = np.flatnonzero(f)
    table = bytearray([found[0], found[-1]])
    for value in f[found[0] : found[-1] + 1].tolist():
        table += bytes([value]) if value < 128 else bytes([value & 127 | 128, value >> 7])
    return bytes(table)


def _read_table(coded: bytes) -> tuple[Ints, int]:
    """Return the frequencies, and where they end."""
    f, at = np.zeros(256, np.int64), 2
    try:
        for symbol in range(coded[0], coded[1] + 1):
            value = coded[at]
            if value > 127:
                at += 1
                value = value & 127 | coded[at] << 7
            f[symbol], at = value, at + 1
    except IndexError:
        raise FormatError("a rans stream ends within its table") from None
    if int(f.sum()) != TOTAL:
        raise FormatError(f"the frequencies of a rans stream sum to {int(f.sum())}, they have to sum to {TOTAL}")
    return f, at
