"""Unified blocks that share their sign: sum the inputs of a block, a small dense layer, repeat its outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_muws.runtime.kernels.base import (
    Kernel,
    Layer,
    convolution_of,
    is_plain,
    matrix_of,
    zero_bias,
)
from lightning_muws.structure.grid import BlockGrid

Build = Callable[..., nn.Module | None]
WORTH = 0.5  # of the blocks that are free; above, their own term costs what pooling saves


class Pooled(Kernel):
    """``y = repeat(small(pool(x))) + free(x) + bias``.

    A unified block has one value, so the sum over its inputs times that value is the output of each of its rows. Of a
    convolution whose block does not span whole kernels only the rows are shared.

    Args:
        layer: Linear, or a convolution of one group.
        relu: Whether ReLU ends it.
        rows: Rows of a block.
        pool: Input features or channels of a block that share a value; 1 pools none.
        small: The weight of the small layer.
        free: The layer of the blocks that are free, and of the edges; None where there are none.
    """

    small: Tensor
    bias: Tensor | None

    def __init__(self, layer: Layer, relu: bool, rows: int, pool: int, small: Tensor, free: nn.Module | None) -> None:
        super().__init__(layer, relu)
        self.convolution = convolution_of(layer)
        self.rows, self.pool, self.n_out = rows, pool, len(layer.weight)
        self.free = free
        self.register_buffer("small", small.contiguous())
        self.register_buffer("bias", zero_bias(layer) if layer.bias is not None else None)

    def compute(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        c = self.convolution
        axis = x.dim() - 1 if c is None else c.channel_axis(x)
        pooled = x
        if self.pool > 1:
            pooled = x.narrow(axis, 0, self.small.shape[1] * self.pool)
            sizes = (*x.shape[:axis], self.small.shape[1], self.pool, *x.shape[axis + 1 :])
            pooled = pooled.reshape(sizes).sum(axis + 1)
        y = F.linear(pooled, self.small) if c is None else c(pooled, self.small, None)
        y = y.repeat_interleave(self.rows, axis)
        if (n_edge := self.n_out - y.shape[axis]) > 0:
            y = torch.cat([y, y.new_zeros(*y.shape[:axis], n_edge, *y.shape[axis + 1 :])], axis)
        if self.free is not None:
            y += self.free(x)
        if self.bias is not None:
            y += self.bias.view(-1, *[1] * (y.dim() - 1 - axis))
        return y


def builder(free_rows: Sequence[Build]) -> Build:
    """Return the kernel's row, whose free blocks are left to the first of these rows that takes them."""

    def build(
        layer: nn.Module, block_shape: tuple[int, int], example: Tensor, *, relu: bool = False
    ) -> nn.Module | None:
        """Return the pooled layer, or None where no block is unified with shared signs, or half of them are free."""
        if not is_plain(layer) or getattr(layer, "groups", 1) != 1 or block_shape == (1, 1):
            return None
        grid, matrix = BlockGrid(block_shape), matrix_of(layer)
        covered = grid.covered(matrix)
        if not covered.numel():
            return None
        blocks = grid.split(matrix)
        value = blocks[:, 0]
        one_value = (blocks == value.unsqueeze(1)).all(1)
        if not (one_value & (value != 0)).any() or (~one_value).float().mean() > WORTH:
            return None
        rows, cols = block_shape
        values = torch.where(one_value, value, 0).view(grid.counts(matrix.shape))
        taps = matrix.shape[1] // layer.weight.shape[1]
        pool = cols // taps if cols % taps == 0 else 1
        if rows * pool == 1:
            return None
        spread = F.pad(grid.spread(values).squeeze(1), (0, matrix.shape[1] - covered.shape[1]))
        if cols % taps == 0:
            kernel = layer.weight.shape[2:]
            small = values.view(*values.shape, *[1] * len(kernel)).expand(*values.shape, *kernel)
        else:
            small = spread.view(len(spread), *layer.weight.shape[1:])
        rest = matrix - F.pad(spread.repeat_interleave(rows, 0), (0, 0, 0, len(matrix) - len(covered)))
        rest = torch.where(rest == 0, 0, matrix)
        free = None
        if rest.any():
            remainder = copy.deepcopy(layer)
            remainder.bias = None
            remainder.weight = nn.Parameter(rest.view(layer.weight.shape), requires_grad=False)
            free = next((k for row in free_rows if (k := row(remainder, block_shape, example)) is not None), None)
            if free is None:
                return None
        return Pooled(layer, relu, rows, pool, small, free)

    return build
