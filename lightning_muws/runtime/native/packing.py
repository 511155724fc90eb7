"""Packs a matrix with zeros into the blocks that the kernels read. Pure functions of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Time of a packed column by its number of rows, relative to four rows: with fewer, each loaded input is used less.
ROW_COSTS = {8: 2.0, 4: 1.0, 2: 0.6, 1: 0.4}


class Packed(NamedTuple):
    """The kept blocks, block row by block row; see :func:`~lightning_muws.runtime.native.plan.block_sparse`."""

    weights: Tensor
    starts: Tensor
    columns: Tensor
    rows: int
    cols: int
    logical: Tensor | None = None


class PackedSigns(NamedTuple):
    """The unified blocks; see :func:`~lightning_muws.runtime.native.plan.signed_linear`."""

    magnitudes: Tensor
    minus: Tensor
    starts: Tensor
    columns: Tensor
    rows: int
    cols: int


def kept(matrix: Tensor, rows: int, cols: int) -> Tensor:
    """Return which blocks of ``rows`` by ``cols`` are not all zero, ``(ceil(out / rows), in / cols)`` bool."""
    n_out, n_in = matrix.shape
    padded = torch.zeros(-(-n_out // rows) * rows, n_in, dtype=torch.bool)
    padded[:n_out] = matrix != 0
    return padded.view(len(padded) // rows, rows, n_in // cols, cols).any(3).any(1)


def choose_block(matrix: Tensor, block_shape: tuple[int, int], row_limit: int, most_rows: int = 8) -> tuple[int, int]:
    """Return the ``(rows, cols)`` with which the kernels should run fastest, given the zeros of ``matrix``.

    Args:
        matrix: ``(out, in)``.
        block_shape: Shape of the weight's blocks.
        row_limit: Outputs of a group of the convolution: a block must not cross groups.
        most_rows: Rows that fit into the registers.
    """
    fitting = [rows for rows in ROW_COSTS if rows <= most_rows]
    allowed = [rows for rows in fitting if row_limit % rows == 0 or row_limit == len(matrix)]
    costs = {rows: ROW_COSTS[rows] * float(kept(matrix, rows, 1).sum()) for rows in allowed}
    rows = min(costs, key=lambda r: (costs[r], -r))
    return rows, 4 if block_shape[1] % 4 == 0 and matrix.shape[1] % 4 == 0 else 1


def pack(matrix: Tensor, rows: int, cols: int) -> Packed:
    """Return the kept blocks of ``matrix``; the weights of a block are stored column by column."""
    n_out, n_in = matrix.shape
    mask = kept(matrix, rows, cols)
    padded = matrix.new_zeros(len(mask) * rows, n_in)
    padded[:n_out] = matrix
    blocks = padded.view(len(mask), rows, n_in // cols, cols).permute(0, 2, 3, 1)[mask]
    return Packed(blocks.contiguous(), _starts(mask), _short(cols * mask.nonzero()[:, 1]), rows, cols)


def pack_pairs(matrix: Tensor, rows: int) -> Packed:
    """Return the kept columns of each block row as bfloat16, in pairs; an odd one is paired with zero weights."""
    mask = kept(matrix, rows, 1)
    padded = matrix.new_zeros(len(mask) * rows, matrix.shape[1])
    padded[: len(matrix)] = matrix
    tall = padded.view(len(mask), rows, matrix.shape[1])
    counts = mask.sum(1)
    pairs = (counts + 1) // 2
    starts = torch.zeros(len(mask) + 1, dtype=torch.int32)
    starts[1:] = pairs.cumsum(0)
    n_pairs = int(starts[-1])
    row_of, column_of = mask.nonzero().unbind(1)
    nth = torch.arange(len(row_of)) - (counts.cumsum(0) - counts)[row_of]
    slot = 2 * starts[row_of].long() + nth
    weights = matrix.new_zeros(2 * n_pairs, rows)
    weights[slot] = tall[row_of, :, column_of]
    logical = torch.zeros(2 * n_pairs, dtype=torch.long)
    logical[slot] = column_of
    empty = torch.ones(2 * n_pairs, dtype=torch.bool)
    empty[slot] = False
    logical[empty] = logical[empty.nonzero()[:, 0] - 1]
    halves = weights.view(n_pairs, 2, rows).transpose(1, 2).to(torch.bfloat16).contiguous()
    return Packed(halves, starts, _short(torch.zeros(n_pairs)), rows, 2, logical.int())


def pack_signs(matrix: Tensor, rows: int, cols: int) -> tuple[PackedSigns, Tensor]:
    """Return the unified blocks of ``matrix`` as bits, and the matrix without them.

    ``rows`` and ``cols`` divide the matrix; ``cols`` is 4 with 4 rows, or a multiple of 8.
    """
    down, across = len(matrix) // rows, matrix.shape[1] // cols
    blocks = matrix.view(down, rows, across, cols).transpose(1, 2)
    flat = blocks.abs().flatten(2)
    mask = (flat[..., 0] > 0) & (flat == flat[..., :1]).all(2)
    unified = blocks[mask]
    width = min(8, cols)
    below = (unified < 0).view(-1, rows, cols // width, width).transpose(1, 2).reshape(-1, 8)
    minus = (below * (1 << torch.arange(8))).sum(1).to(torch.uint8)
    rest = blocks.clone()
    rest[mask] = 0
    packed = PackedSigns(flat[..., 0][mask], minus, _starts(mask), _short(cols * mask.nonzero()[:, 1]), rows, cols)
    return packed, rest.transpose(1, 2).reshape(matrix.shape)


def _short(columns: Tensor) -> Tensor:
    """Return whole numbers below 2 ** 16 as int16 bits: half the memory traffic of int32."""
    return columns.int().to(torch.int16)


def _starts(mask: Tensor) -> Tensor:
    starts = torch.zeros(len(mask) + 1, dtype=torch.int32)
    starts[1:] = mask.sum(1).cumsum(0)
    return starts
