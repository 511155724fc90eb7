"""Finds the block shape of a weight that came without one, from its zeros and its unified blocks."""

from __future__ import annotations

from torch import Tensor

from lightning_muws.structure.grid import BlockGrid

ROWS = (128, 64, 32, 16, 8, 4, 2, 1)
COLUMNS = (32, 16, 8, 4, 2, 1)
SAMPLE = 1 << 20  # weights that are looked at, from the first rows on
FOUND = 0.02  # of the weights in zeros or in blocks of one magnitude; below, there is no structure to find
DEFAULT = (4, 4)


def find_block_shape(weight: Tensor) -> tuple[int, int]:
    """Return the largest common block shape whose blocks of one magnitude, zero or not, explain the weight.

    Args:
        weight: Of a Linear or a convolution, seen as the matrix ``(out, in * kernel)``.

    Returns:
        ``(rows, cols)``; ``(1, 1)`` where zeros lie scattered singly, ``(4, 4)`` where there is nothing to find.

    Example:
        >>> import torch
        >>> weight = torch.randn(64, 64).view(16, 4, 8, 8) * (torch.arange(128).view(16, 1, 8, 1) % 3 == 0)
        >>> find_block_shape(weight.view(64, 64))
        (4, 8)
    """
    matrix = weight.detach().flatten(1).abs()
    if not matrix.numel():
        return DEFAULT
    taps = matrix.shape[1] // weight.shape[1] if weight.dim() > 2 and weight.shape[1] else 1
    if matrix.numel() > SAMPLE:
        matrix = matrix[: max(1, SAMPLE // matrix.shape[1] // 128) * 128]
    columns = sorted({*COLUMNS, *(taps * n for n in (1, 2, 4))}, reverse=True)
    shares = {
        (r, c): share for r in ROWS for c in columns if r * c > 1 and (share := _explained(matrix, (r, c))) is not None
    }
    n_zero = float((matrix == 0).float().mean())
    most = max(shares.values(), default=0.0)
    if most < FOUND:
        return (1, 1) if n_zero >= FOUND else DEFAULT
    if most < 0.9 * n_zero:
        return 1, 1
    good = [shape for shape, share in shares.items() if share >= 0.99 * most]
    return max(good, key=lambda shape: (shape[0] * shape[1], shape[0]))


def _explained(matrix: Tensor, block_shape: tuple[int, int]) -> float | None:
    """Return the share of all weights that lie in whole blocks of one magnitude; None where there is no block."""
    grid = BlockGrid(block_shape)
    covered = grid.covered(matrix)
    if not covered.numel():
        return None
    (rows, cols), (n_out, n_in) = block_shape, covered.shape
    blocks = covered.reshape(n_out // rows, rows, n_in // cols, cols)
    same = blocks.amax((1, 3)) == blocks.amin((1, 3))
    return float(same.sum()) * grid.block_numel / covered.numel()
