"""One bit per weight in C++: a Linear of unified blocks, one sample at a time; packed blocks compute the others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_muws.runtime.kernels.base import Kernel, bias_of, matrix_of
from lightning_muws.runtime.kernels.native import BlockSparse, geometry_of, is_native, most_rows
from lightning_muws.runtime.native.ops import signed_linear_op
from lightning_muws.runtime.native.packing import PackedSigns, choose_block, pack, pack_signs
from lightning_muws.runtime.native.plan import refuse_gradient, signed_linear


class SignedLinear(Kernel):
    """A Linear for one sample at a time: unified blocks by their signs, the others by packed blocks.

    Args:
        packed: The unified blocks.
        bias: ``(out)`` float32, or None; None if ``rest`` adds it.
        rest: Computes the other blocks; None if there are none.
        n_out: Outputs.
        n_in: Inputs.
    """

    magnitudes: Tensor
    minus: Tensor
    starts: Tensor
    columns: Tensor
    bias: Tensor | None

    def __init__(
        self, packed: PackedSigns, bias: Tensor | None, rest: BlockSparse | None, n_out: int, n_in: int
    ) -> None:
        super().__init__()
        for name in ("magnitudes", "minus", "starts", "columns"):
            self.register_buffer(name, getattr(packed, name))
        self.register_buffer("bias", bias)
        self.rest = rest
        self.n_out, self.n_in, self.block_shape = n_out, n_in, (packed.rows, packed.cols)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, one sample after the other.

        Raises:
            StateError: If ``x`` needs a gradient, is not float32 on the CPU, or is not as wide as the layer.
        """
        refuse_gradient(x)
        samples = x.reshape(-1, x.shape[-1])
        outputs = [self.one(sample) for sample in samples]
        y = outputs[0].unsqueeze(0) if len(outputs) == 1 else torch.stack(outputs) if outputs else x.new_empty(0)
        return y.view(*x.shape[:-1], self.n_out)

    def one(self, x: Tensor) -> Tensor:
        """Return the output of one sample ``x (in)``."""
        run = signed_linear_op if torch.compiler.is_compiling() else signed_linear
        onto = self.bias if self.rest is None else self.rest(x.unsqueeze(0)).squeeze(0)
        geometry = [self.n_out, *self.block_shape, int(self.relu), self.n_in]
        y: Tensor = run(x, self.magnitudes, self.minus, self.starts, self.columns, onto, geometry)
        return y


def build(layer: nn.Module, block_shape: tuple[int, int], example: Tensor) -> SignedLinear | None:
    """Return the layer by signs, or None if it is no Linear of unified blocks or the example is a batch."""
    if not is_native(layer, example) or not isinstance(layer, nn.Linear) or example.numel() != layer.in_features:
        return None
    rows, cols = block_shape
    if block_shape != (4, 4) and not (rows in {4, 8, 16} and cols % 8 == 0):
        return None
    matrix, bias = matrix_of(layer), bias_of(layer)
    if matrix.shape[0] % rows or matrix.shape[1] % cols:
        return None
    packed, others = pack_signs(matrix, rows, cols)
    if not len(packed.magnitudes):
        return None
    rest = None
    if torch.any(others != 0):
        numbers = choose_block(others, block_shape, len(others), most_rows())
        plain = geometry_of(layer)._replace(rows=numbers[0], cols=numbers[1], batch_lanes=1)
        rest, bias = BlockSparse(pack(others, *numbers), bias, plain, 1), None
    return SignedLinear(packed, bias, rest, *matrix.shape)
