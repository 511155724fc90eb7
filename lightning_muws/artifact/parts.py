"""A stream in parts, each coded by itself: tensors of other dtypes than floats have little in common. No torch.

The `other` stream of a chunk holds masks, indices and counters one after the other. What makes one of them small, such
as the length of its rows, does not fit the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from lightning_muws.artifact import codecs
from lightning_muws.artifact.entropy import Bytes
from lightning_muws.artifact.filters import candidates
from lightning_muws.artifact.rans import FEW_LANES, SYMBOLS_A_LANE
from lightning_muws.artifact.varint import Cursor, number
from lightning_muws.errors import FormatError

PARTS = "parts"
MAX_PARTS = 1024
PART = 1 << 10  # a stream may have one part more than it has so many bytes: each takes time
LEAST = 2 << 10  # bytes of a tensor that may be a part: it may be between two others
QUICK = FEW_LANES * SYMBOLS_A_LANE  # bytes from which rans decodes many symbols at once


class Rows(NamedTuple):
    """Where a tensor lies in a stream: so many bytes, of rows of so many."""

    n_bytes: int
    row: int


def encode(data: Bytes, tensors: Sequence[Rows] = ()) -> tuple[str, bytes]:
    """Return the name of the coder that makes a stream smallest, and the coded bytes.

    Args:
        data: ``(n,)`` uint8.
        tensors: Which tensors it consists of, in order; nothing if that is unknown.
    """
    best = codecs.encode(data, tensors[0].row if len(tensors) == 1 else 0)
    if len(spans := _spans(data, tensors)) < 2:
        return best
    names, coded, start = [], [], 0
    for stop, row in spans:
        name, part = codecs.encode(data[start:stop], row, 0, partial(_is_quick, n=stop - start))
        names.append(bytes([len(name)]) + name.encode() + number(len(part)))
        coded.append(part)
        start = stop
    lengths = [stop - start for (start, _), (stop, _) in zip([(0, 0), *spans], spans[:-1], strict=False)]
    found = b"".join([number(len(spans)), *map(number, lengths), *names, *coded])
    return (PARTS, found) if len(found) < min(codecs.GAIN * len(best[1]), len(best[1]) - codecs.LEAST_GAIN) else best


def _spans(data: Bytes, tensors: Sequence[Rows]) -> list[tuple[int, int]]:
    """Return where each part ends, and its row: tensors for which a filter may pay alone, others together."""
    found: list[tuple[int, int]] = []
    is_open, at = False, 0  # whether the last part is of tensors together
    for n_bytes, row in tensors:
        start, at = at, at + n_bytes
        if n_bytes >= LEAST and len(found) < MAX_PARTS - 2 and candidates(data[start:at], row):
            found.append((at, row))
            is_open = False
        elif is_open:
            found[-1] = (at, 0)
        else:
            found.append((at, 0))
            is_open = True
    return found


def _is_quick(name: str, n: int) -> bool:
    """Return whether a part of so many bytes takes no more time to decode than its bytes are worth."""
    *filters, inner = name.split("-")
    return inner != "rans" or n >= QUICK or "bits" in filters


def decode(name: str, coded: bytes, n: int) -> Bytes:
    """Return the ``n`` bytes from which :func:`encode` made ``coded``; takes little more memory than they need.

    Raises:
        FormatError: No coder has that name, or ``coded`` is not what it makes of ``n`` bytes.
    """
    if name != PARTS:
        return codecs.decode(name, coded, n)
    cursor = Cursor(coded, "the head of its parts")
    n_parts, most = cursor.number(), min(MAX_PARTS, 1 + n // PART)
    if not 1 <= n_parts <= most:
        raise FormatError(f"a stream of {n} bytes has {n_parts} parts, 1 to {most} are allowed")
    lengths = [cursor.number() for _ in range(n_parts - 1)]
    lengths.append(n - sum(lengths))
    if min(lengths) < 1:
        raise FormatError(f"the parts of a stream are not for its {n} bytes")
    coders = [(_name(cursor, length), cursor.number()) for length in lengths]
    data, at = np.empty(n, np.uint8), 0
    for (coder, n_coded), length in zip(coders, lengths, strict=True):
        data[at : at + length] = codecs.decode(coder, cursor.take(n_coded), length)
        at += length
    if cursor.at != len(coded):
        raise FormatError("a stream goes on after its last part")
    return data


def _name(cursor: Cursor, n: int) -> str:
    """Return the name of the coder of a part of ``n`` bytes."""
    name = cursor.take(cursor.byte()).decode("ascii", "replace")
    if not _is_quick(name, n):
        raise FormatError(f"a part of {n} bytes is coded by {name}, which only parts of {QUICK} bytes and more may be")
    return name


def minor(name: str) -> int:
    """Return the minor version of the format that has a coder."""
    return 1 if name == PARTS else codecs.minor(name)
