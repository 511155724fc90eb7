"""Patterns <-> streams: block kinds, signs, magnitudes of unified blocks, and all other values. Pure functions.

A pattern is the unsigned integer of a value's bits: the sign on top, and below it what orders the magnitudes. All
decisions are taken on patterns, so that NaN payloads, infinities, subnormals and -0.0 come back bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_muws.artifact import native
from lightning_muws.artifact.entropy import Bytes, count
from lightning_muws.errors import FormatError
from lightning_muws.structure.grid import CHUNK_NUMEL

Patterns = NDArray[Any]  # unsigned, of 16, 32 or 64 bits

# The kinds of blocks in a file. Blocks of one magnitude have both signs (mixed) or one.
DENSE, MIXED, PRUNED, POSITIVE, NEGATIVE = range(5)
N_KINDS, KINDS_A_BYTE = 5, 3
# The three kinds in each byte, and how many of them are of each number.
TRIPLES = np.array([word[::-1] for word in product(range(N_KINDS), repeat=KINDS_A_BYTE)], np.uint8)
IN_TRIPLES = (TRIPLES[:, :, None] == np.arange(N_KINDS)).sum(axis=1)


class Parts(NamedTuple):
    """What a covered matrix is made of; blocks in order, block row by block row.

    Args:
        kinds: ``(n_blocks,)`` uint8: 0 dense, 1 unified with free signs, 2 pruned, 3 unified and all positive,
            4 unified and all negative.
        signs: ``(n, rows, cols)`` bool, of the blocks of kind 1, True where negative.
        magnitudes: ``(n,)`` patterns without sign, of the blocks of kinds 1, 3 and 4.
        free: ``(n, rows, cols)`` patterns, of the blocks of kind 0.
    """

    kinds: Bytes
    signs: NDArray[np.bool_]
    magnitudes: Patterns
    free: Patterns


def sign_bit(dtype: np.dtype[Any]) -> Any:
    """Return the pattern of -0.0."""
    return dtype.type(1 << (8 * dtype.itemsize - 1))


def block_bits(u: Patterns, block_shape: tuple[int, int]) -> tuple[Patterns, Patterns]:
    """Return the OR and the AND over each block of a matrix of whole blocks, each ``(down, across)``.

    They tell a block's kind: its magnitudes are one where both agree in all bits but the sign.
    """
    rows, cols = block_shape
    tall = u.reshape(len(u) // rows, rows, u.shape[1])
    ors, ands = (f.reduce(tall, axis=1) for f in (np.bitwise_or, np.bitwise_and))
    return (
        reduce(np.bitwise_or, (ors[:, j::cols] for j in range(cols))),
        reduce(np.bitwise_and, (ands[:, j::cols] for j in range(cols))),
    )


def kinds_of(ors: Patterns, ands: Patterns) -> Bytes:
    """Return the kind of each block, of the same shape, from :func:`block_bits`."""
    sign = sign_bit(ors.dtype)
    one_magnitude = ((ors ^ ands) & ~sign) == 0
    kinds: Bytes = np.where(one_magnitude, np.uint8(MIXED), np.uint8(DENSE))
    kinds[one_magnitude & ((ors & sign) == 0)] = POSITIVE
    kinds[one_magnitude & ((ands & sign) != 0)] = NEGATIVE
    kinds[ors == 0] = PRUNED
    return kinds


def block_kinds(u: Patterns, block_shape: tuple[int, int]) -> Bytes:
    """Return the kind of each block of a matrix of whole blocks, ``(down, across)``."""
    if native.level() is not None:
        return native.kinds(u, block_shape)
    return kinds_of(*block_bits(u, block_shape))


def is_unified(kinds: Bytes) -> NDArray[np.bool_]:
    """Return which blocks have a magnitude."""
    unified: NDArray[np.bool_] = (kinds != DENSE) & (kinds != PRUNED)
    return unified


def split(u: Patterns, block_shape: tuple[int, int]) -> Parts:
    """Return the parts of a matrix of whole blocks."""
    if native.level() is not None:
        found, minus, magnitudes, free = native.split_blocks(u, block_shape)
        return Parts(found, minus.view(np.bool_).reshape(-1, *block_shape), magnitudes, free.reshape(-1, *block_shape))
    ors, ands = block_bits(u, block_shape)
    kinds, sign, tiles = kinds_of(ors, ands), sign_bit(u.dtype), _tiles(u, block_shape)
    signs = (tiles[kinds == MIXED] & sign) != 0
    return Parts(kinds.reshape(-1), signs, (ands & ~sign)[is_unified(kinds)], tiles[kinds == DENSE])


def join(parts: Parts, out: Patterns, block_shape: tuple[int, int]) -> None:
    """Write the parts into a matrix of whole blocks: undoes :func:`split`."""
    if native.level() is not None:
        native.join_blocks(*parts, out, block_shape)
        return
    tiles, sign = _tiles(out, block_shape), sign_bit(out.dtype)
    kinds = parts.kinds.reshape(tiles.shape[:2])
    values = np.zeros(kinds.shape, out.dtype)
    values[is_unified(kinds)] = parts.magnitudes
    values[kinds == NEGATIVE] |= sign
    tiles[...] = values[:, :, None, None]
    mixed = kinds == MIXED
    tiles[mixed] |= np.where(parts.signs, sign, out.dtype.type(0))
    tiles[kinds == DENSE] = parts.free


def _tiles(u: Patterns, block_shape: tuple[int, int]) -> Patterns:
    """Return the view ``(down, across, rows, cols)``."""
    rows, cols = block_shape
    return u.reshape(len(u) // rows, rows, u.shape[1] // cols, cols).transpose(0, 2, 1, 3)


def slabs(n_rows: int, n_cols: int, rows: int = 1) -> Iterator[slice]:
    """Yield slices of whole block rows that together make so many rows, each of about CHUNK_NUMEL weights."""
    step = max(1, CHUNK_NUMEL // max(1, rows * n_cols)) * rows
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


# ---- streams of bytes


def pack_kinds(kinds: Bytes) -> Bytes:
    """Return three kinds a byte, the first one in the lowest place to base 5: neighbours are coded together."""
    groups = np.concatenate([kinds, np.zeros(-len(kinds) % KINDS_A_BYTE, np.uint8)]).reshape(-1, KINDS_A_BYTE)
    packed: Bytes = (groups * np.array([1, N_KINDS, N_KINDS**2], np.uint8)).sum(axis=1, dtype=np.uint8)
    return packed


def unpack_kinds(packed: Bytes, n: int, *, is_all: bool = False) -> Bytes:
    """Undo :func:`pack_kinds` for ``n`` kinds.

    Args:
        packed: The bytes.
        n: How many kinds to return.
        is_all: Whether these are all kinds of a stream, so that zeros fill its last byte.

    Raises:
        FormatError: A byte stands for no kinds, or the last one is filled with others than zeros.
    """
    if len(packed) and int(packed.max()) >= len(TRIPLES):
        raise FormatError(f"{int(packed.max())} stands for no kinds of blocks, only numbers below 125 do")
    kinds = TRIPLES[packed].reshape(-1)
    if is_all and kinds[n:].any():
        raise FormatError(f"the last kinds of blocks are followed by {kinds[n:].tolist()}, where zeros should be")
    return kinds[:n]


def count_kinds(packed: Bytes, start: int, stop: int) -> NDArray[np.int64]:
    """Return how many of the kinds ``start`` to ``stop`` are of each number, ``(5,)``, without unpacking them.

    Raises:
        FormatError: A byte stands for no kinds.
    """
    first, last = -(-start // KINDS_A_BYTE), stop // KINDS_A_BYTE
    if first >= last:
        offset = start // KINDS_A_BYTE * KINDS_A_BYTE
        few = unpack_kinds(packed[start // KINDS_A_BYTE : -(-stop // KINDS_A_BYTE)], stop - offset)
        return np.bincount(few[start - offset :], minlength=N_KINDS)
    counts = count(packed[first:last])
    if counts[len(TRIPLES) :].any():
        unpack_kinds(packed[first:last], 0)
    found: NDArray[np.int64] = counts[: len(TRIPLES)] @ IN_TRIPLES
    for edge in ((start, first * KINDS_A_BYTE), (last * KINDS_A_BYTE, stop)):
        found = found + count_kinds(packed, *edge) if edge[0] < edge[1] else found
    return found


def pack_signs(signs: NDArray[np.bool_]) -> Bytes:
    """Return eight signs a byte, the first one in the lowest bit, as :func:`lightning_muws.structure.pieces.pack`."""
    return np.packbits(signs, bitorder="little")


def unpack_signs(packed: Bytes, n: int) -> NDArray[np.bool_]:
    """Undo :func:`pack_signs` for ``n`` signs, which are all of a stream.

    Raises:
        FormatError: The last byte is filled with others than zeros.
    """
    if n % 8 and packed[-1] >> n % 8:
        raise FormatError(f"the last signs are followed by {packed[-1] >> n % 8}, where zeros should be")
    return np.unpackbits(packed, count=n, bitorder="little").astype(np.bool_)


def rotate(u: Patterns) -> Patterns:
    """Return patterns turned left by one bit: the exponent fills the top byte, and the sign comes last."""
    one, top = u.dtype.type(1), u.dtype.type(8 * u.dtype.itemsize - 1)
    turned: Patterns = (u << one) | (u >> top)
    return turned


def rotate_back(u: Patterns) -> Patterns:
    """Undo :func:`rotate`."""
    one, top = u.dtype.type(1), u.dtype.type(8 * u.dtype.itemsize - 1)
    turned: Patterns = (u >> one) | (u << top)
    return turned


def plane(values: Patterns, i: int) -> Bytes:
    """Return byte ``i`` of each value, the lowest one first."""
    return np.ascontiguousarray(_little(values).reshape(-1, 1).view(np.uint8)[:, i])


def planes(values: Patterns) -> Sequence[Bytes]:
    """Return the bytes of values ``(n,)`` turned left by one bit, ``(n,)`` each, the lowest ones first."""
    if native.level() is not None:
        return list(native.split_planes(values))
    turned = rotate(values)
    return [plane(turned, i) for i in range(values.itemsize)]


def join_planes(found: Sequence[Bytes], out: Patterns) -> None:
    """Undo :func:`planes` into contiguous ``out``."""
    if native.level() is not None:
        native.join_planes(found, out)
        return
    raw = np.empty((len(out), out.itemsize), np.uint8)
    for i, one in enumerate(found):
        raw[:, i] = one
    out[:] = rotate_back(raw.reshape(-1).view(out.dtype.newbyteorder("<")).astype(out.dtype, copy=False))


def _little(values: Patterns) -> Patterns:
    return values.astype(values.dtype.newbyteorder("<"), copy=False)
