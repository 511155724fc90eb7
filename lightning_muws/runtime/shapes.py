"""Infers the block shape of a weight for the kernels, which pack zeros and unified blocks by it.

``accelerate`` calls this only for weights that come without a shape. A wrong guess costs speed, never correctness:
every kernel looks at the weight's values.
"""

from __future__ import annotations

from torch import Tensor

from lightning_muws.structure.grid import BlockGrid

ROWS = (128, 64, 32, 16, 8, 4, 2, 1)
COLUMNS = (32, 16, 8, 4, 2, 1)
SAMPLE = 1 << 20  # weights examined, from the first rows on
FOUND = 0.02  # least share of the weights in zeros or in blocks of one magnitude that counts as structure
NEARLY_ALL = 0.99  # a larger shape may explain this share of what the best one does
SCATTERED = 0.9  # a shape that explains less than this share of the zeros leaves them scattered
DEFAULT = (4, 4)


def infer_shape_for_kernels(weight: Tensor) -> tuple[int, int]:
    """Return the largest common block shape whose blocks of one magnitude, zero or not, explain the weight.

    Args:
        weight: The weight of a Linear or a convolution, any floating dtype, seen as the matrix ``(out, in * kernel)``.

    Returns:
        ``(rows, cols)``; ``(1, 1)`` if the zeros are scattered singly, ``(4, 4)`` if there is no structure.

    Example:
        >>> import torch
        >>> weight = torch.randn(64, 64).view(16, 4, 8, 8) * (torch.arange(128).view(16, 1, 8, 1) % 3 == 0)
        >>> infer_shape_for_kernels(weight.view(64, 64))
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
    zeros = float((matrix == 0).float().mean())
    most = max(shares.values(), default=0.0)
    if most < FOUND:
        return (1, 1) if zeros >= FOUND else DEFAULT
    if most < SCATTERED * zeros:
        return 1, 1
    good = [shape for shape, share in shares.items() if share >= NEARLY_ALL * most]
    return max(good, key=lambda shape: (shape[0] * shape[1], shape[0]))


def _explained(matrix: Tensor, block_shape: tuple[int, int]) -> float | None:
    """Return the share of the weights that lie in whole blocks of one magnitude, or None if no block fits."""
    grid = BlockGrid(block_shape)
    covered = grid.covered(matrix)
    if not covered.numel():
        return None
    (rows, cols), (n_out, n_in) = block_shape, covered.shape
    blocks = covered.reshape(n_out // rows, rows, n_in // cols, cols)
    same = blocks.amax((1, 3)) == blocks.amin((1, 3))
    return float(same.sum()) * grid.block_numel / covered.numel()


def shapes_for_speed(taps: int, has_native: bool) -> tuple[tuple[int, int], ...]:
    """Return the block shapes that are worth measuring for a layer; the smallest one keeps most of a weight.

    The native kernels skip any zeros in a column of two to eight rows. Those of torch need large squares, or columns so
    tall that a group of outputs has its own inputs.

    Args:
        taps: Columns of an input: 9 for a convolution of 3x3, 1 for a Linear.
        has_native: Whether the native kernels can compute the layer.

    Example:
        >>> shapes_for_speed(9, has_native=True)
        ((2, 1), (4, 1), (4, 4), (8, 8))
    """
    return ((2, 1), (4, 1), (4, 4), (8, 8)) if has_native else ((8, 8), (16, 16), (32, taps), (64, taps))
