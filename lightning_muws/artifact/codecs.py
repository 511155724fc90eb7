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

WORTH = 0.999  # a coded stream must be smaller than this share of the raw one, or it stays raw
SAMPLE = 1 << 16  # bytes from which to judge whether zlib pays on a longer stream


class Coder(NamedTuple):
    """One row of the table.

    Args:
        encode: Takes ``(n,)`` uint8 and a size in bytes. Returns the coded bytes, or None where the coder expects not
            to get below that size.
        decode: Takes coded bytes and ``n``. Returns ``(n,)`` uint8; raises FormatError where the bytes are not what
            ``encode`` makes of ``n`` bytes. Its time and memory must be bounded by both lengths: a file may lie.
    """

    encode: Callable[[Bytes, float], bytes | None]
    decode: Callable[[bytes, int], Bytes]


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
        coded = coder.encode(data, size)
        if coded is not None and len(coded) < size:
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
    """Return whether zlib makes a sample from the middle clearly smaller than its order-0 entropy."""
    start = (len(data) - SAMPLE) // 2
    sample = data[start : start + SAMPLE]
    return len(zlib.compress(sample.tobytes(), 6)) < 0.9 * min(entropy_bytes(np.bincount(sample)), WORTH * SAMPLE)


# Where two coders reach the same size, the earlier row is kept.
CODERS: dict[str, Coder] = {
    "raw": Coder(lambda data, size: None, lambda coded, n: np.frombuffer(coded, np.uint8)),
    "zlib": Coder(_deflate, lambda coded, n: np.frombuffer(inflate(coded, n), np.uint8)),
    "rans": Coder(rans.encode, rans.decode),
}
