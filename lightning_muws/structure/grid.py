"""Geometry: how a weight is cut into blocks, whatever their kinds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from lightning_muws.errors import SettingError

CHUNK_NUMEL = 1 << 18  # weights that a pass handles at a time: they and its temporaries stay in a core's cache


@dataclass(frozen=True)
class BlockGrid:
    """Blocks of ``block_shape = (rows, cols)`` on the matrix view ``(out, in * kernel)`` of a weight.

    Rows and columns at the far edges that fill no block belong to none and stay dense. Sums over a block add its halves
    elementwise, again and again, so that every device and every rank gets the same bits.

    Args:
        block_shape: Outputs and inputs of a block; each at least 1.
        out_axis: Axis of the weight that runs over the outputs: 0, or 1 for a transposed convolution. Of a batched
            weight, the axis of each matrix.
        groups: Groups of a transposed convolution, whose outputs are spread over both axes; else 1.
        batched: Whether the weight is a batch of matrices, ``(batch, out, in)``. The matrix view is then the matrices
            below each other, ``(batch * out, in)``, and ``out`` must be a multiple of the block's rows, so that each
            block lies in one matrix.

    Raises:
        SettingError: A value is not allowed.

    Example:
        >>> grid = BlockGrid((2, 2))
        >>> grid.split(torch.arange(8).view(2, 4))
        tensor([[0, 1, 4, 5],
                [2, 3, 6, 7]])
    """

    block_shape: tuple[int, int] = (4, 4)
    out_axis: int = 0
    groups: int = 1
    batched: bool = False

    def __post_init__(self) -> None:
        shape: object = self.block_shape  # a configuration file may have put anything there
        sizes = shape.tolist() if hasattr(shape, "tolist") else shape
        if not isinstance(sizes, (tuple, list)) or len(sizes) != 2 or not all(is_whole(n) and n >= 1 for n in sizes):
            raise SettingError(f"block_shape={shape!r} is not allowed: give two whole numbers >= 1, such as (4, 4)")
        object.__setattr__(self, "block_shape", (int(sizes[0]), int(sizes[1])))
        if not is_whole(self.out_axis) or self.out_axis not in (0, 1):
            raise SettingError(f"out_axis={self.out_axis!r} is not allowed: give 0 or 1")
        if not isinstance(self.batched, bool):
            raise SettingError(f"batched={self.batched!r} is not allowed: give True or False")
        if not is_whole(self.groups) or self.groups < 1 or (self.batched and self.groups > 1):
            raise SettingError(
                f"groups={self.groups!r} is not allowed: give a whole number >= 1, and 1 for a batch of matrices"
            )

    @property
    def block_numel(self) -> int:
        """Weights in a block."""
        return self.block_shape[0] * self.block_shape[1]

    def matrix_shape(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
        """Return the ``(out, in * kernel)`` of a weight of this shape; ``(1, n)`` for a vector."""
        if self.batched:
            return shape[0] * shape[1 + self.out_axis], shape[2 - self.out_axis]
        if len(shape) < 2:
            return 1, int(torch.Size(shape).numel())
        n_out = shape[0] if self.out_axis == 0 else shape[1] * self.groups
        return n_out, torch.Size(shape).numel() // n_out if n_out else 0

    def fits(self, shape: torch.Size | tuple[int, ...]) -> bool:
        """Return whether a weight of this shape can be cut: any one, unless the grid is batched."""
        return not self.batched or (len(shape) == 3 and shape[1 + self.out_axis] % self.block_shape[0] == 0)

    def counts(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
        """Return how many whole blocks a weight of this shape has, ``(down, across)`` its matrix."""
        if not self.fits(shape):
            return 0, 0
        n_out, n_in = self.matrix_shape(shape)
        return n_out // self.block_shape[0], n_in // self.block_shape[1]

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the weight as ``(out, in * kernel)``: a view where its strides allow, a copy elsewhere.

        Raises:
            SettingError: The grid is batched, and the weight is no batch of matrices that blocks fill from top to
                bottom.
        """
        if not self.fits(weight.shape):
            raise SettingError(
                f"a batch of matrices needs three axes and outputs in a multiple of the block's {self.block_shape[0]} "
                f"rows, the weight has the shape {tuple(weight.shape)}, "
                f"{weight.shape[1 + self.out_axis] if weight.ndim == 3 else 'no'} outputs: change block_shape"
            )
        ordered = weight
        if self.batched:
            ordered = weight.transpose(1, 2) if self.out_axis else weight
        elif self.out_axis == 1:
            ordered = weight.reshape(self.groups, len(weight) // self.groups, *weight.shape[1:]).transpose(1, 2)
        return ordered.reshape(self.matrix_shape(weight.shape))

    def weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """Undo :meth:`matrix` for a weight of this shape."""
        if self.out_axis == 0:
            return matrix.reshape(shape)
        n_in, n_out = shape[:2]
        if self.batched:
            return matrix.reshape(shape[0], shape[2], shape[1]).transpose(1, 2).reshape(shape)
        grouped = matrix.reshape(self.groups, n_out, n_in // self.groups, *shape[2:])
        return grouped.transpose(1, 2).reshape(shape)

    def unbatched(self, shape: torch.Size | tuple[int, ...]) -> BlockGrid:
        """Return a grid that is not batched and has a border wherever this one has, for a weight of this shape.

        A matrix in a batch is seen as a group of a transposed convolution with one input: their matrix views are the
        same. Where the matrices are ``(in, out)``, the blocks are turned, and as high as divides ``in`` as well.
        """
        if not self.batched:
            return self
        rows, cols = self.block_shape
        block_shape = (math.gcd(cols, shape[1]), rows) if self.out_axis else (rows, cols)
        return BlockGrid(block_shape, out_axis=1, groups=shape[0])

    def covered(self, matrix: Tensor) -> Tensor:
        """Return the part of the matrix that whole blocks fill, a view."""
        (rows, cols), (n_out, n_in) = self.block_shape, matrix.shape
        return matrix[: n_out // rows * rows, : n_in // cols * cols]

    def edges(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two views of the matrix that no block covers: below the blocks, and right of them."""
        rows, cols = self.covered(matrix).shape
        return matrix[rows:], matrix[:rows, cols:]

    def chunks(self, covered: Tensor) -> Iterator[slice]:
        """Yield slices of block rows, so that a pass over a slice of :meth:`tall` stays in the cache."""
        down = len(covered) // self.block_shape[0] if covered.numel() else 0
        step = max(1, CHUNK_NUMEL // max(1, self.block_shape[0] * covered.shape[1]))
        if covered.device.type != "cpu":
            step = max(1, down)
        for start in range(0, down, step):
            yield slice(start, min(start + step, down))

    def parts(self, n_blocks: int, matrix: Tensor) -> Iterator[slice]:
        """Yield slices of a list of ``n_blocks`` blocks of this matrix, so that a pass over one stays in the cache."""
        step = max(1, CHUNK_NUMEL // self.block_numel) if matrix.device.type == "cpu" else max(1, n_blocks)
        for start in range(0, n_blocks, step):
            yield slice(start, min(start + step, n_blocks))

    def tall(self, covered: Tensor) -> Tensor:
        """Return the covered matrix as ``(down, rows, across * cols)``, always a view."""
        rows = self.block_shape[0]
        return covered.view(len(covered) // rows, rows, covered.shape[1])

    def sum(self, tall: Tensor) -> Tensor:
        """Return the sum over each block of a :meth:`tall` tensor, ``(down, across)``."""
        cols = self.block_shape[1]
        return fold(fold(tall, 1).view(len(tall), tall.shape[2] // cols, cols), 2).squeeze(2)

    def first(self, tall: Tensor) -> Tensor:
        """Return the first entry of each block of a :meth:`tall` tensor, ``(down, across)``."""
        return tall[:, 0, :: self.block_shape[1]]

    def spread(self, values: Tensor) -> Tensor:
        """Return values ``(down, across)``, one for each block, as ``(down, 1, across * cols)``, to broadcast."""
        (down, across), cols = values.shape, self.block_shape[1]
        return values.unsqueeze(2).expand(down, across, cols).reshape(down, 1, across * cols)

    def split(self, weight: Tensor) -> Tensor:
        """Cut ``weight`` into rows ``(n_blocks, block_numel)``, block row by block row; same dtype."""
        (rows, cols), covered = self.block_shape, self.covered(self.matrix(weight))
        down, across = covered.shape[0] // rows, covered.shape[1] // cols
        return covered.reshape(down, rows, across, cols).transpose(1, 2).reshape(down * across, rows * cols)

    def merge(self, blocks: Tensor, like: Tensor) -> Tensor:
        """Put blocks back into the shape of ``like``, which also fills what no block covers: undoes :meth:`split`."""
        matrix = self.matrix(like).clone()
        (rows, cols), covered = self.block_shape, self.covered(matrix)
        down, across = covered.shape[0] // rows, covered.shape[1] // cols
        covered.copy_(blocks.reshape(down, across, rows, cols).transpose(1, 2).reshape(covered.shape))
        return self.weight(matrix, like.shape)


def is_whole(value: object) -> bool:
    """Return whether a setting is a whole number; a boolean is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def fold(x: Tensor, dim: int) -> Tensor:
    """Return the sum over ``dim``, kept as an axis of length 1, by halving: the same bits on every device.

    The error grows with the logarithm of the length (Higham 2002, section 4.2, pairwise summation).
    """
    while (size := x.shape[dim]) > 1:
        half = size // 2
        total = x.narrow(dim, 0, half) + x.narrow(dim, size - half, half)
        x = torch.cat([total, x.narrow(dim, half, 1)], dim) if size % 2 else total
    return x
