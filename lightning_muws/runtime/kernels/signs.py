"""One bit a weight in C++: a Linear of unified blocks, one sample at a time; what is not unified by packed blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_muws.runtime.kernels.native import geometry_of, matrix_of, most_rows
from lightning_muws.runtime.native.modules import BlockSparse, SignedLinear
from lightning_muws.runtime.native.packing import choose_block, pack, pack_signs


def build(
    layer: nn.Module, block_shape: tuple[int, int], example: Tensor, *, relu: bool = False
) -> SignedLinear | None:
    """Return the Linear by signs, or None where it is none, holds no unified block, or the example is a batch."""
    geometry, (rows, cols) = geometry_of(layer, example, relu), block_shape
    if geometry is None or type(layer) is not nn.Linear or example.numel() != layer.in_features:
        return None
    if block_shape != (4, 4) and not (rows in {4, 8, 16} and cols % 8 == 0):
        return None
    matrix, bias = matrix_of(layer)
    if matrix.shape[0] % rows or matrix.shape[1] % cols:
        return None
    packed, others = pack_signs(matrix, rows, cols)
    if not len(packed.magnitudes):
        return None
    rest = None
    if torch.any(others != 0):
        numbers = choose_block(others, block_shape, len(others), most_rows())
        plain = geometry._replace(rows=numbers[0], cols=numbers[1], relu=0, batch_lanes=1)
        rest, bias = BlockSparse(pack(others, *numbers), bias, plain, 1), None
    return SignedLinear(packed, bias, rest, len(matrix), relu)
