"""Turns packed blocks back into matrices: the inverse of native/packing.py and quantize.py, in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def matrix_of_blocks(blocks: Array, starts: Array, columns: Array, shape: tuple[int, int]) -> Array:
    """Return the matrix whose blocks are given.

    Args:
        blocks: ``(blocks, rows, cols)``.
        starts: ``(block rows + 1)``, where the blocks of a block row start.
        columns: ``(blocks)``, the first column of each, or ``(blocks, cols)``, each of its columns.
        shape: ``(out, in)`` of the matrix.

    Example:
        >>> matrix_of_blocks(np.ones((1, 2, 1)), np.array([0, 1]), np.array([2]), (2, 3)).tolist()
        [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    """
    _, rows, cols = blocks.shape
    n_rows = len(starts) - 1
    first = unsigned(columns)
    across = first if first.ndim == 2 else first[:, None] + np.arange(cols)
    down = rows * np.repeat(np.arange(n_rows), np.diff(starts))[:, None] + np.arange(rows)
    matrix = np.zeros((n_rows * rows, max(shape[1], -(-shape[1] // cols) * cols)), blocks.dtype)
    np.add.at(matrix, (down[:, :, None], across[:, None, :]), blocks)  # what fills a last block up is zero
    return matrix[: shape[0], : shape[1]]


def signed_blocks(magnitudes: Array, minus: Array, rows: int, cols: int) -> Array:
    """Return unified blocks ``(blocks, rows, cols)``; ``signs.h`` gives the order of the bits in ``minus``."""
    width = min(8, cols)
    bits = np.unpackbits(minus, bitorder="little").reshape(-1, cols // width, rows, width)
    signs = 1 - 2 * bits.transpose(0, 2, 1, 3).reshape(-1, rows, cols).astype(np.float32)
    return magnitudes[:, None, None] * signs


def unsigned(columns: Array) -> Array:
    """Return columns, which are stored as int16 and read as unsigned."""
    return columns.astype(np.uint16).astype(np.int64)
