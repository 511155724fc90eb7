"""Shapes: the block shapes that ``block_shape="auto"`` chooses from, and the sample of a weight to try them on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_muws.structure.cost import SAMPLED, sample
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.micro import MicroStructure

SHAPES = ((4, 4), (1, 4), (4, 1), (2, 2), (1, 8), (8, 1), (1, 16), (16, 1), (8, 8))  # the first is the default
TILE = 16  # sides of a tile: each of the shapes divides it


def fitting(grid: BlockGrid, shape: torch.Size | tuple[int, ...]) -> tuple[BlockGrid, ...]:
    """Return the grids that differ from ``grid`` in their block shape alone and cut a weight of this shape.

    The order is that of ``SHAPES``. If none of them cuts the weight, ``grid`` itself is returned.

    Example:
        >>> [grid.block_shape for grid in fitting(BlockGrid(), (2, 9))]
        [(1, 4), (2, 2), (1, 8)]
    """
    grids = tuple(replace(grid, block_shape=block_shape) for block_shape in SHAPES)
    return tuple(found for found in grids if 0 not in found.counts(shape)) or (grid,)


def tiles(matrix: Tensor, n: int = SAMPLED) -> Tensor:
    """Return at most ``n`` weights of a matrix as tiles of 16x16, one below the other, spread evenly.

    A grid with one of ``SHAPES`` cuts the result as it cuts the tiles in the matrix. A matrix that is small, or too
    narrow for a tile, is returned as it is.

    Example:
        >>> tiles(torch.zeros(64, 9)).shape, tiles(torch.zeros(640, 640)).shape
        (torch.Size([64, 9]), torch.Size([1024, 16]))
    """
    if matrix.numel() <= n or min(matrix.shape) < TILE:
        return matrix
    down, across = (length // TILE for length in matrix.shape)
    picked = sample(torch.arange(down * across, device=matrix.device), n // TILE**2)
    whole_tiles = matrix[: down * TILE, : across * TILE].view(down, TILE, across, TILE)
    return whole_tiles[picked // across, :, picked % across].reshape(-1, TILE)


@torch.no_grad()
def nearest_grid(weight: Tensor, structure: MicroStructure, grid: BlockGrid, name: str = "weight") -> BlockGrid:
    """Return the grid for a structure with set ratios: of equal bits, the one with the nearest structured weight.

    Equal numbers of blocks with equal ratios take equal bits. So only the shapes of 16 weights are compared, and of
    those only the ones that cut the most blocks. The distances are those of a sample.

    Args:
        weight: Any floating dtype, two or more axes.
        structure: Its ratios are numbers.
        grid: Its block shape is replaced; it is returned if no shape of 16 weights cuts the weight.
        name: The weight's name in error messages.

    Raises:
        StateError: The weight has NaN or Inf.
    """
    grids = [found for found in fitting(grid, weight.shape) if found.block_numel == 16]
    n_blocks = [down * across for down, across in (found.counts(weight.shape) for found in grids)]
    largest = [found for found, n in zip(grids, n_blocks, strict=True) if n == max(n_blocks)]
    x = tiles(grid.matrix(weight.detach())).to(torch.promote_types(weight.dtype, torch.float32))
    distances = [float((structure.project(x, BlockGrid(found.block_shape), name) - x).norm()) for found in largest]
    return largest[distances.index(min(distances))] if largest else grid
