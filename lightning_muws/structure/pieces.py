"""Read and write chosen blocks of a matrix in place, in pieces as wide as the memory allows; pack booleans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightning_muws.structure.grid import BlockGrid

# Moving an element of 16 bytes takes as long as moving one of 4.
UNITS = {16: torch.complex128, 8: torch.int64, 4: torch.int32, 2: torch.int16}


def unit_bytes(matrix: Tensor, grid: BlockGrid) -> int:
    """Return the largest number of bytes, up to 16, in which rows of blocks of a contiguous matrix can be moved."""
    size = matrix.element_size()
    return math.gcd(16, size * grid.block_shape[1], size * matrix.shape[1], size * matrix.storage_offset())


def corners(chosen: Tensor, grid: BlockGrid, row_units: int, run_units: int) -> Tensor:
    """Return the positions of the first weights of chosen blocks, in units from the matrix's first weight.

    Args:
        chosen: ``(down, across)`` bool, which blocks.
        grid: How the matrix is cut.
        row_units: Units in a row of the matrix.
        run_units: Units in a row of a block.

    Returns:
        ``(n,)`` int64, in the order of ``chosen.flatten()``.
    """
    down, across = chosen.nonzero(as_tuple=True)
    return (down * (grid.block_shape[0] * row_units)).add_(across, alpha=run_units)  # in place, both would stay alive


class Pieces:
    """Chosen blocks of a matrix; a block's row is a run of ``cols`` weights, and is moved in pieces of up to 16 bytes.

    Args:
        matrix: ``(out, in * kernel)``, contiguous.
        grid: How it is cut.
        corner: ``(n,)`` int64 from :func:`corners`.
        unit: The bytes of a piece, from :func:`unit_bytes`.
    """

    def __init__(self, matrix: Tensor, grid: BlockGrid, corner: Tensor, unit: int) -> None:
        self._rows, self._cols = grid.block_shape
        self._dtype, self._flat, self._corner = matrix.dtype, matrix.view(-1).view(UNITS[unit]), corner
        self._row_units = matrix.shape[1] * matrix.element_size() // unit
        self._run_units = self._cols * matrix.element_size() // unit

    @cached_property
    def _index(self) -> Tensor:
        rows = torch.arange(self._rows, device=self._corner.device) * self._row_units
        index = self._corner + rows.view(-1, 1)
        if self._run_units > 1:
            index = index.unsqueeze(2) + torch.arange(self._run_units, device=index.device)
        return index.view(-1)

    def read(self) -> Tensor:
        """Return the blocks, ``(rows, n, cols)``: their first rows, their second ones, and so on; a copy."""
        return self._flat.index_select(0, self._index).view(self._dtype).view(self._rows, -1, self._cols)

    def first(self) -> Tensor:
        """Return the first weight of each block, ``(n,)``."""
        units = self._flat.index_select(0, self._corner).view(self._dtype)
        return units[:: self._flat.element_size() // units.element_size()]

    def write_(self, values: Tensor) -> None:
        """Write the blocks, ``(rows, n, cols)`` of the matrix's dtype."""
        self._flat.index_copy_(0, self._index, values.reshape(-1).contiguous().view(self._flat.dtype))


def bits(x: Tensor) -> Tensor:
    """Return the same memory as integers of the same width."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def pack(flags: Tensor) -> Tensor:
    """Return booleans of any shape as uint8 ``(ceil(n / 8),)``, first flag in the lowest bit, rest padded with False.

    The bytes are those of ``numpy.packbits(..., bitorder="little")``, with which the files pack signs. This function
    works on the device of the flags.

    Example:
        >>> pack(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    flat = flags.flatten().to(torch.uint8)
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
    packed = flat[:, 0].clone()
    for bit in range(1, 8):
        packed |= flat[:, bit] << bit
    return packed


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo :func:`pack` for booleans of this shape."""
    bits = torch.stack([(packed >> bit) & 1 for bit in range(8)], dim=1)
    return bits.flatten()[: math.prod(shape)].view(*shape).to(torch.bool)
