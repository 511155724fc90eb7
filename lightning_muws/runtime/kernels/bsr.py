"""torch's block-sparse rows: square blocks, ``(W @ x.T.contiguous()).T``; convolutions by unfolding."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_muws.runtime.kernels.base import (
    Convolution,
    Kernel,
    Layer,
    TorchKernel,
    bias_of,
    convolution_of,
    is_plain,
    matrix_of,
)

WORTH = 0.6  # share of the blocks left; above, it does not win (break-even measured at 0.25 to 0.4)
SIDES = {"cpu": (16, 8, 4), "cuda": (64, 32, 16)}  # Triton needs at least 16


class Bsr(TorchKernel):
    """The matrix in torch's BSR layout. On a CPU it avoids ``F.linear``, which is 4 to 12 times slower than dense.

    Args:
        layer: Linear, Conv1d or Conv2d of one group.
        side: Rows and columns of a block.
    """

    first: Tensor
    column: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, layer: Layer, side: int) -> None:
        super().__init__(layer)
        self.convolution = convolution_of(layer)
        self.kernel_size = () if self.convolution is None else tuple(layer.weight.shape[2:])
        matrix = matrix_of(layer)
        self.shape = tuple(matrix.shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Sparse BSR tensor support is in beta state"
            sparse = matrix.to_sparse_bsr((side, side))
        self.register_buffer("first", sparse.crow_indices().to(torch.int32))
        self.register_buffer("column", sparse.col_indices().to(torch.int32))
        self.register_buffer("values", sparse.values().clone())
        self.register_buffer("bias", bias_of(layer))
        self.tensor: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"tensor": None}

    def _matrix(self) -> Tensor:
        if self.tensor is None or self.tensor.device != self.values.device or self.tensor.dtype != self.values.dtype:
            with warnings.catch_warnings(), torch.inference_mode(False):
                warnings.simplefilter("ignore")
                self.tensor = torch.sparse_bsr_tensor(
                    self.first, self.column, self.values, self.shape, check_invariants=False
                )
        return self.tensor

    def _product(self, columns: Tensor) -> Tensor:
        """Return ``W @ columns`` for ``(in, n)``."""
        if columns.device.type == "cpu":
            return self._matrix() @ columns.contiguous()
        return F.linear(columns.t(), self._matrix()).t()  # on CUDA this reaches Triton's kernel

    def compute(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        c = self.convolution
        if c is None:
            y = self._product(x.reshape(-1, x.shape[-1]).t()).t().reshape(*x.shape[:-1], self.shape[0])
            return y if self.bias is None else y.add_(self.bias)
        batched = x if c.channel_axis(x) == 1 else x.unsqueeze(0)
        y = self._unfolded(batched, c)
        if self.bias is not None:
            y.add_(self.bias.view(-1, *[1] * c.n_spatial))
        return y if batched is x else y.squeeze(0)

    def _unfolded(self, x: Tensor, c: Convolution) -> Tensor:
        kernel, stride, dilation = self.kernel_size, c.stride, c.dilation
        padding = tuple(int(p) for p in c.padding)  # build refuses "same" and "valid"
        if c.n_spatial == 1:
            x, kernel, stride, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
            padding = (0, *padding)
        n, _, height, width = x.shape
        sizes = zip((height, width), kernel, stride, dilation, padding, strict=True)
        out = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, d, p in sizes]
        if kernel == (1, 1) and stride == (1, 1) and padding == (0, 0):
            columns = x.flatten(2)
        else:
            columns = F.unfold(x, kernel, dilation, padding, stride)
        columns = columns[0] if n == 1 else columns.transpose(0, 1).reshape(columns.shape[1], -1)
        y = self._product(columns).view(self.shape[0], n, *out).transpose(0, 1).contiguous()
        return y.squeeze(2) if c.n_spatial == 1 else y


def build(layer: nn.Module, block_shape: tuple[int, int], example: Tensor) -> Kernel | None:
    """Return the layer in BSR, or None: on a CPU it takes float32 and float64, and blocks of 4, 8 or 16."""
    if not is_plain(layer) or getattr(layer, "groups", 1) != 1 or isinstance(getattr(layer, "padding", ()), str):
        return None
    device = layer.weight.device.type
    if device not in SIDES or (device == "cpu" and layer.weight.dtype not in (torch.float32, torch.float64)):
        return None
    matrix = matrix_of(layer)
    common = math.gcd(*matrix.shape)
    shares = {}
    for side in SIDES[device]:
        if common and common % side == 0:
            blocks = matrix.view(matrix.shape[0] // side, side, matrix.shape[1] // side, side)
            shares[side] = _share(blocks)
    if not shares or min(shares.values()) > WORTH or min(shares.values()) == 0:
        return None
    # The largest side whose blocks keep at most 5 % more weights than those of the finest.
    side = next(side for side, share in shares.items() if share <= 1.05 * min(shares.values()))
    return Bsr(layer, side)


def _share(blocks: Tensor) -> float:
    """Return the share of blocks ``(down, side, across, side)`` that are not zero."""
    return float((blocks != 0).any(3).any(1).float().mean())
