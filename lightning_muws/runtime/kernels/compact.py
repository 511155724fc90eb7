"""Drops rows, columns and channels that are all zero: a smaller dense layer, exact on any device and in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_muws.runtime.kernels.base import Kernel, Layer, TorchKernel, bias_of, convolution_of, is_plain, zero_bias

WORTH = 0.95  # share of the weights left; above, nothing is gained


class Compact(TorchKernel):
    """The dense layer of the inputs and outputs that have weights.

    Args:
        layer: Linear, or a convolution of one group.
        rows: ``(n_rows)`` int64, the outputs that have a weight other than zero.
        columns: ``(n_columns)`` int64, the inputs that have one.
    """

    weight: Tensor
    bias: Tensor | None
    columns: Tensor | None
    rows: Tensor | None
    constant: Tensor

    def __init__(self, layer: Layer, rows: Tensor, columns: Tensor) -> None:
        super().__init__(layer)
        weight = layer.weight.detach()
        self.convolution = convolution_of(layer)
        n_out, n_in = len(weight), weight.shape[1]
        bias = bias_of(layer)
        self.register_buffer("weight", weight[rows][:, columns].contiguous())
        self.register_buffer("columns", columns if len(columns) < n_in else None)
        self.register_buffer("rows", rows if len(rows) < n_out else None)
        self.register_buffer("bias", bias if bias is None or len(rows) == n_out else bias[rows])
        self.register_buffer("constant", zero_bias(layer))

    def compute(self, x: Tensor) -> Tensor:
        """Return the small layer's output, and the bias for outputs whose weights are all zero."""
        c = self.convolution
        axis = x.dim() - 1 if c is None else c.channel_axis(x)
        if self.columns is not None:
            x = x.index_select(axis, self.columns)
        y = F.linear(x, self.weight, self.bias) if c is None else c(x, self.weight, self.bias)
        if self.rows is None:
            return y
        shape = [1] * y.dim()
        shape[axis] = len(self.constant)
        sizes = [*y.shape]
        sizes[axis] = len(self.constant)
        # a copy, always: expanded to a batch of one, the buffer itself would be contiguous
        whole = self.constant.view(shape).expand(sizes).clone(memory_format=torch.contiguous_format)
        return whole.index_copy_(axis, self.rows, y)


def build(layer: nn.Module, block_shape: tuple[int, int], example: Tensor) -> Kernel | None:
    """Return the compact layer, or None if it would drop fewer than one weight in twenty."""
    if not is_plain(layer) or getattr(layer, "groups", 1) != 1 or not layer.weight.numel():
        return None
    used = (layer.weight.detach() != 0).flatten(2).any(2) if layer.weight.dim() > 2 else layer.weight.detach() != 0
    rows, columns = (used.any(axis).nonzero().squeeze(1) for axis in (1, 0))
    if not len(rows):  # all weights are zero: keep one of each, as operators refuse empty tensors
        rows = columns = torch.zeros(1, dtype=torch.long, device=layer.weight.device)
    if len(rows) * len(columns) > WORTH * used.numel():
        return None
    return Compact(layer, rows, columns)
