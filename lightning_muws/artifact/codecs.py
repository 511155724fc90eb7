"""The table of coders: each turns the bytes of a stream into fewer bytes and back. Imports no torch.

A new coder is one row of :data:`CODERS`. A file stores its name with each stream; a reader without that row refuses it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lightning_muws.artifact import rans
from lightning_muws.artifact.entropy import Bytes, entropy_bytes
from lightning_muws.errors import FormatError

GAIN = 0.95  # a coder of a later version must get below this share of the others', and save ...
LEAST_GAIN = 256  # ... so many bytes, so that most files stay readable for all
WINDOW, WINDOWS = 1 << 13, 8  # bytes of a sample, and how many samples of a stream
WORTH = 0.999  # a coded stream must be smaller than this share of the raw one, or it stays raw
SAMPLE = WINDOW * WINDOWS  # bytes from which to judge whether zlib pays on a longer stream


class Coder(NamedTuple):
    """One row of the table.

    Args:
        encode: Takes ``(n,)`` uint8 and a size in bytes. Returns the coded bytes, or None where the coder expects not
            to get below that size.
        decode: Takes coded bytes and ``n``. Returns ``(n,)`` uint8; raises FormatError where the bytes are not what
            ``encode`` makes of ``n`` bytes. Its time and memory must be bounded by both lengths: a file may lie.
        minor: The minor version of the format that has it.
    """

    encode: Callable[[Bytes, float], bytes | None]
    decode: Callable[[bytes, int], Bytes]
    minor: int = 0


def encode(data: Bytes) -> tuple[str, bytes]:
    """Return the name of the coder that makes a stream smallest, and the coded bytes.

    Args:
        data: ``(n,)`` uint8.

    Example:
        >>> coder, coded = encode(np.zeros(1000, np.uint8))
        >>> coder, len(coded), int(decode(coder, coded, 1000).sum())
        ('rans', 9, 0)
    """
    best, size = ("raw", b""), WORTH * len(data)
    for name, coder in CODERS.items():
        limit = min(GAIN * size, size - LEAST_GAIN) if coder.minor else size
        coded = coder.encode(data, limit)
        if coded is not None and len(coded) < limit:
            best, size = (name, coded), len(coded)
    return best if best[0] != "raw" else ("raw", data.tobytes())


def decode(name: str, coded: bytes, n: int) -> Bytes:
    """Return the ``n`` bytes from which :func:`encode` made ``coded``; takes no more memory than they need.

    Raises:
        FormatError: No coder has that name, or ``coded`` is not what it makes of ``n`` bytes.
    """
    if name not in CODERS:
        raise FormatError(f"coder {name!r} is not known to this reader, which has {', '.join(CODERS)}: update it")
    data = CODERS[name].decode(coded, n)
    if len(data) != n:
        raise FormatError(f"a {name} stream holds {len(data)} bytes, {n} are needed")
    return data


def inflate(coded: bytes, n: int) -> bytes:
    """Return the ``n`` bytes of a zlib stream (RFC 1950); a stream that holds more takes no memory for them.

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


def _deflate(data: Bytes, size: float) -> bytes | None:
    """Return a zlib stream of short data, and of long data whose sample repeats itself."""
    if len(data) > SAMPLE and not _repeats(data):
        return None
    return zlib.compress(data.tobytes(), 9 if len(data) <= SAMPLE else 6)


def _repeats(data: Bytes) -> bool:
    """Return whether zlib makes a sample clearly smaller than its order-0 entropy."""
    sample = _windows(data).reshape(-1)
    return len(zlib.compress(sample.tobytes(), 6)) < 0.9 * min(entropy_bytes(np.bincount(sample)), WORTH * len(sample))


def _windows(data: Bytes) -> Bytes:
    """Return ``(WINDOWS, WINDOW)`` bytes, spread over longer data from its beginning to its end."""
    starts = [(len(data) - WINDOW) * i // (WINDOWS - 1) for i in range(WINDOWS)]
    return np.stack([data[start : start + WINDOW] for start in starts])


def _deflate_twice(data: Bytes, size: float) -> bytes | None:
    """Return a zlib stream of a zlib stream, of data that repeats itself so much that the first one does as well."""
    if len(data) > SAMPLE and not _repeats(data):
        return None
    once = zlib.compress(data.tobytes(), 9)
    return zlib.compress(once, 9) if len(once) < len(data) / 16 else None


def _inflate_twice(coded: bytes, n: int) -> Bytes:
    stream = zlib.decompressobj()
    try:
        once = stream.decompress(coded, n + 1)  # one that is longer than the data would not have been written
    except zlib.error as error:
        raise FormatError(f"a zlib stream is broken: {error}") from None
    if not stream.eof or stream.unused_data or stream.unconsumed_tail:
        raise FormatError("a zlib stream within another one does not end where it should")
    return np.frombuffer(inflate(once, n), np.uint8)


def _delta(data: Bytes) -> Bytes | None:
    """Return each byte less the one before it, modulo 256; None if that does not pay on a sample."""
    sample = _windows(data) if len(data) > SAMPLE else data[None]
    plain, filtered = (
        sum(entropy_bytes(np.bincount(row)) for row in rows) for rows in (sample, np.diff(sample, axis=1))
    )
    return np.diff(data, prepend=np.zeros(1, np.uint8)) if filtered < 0.9 * plain else None


def _sum(data: Bytes, n: int) -> Bytes:
    """Undo :func:`_delta`."""
    return np.cumsum(data[:n], dtype=np.uint8)


def _bits(data: Bytes) -> Bytes | None:
    """Return eight bytes that are 0 or 1 as one, the first one in the lowest bit; None if there are others."""
    return np.packbits(data, bitorder="little") if len(data) and data.max() <= 1 else None


def _bytes(data: Bytes, n: int) -> Bytes:
    """Undo :func:`_bits`."""
    if n % 8 and data[-1] >> n % 8:
        raise FormatError("the last bits of a stream are followed by others than zeros")
    return np.unpackbits(data, count=n, bitorder="little")


def _filtered(
    coder: Coder,
    apply: Callable[[Bytes], Bytes | None],
    undo: Callable[[Bytes, int], Bytes],
    length: Callable[[int], int],
) -> Coder:
    """Return the coder of filtered bytes; ``length`` returns how many of these ``n`` bytes become."""

    def encode(data: Bytes, size: float) -> bytes | None:
        filtered = apply(data)
        return None if filtered is None else coder.encode(filtered, size)

    def decode(coded: bytes, n: int) -> Bytes:
        data = coder.decode(coded, length(n))
        if len(data) != length(n):
            raise FormatError(f"a filtered stream holds {len(data)} bytes, {length(n)} are needed")
        return undo(data, n)

    return Coder(encode, decode, minor=1)


# Where two coders reach the same size, the earlier row is kept.
CODERS: dict[str, Coder] = {
    "raw": Coder(lambda data, size: None, lambda coded, n: np.frombuffer(coded, np.uint8)),
    "zlib": Coder(_deflate, lambda coded, n: np.frombuffer(inflate(coded, n), np.uint8)),
    "rans": Coder(rans.encode, rans.decode),
}
for _name, _apply, _undo, _length in (
    ("delta", _delta, _sum, lambda n: n),
    ("bits", _bits, _bytes, lambda n: -(-n // 8)),
):
    for _inner, _coder in (
        ("rans", CODERS["rans"]), ("zlib", CODERS["zlib"]), ("zlib2", Coder(_deflate_twice, _inflate_twice)),
    ):  # fmt: skip
        CODERS[f"{_name}-{_inner}"] = _filtered(_coder, _apply, _undo, _length)
