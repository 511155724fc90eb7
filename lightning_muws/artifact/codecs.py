"""The table of coders: each turns the bytes of a stream into fewer bytes and back. Imports no torch.

A new coder is one row of :data:`CODERS`. A file stores its name with each stream, after the names of filters
(filters.py), as `xor-bits-zlib`; a reader without that row refuses it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lightning_muws.artifact import rans
from lightning_muws.artifact.entropy import Bytes, entropy_bytes
from lightning_muws.artifact.filters import FILTERS, SAMPLE, Filtered, candidates, windows
from lightning_muws.artifact.varint import Cursor, number
from lightning_muws.errors import FormatError

GAIN = 0.95  # what a later version adds must get below this share of what the first one makes, and save ...
LEAST_GAIN = 256  # ... so many bytes, so that most files stay readable for all
WORTH = 0.999  # a coded stream must be smaller than this share of the raw one, or it stays raw
NOTHING = 1 / 64  # a share of a sample that is near the least that zlib can make of it


class Coder(NamedTuple):
    """One row of the table.

    Args:
        encode: Takes ``(n,)`` uint8 and a size in bytes. Returns the coded bytes, or None where the coder expects not
            to get below that size.
        decode: Takes coded bytes and ``n``. Returns ``(n,)`` uint8; raises FormatError where the bytes are not what
            ``encode`` makes of ``n`` bytes. Its time and memory must be bounded by both lengths: a file may lie.
        minor: The minor version of the format that has it without a filter.
    """

    encode: Callable[[Bytes, float], bytes | None]
    decode: Callable[[bytes, int], Bytes]
    minor: int = 0


def encode(
    data: Bytes, row: int = 0, least_gain: int = LEAST_GAIN, is_allowed: Callable[[str], bool] = lambda name: True
) -> tuple[str, bytes]:
    """Return the name of the coder that makes a stream smallest, after the filters before it, and the coded bytes.

    Args:
        data: ``(n,)`` uint8.
        row: The bytes of a row of the tensor that they are of; 0 if that is unknown.
        least_gain: Bytes that filters save at least, or they are not used.
        is_allowed: Returns whether a coder may be used, from its name after those of the filters; `raw` always may.

    Example:
        >>> coder, coded = encode(np.zeros(1000, np.uint8))
        >>> coder, len(coded), int(decode(coder, coded, 1000).sum())
        ('rans', 9, 0)
    """
    best, size = ("raw", b""), WORTH * len(data)
    plain = [Filtered((), (), data)]
    for is_new, found in ((False, plain), (True, candidates(data, row))):
        if is_new:
            size = min(GAIN * size, size - least_gain)
        for filtered in found:
            head = b"".join(map(number, filtered.numbers))
            for inner, coder in (INNER if is_new else CODERS).items():
                if is_allowed(name := "-".join((*filtered.names, inner))):
                    coded = coder.encode(filtered.data, size - len(head))
                    if coded is not None and len(head) + len(coded) < size:
                        best, size = (name, head + coded), float(len(head) + len(coded))
    return best if best[0] != "raw" else ("raw", data.tobytes())


def decode(name: str, coded: bytes, n: int) -> Bytes:
    """Return the ``n`` bytes from which :func:`encode` made ``coded``; takes little more memory than they need.

    Raises:
        FormatError: No coder or filter has that name, or ``coded`` is not what it makes of ``n`` bytes.
    """
    *filters, inner = name.split("-")
    check_names(name)
    cursor, undo = Cursor(coded, f"the numbers of {name}"), []
    for one in (FILTERS[filter_name] for filter_name in filters):
        numbers = tuple(cursor.number() for _ in range(one.n_numbers))
        undo.append((one, n, numbers))
        n = one.length(n, numbers)
    data = (INNER if filters else CODERS)[inner].decode(coded[cursor.at :] if cursor.at else coded, n)
    if len(data) != n:
        raise FormatError(f"a {name} stream holds {len(data)} bytes, {n} are needed")
    for one, n, numbers in reversed(undo):
        data = one.undo(data, n, numbers)
    return data


def minor(name: str) -> int:
    """Return the minor version of the format that has a coder after its filters."""
    return 1 if "-" in name else CODERS[name].minor


def check_names(name: str) -> None:
    """Check the name of a coder and of the filters before it.

    Raises:
        FormatError: This reader does not know one of them, or they are in another order.
    """
    *filters, inner = name.split("-")
    places = [list(FILTERS).index(one) if one in FILTERS else -1 for one in filters]
    if -1 in places or places != sorted(set(places)) or inner not in (INNER if filters else CODERS):
        raise FormatError(
            f"coder {name!r} is not known to this reader, which has {', '.join(CODERS)}, and after the filters "
            f"{', '.join(FILTERS)} also zlib2: update it"
        )


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
    """Return whether zlib makes a sample clearly smaller than its order-0 entropy, or next to nothing."""
    sample = windows(data).reshape(-1)
    coded = len(zlib.compress(sample.tobytes(), 6))
    return coded < max(NOTHING * len(sample), 0.9 * min(entropy_bytes(np.bincount(sample)), WORTH * len(sample)))


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


# Where two coders reach the same size, the earlier row is kept.
CODERS: dict[str, Coder] = {
    "raw": Coder(
        lambda data, size: data.tobytes() if len(data) < size else None, lambda coded, n: np.frombuffer(coded, np.uint8)
    ),
    "zlib": Coder(_deflate, lambda coded, n: np.frombuffer(inflate(coded, n), np.uint8)),
    "rans": Coder(rans.encode, rans.decode),
}
INNER = {**CODERS, "zlib2": Coder(_deflate_twice, _inflate_twice)}  # of filtered bytes
