"""Unified blocks of one sign: sums the inputs of a block, runs a small dense layer, repeats its outputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_muws.runtime.kernels.base import (
    Build,
    Kernel,
    Layer,
    TorchKernel,
    convolution_of,
    is_plain,
    matrix_of,
    zero_bias,
)
from lightning_muws.structure.grid import BlockGrid

WORTH = 0.5  # share of the blocks that are free; above, computing them costs what pooling saves


class Pooled(TorchKernel):
    """``y = repeat(small(pool(x))) + free(x) + bias``.

    A unified block has one value, so each of its rows outputs the sum of its inputs times that value. A convolution
    whose block does not span whole kernels shares the rows only.

    Args:
        layer: Linear, or a convolution of one group.
        rows: Rows of a block.
        pool: Input features or channels of a block that share a value; 1 pools none.
        small: ``(out / rows, in / pool, ...)``, the weight of the small layer.
        free: The layer of the free blocks and of the edges; None if it has no weights.
    """

    small: Tensor
    bias: Tensor | None

    def __init__(self, layer: Layer, rows: int, pool: int, small: Tensor, free: Kernel | None) -> None:
        super().__init__(layer)
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
    """Return the kernel's row; the first of ``free_rows`` that applies computes the free blocks."""

    def build(layer: nn.Module, block_shape: tuple[int, int], example: Tensor) -> Kernel | None:
        """Return the pooled layer, or None if no block is unified with a shared sign, or more than half are free."""
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
        return Pooled(layer, rows, pool, small, free)

    return build
