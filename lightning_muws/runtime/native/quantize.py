"""Rounds a matrix to whole numbers of 8 bits, and packs its blocks for products of four. Pure functions of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_muws.runtime.native.packing import kept

LARGEST = 127  # of a weight; -128 is not used, so that a weight and its negative are both there
ROW_COSTS = {4: 1.0, 2: 0.7, 1: 0.5}  # time of a packed block by its number of rows, relative to four
LOOSE_COST = 2.0  # of four columns that are gathered one by one, relative to four neighbours


class Weights8(NamedTuple):
    """A matrix of 8 bits, ``scales[r] * whole[r]`` row by row.

    Attributes:
        whole: ``(out, in)`` int8, from -127 to 127.
        scales: ``(out)`` float32; 1 for a row of zeros.
    """

    whole: Tensor
    scales: Tensor


class Packed8(NamedTuple):
    """The kept blocks of an int8 matrix, block row by block row; a block is four columns of ``rows`` outputs.

    Attributes:
        weights: ``(blocks, rows, 4)`` int8.
        starts: ``(block rows + 1)`` int32, where the blocks of a block row start.
        columns: int16, read as unsigned: ``(blocks)``, a quarter of a block's first column; ``(blocks, 4)`` if loose.
        sums: ``(block rows * rows)`` int32, the sum of an output's weights.
        scales: ``(block rows * rows)`` float32.
        rows: Outputs of a block: 1, 2 or 4.
        loose: Whether a block names each of its four columns; otherwise they are neighbours.
    """

    weights: Tensor
    starts: Tensor
    columns: Tensor
    sums: Tensor
    scales: Tensor
    rows: int
    loose: bool


def quantized(matrix: Tensor) -> Weights8:
    """Return the nearest 8-bit matrix with one scale per row, the largest size of the row over 127.

    Args:
        matrix: ``(out, in)`` float32, finite.

    Example:
        >>> quantized(torch.tensor([[1.27, -0.5], [0.0, 0.0]])).whole
        tensor([[127, -50],
                [  0,   0]], dtype=torch.int8)
    """
    sizes = matrix.abs().amax(1) if matrix.shape[1] else matrix.new_zeros(len(matrix))
    scales = sizes / LARGEST
    scales[scales < torch.finfo(torch.float32).tiny] = 1.0  # so small a row counts as zero
    whole = (matrix / scales[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8)
    return Weights8(whole, scales)


def choose_rows(matrix: Tensor, row_limit: int) -> tuple[int, bool]:
    """Return the rows of a block, and whether it is loose, with which the kernel should run fastest.

    Args:
        matrix: ``(out, in)``, with zeros where blocks are pruned.
        row_limit: Outputs of a group of the convolution: a block must not cross groups.
    """
    wide = F.pad(matrix, (0, -matrix.shape[1] % 4))
    costs: dict[tuple[int, bool], float] = {}
    for rows, cost in ROW_COSTS.items():
        if row_limit % rows and row_limit != len(matrix):
            continue
        costs[rows, False] = cost * float(kept(wide, rows, 4).sum())
        costs[rows, True] = LOOSE_COST * cost * float(((kept(matrix, rows, 1).sum(1) + 3) // 4).sum())
    return min(costs, key=lambda key: (costs[key], -key[0], key[1]))


def pack8(weights: Weights8, rows: int, loose: bool) -> Packed8:
    """Return the blocks of ``weights`` that hold anything.

    If not ``loose``, they are the four neighbours 4 j .. 4 j + 3: a 4x4 block fills one exactly. If ``loose``, the kept
    columns of a block row are taken four by four in their order: those of 4x1 blocks leave at most three columns of a
    block row empty.
    """
    n_out, n_in = weights.whole.shape
    n_rows = -(-n_out // rows)
    padded = F.pad(weights.whole, (0, -n_in % 4, 0, n_rows * rows - n_out))
    starts = torch.zeros(n_rows + 1, dtype=torch.int32)
    if loose:
        mask = kept(padded, rows, 1)
        counts = mask.sum(1)
        blocks = (counts + 3) // 4
        starts[1:] = blocks.cumsum(0)
        row_of, column_of = mask.nonzero().unbind(1)
        nth = torch.arange(len(row_of)) - (counts.cumsum(0) - counts)[row_of]
        slot = 4 * starts[row_of].long() + nth
        columns = torch.zeros(4 * int(starts[-1]), dtype=torch.long)  # what is left of the last has weights of zero
        columns[slot] = column_of
        flat = padded.new_zeros(4 * int(starts[-1]), rows)
        flat[slot] = padded.view(n_rows, rows, -1)[row_of, :, column_of]
        packed = flat.view(-1, 4, rows).transpose(1, 2)
        columns = columns.view(-1, 4)
    else:
        mask = kept(padded, rows, 4)
        starts[1:] = mask.sum(1).cumsum(0)
        packed = padded.view(n_rows, rows, -1, 4).transpose(1, 2)[mask]
        columns = mask.nonzero()[:, 1]
    sums = padded.int().sum(1, dtype=torch.int32)
    scales = F.pad(weights.scales, (0, n_rows * rows - n_out), value=1.0)
    return Packed8(packed.contiguous(), starts, columns.int().to(torch.int16), sums, scales, rows, loose)
