"""Passes tensors to the kernels of 8 bits. A plan is made once per layer and input shape; then a call is cheap."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_muws.runtime.native.library import Int8, level
from lightning_muws.runtime.native.plan import PLANS, check_width, identity, level_for, settled


class Geometry8(NamedTuple):
    """What a layer of 8 bits computes, as whole numbers, which torch's operators take as one list."""

    out: int
    kernel_h: int = 1
    kernel_w: int = 1
    stride_h: int = 1
    stride_w: int = 1
    pad_h: int = 0
    pad_w: int = 0
    groups: int = 1
    rows: int = 4
    loose: int = 0
    linear: int = 0
    dynamic: int = 0
    relu: int = 0
    n_in: int = 0  # inputs of a sample, or channels of an image; 0 in programs that were exported without it

    def out_shape(self, shape: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return ``(n, out)`` for a Linear, and ``(n, out, oh, ow)`` for images ``(n, c, h, w)``."""
        if self.linear:
            return shape[0], self.out
        oh = (shape[2] + 2 * self.pad_h - self.kernel_h) // self.stride_h + 1
        ow = (shape[3] + 2 * self.pad_w - self.kernel_w) // self.stride_w + 1
        return shape[0], self.out, oh, ow


class Blocks8(NamedTuple):
    """The tensors of a packed layer: those of :class:`~lightning_muws.runtime.native.quantize.Packed8`, and these.

    Attributes:
        bias: ``(block rows * rows)`` float32 or None.
        activation: ``(2)`` float32, the scale and the zero of the input: ``x = scale * (q - zero)``, q from 0 to 255.
            Not read if the geometry is dynamic.
    """

    weights: Tensor
    starts: Tensor
    columns: Tensor
    sums: Tensor
    scales: Tensor
    bias: Tensor | None
    activation: Tensor


def layer8(shape: tuple[int, ...], blocks: Blocks8, g: Geometry8) -> Int8:
    """Return a layer as the kernels take it, for an input of this shape; it points into ``blocks``."""
    n, c, h, w = (*shape, 1, 1) if g.linear else shape
    _, o, oh, ow = (*g.out_shape(shape), 1, 1) if g.linear else g.out_shape(shape)
    layer = Int8(n, c, h, w, o, oh, ow, *g[1:8], g.rows, blocks.starts.numel() - 1, g.loose, g.linear, g.dynamic)
    for name, tensor in blocks._asdict().items():
        setattr(layer, name, 0 if tensor is None else tensor.data_ptr())
    layer.relu = g.relu
    return layer


class Plan8:
    """A layer of 8 bits prepared for inputs of one shape."""

    def __init__(self, x: Tensor, blocks: Blocks8, g: Geometry8) -> None:
        self.blocks = blocks  # the structure points into them
        self.found, self.level = level_for(x)
        check_width(x.shape, x.shape[1], g.n_in)
        self.x_shape = x.shape
        self.shape = g.out_shape(x.shape)
        self.layer = layer8(x.shape, blocks, g)
        self.address = ctypes.addressof(self.layer)
        self.is_empty = 0 in self.shape

    def is_for(self, x: Tensor, tensors: Mapping[str, Tensor | None]) -> bool:
        """Return whether the plan fits this input and these buffers; quicker than a look-up in a table."""
        blocks = self.blocks
        return (
            x.shape == self.x_shape
            and x.dtype is torch.float32
            and all(tensors[name] is tensor for name, tensor in zip(Blocks8._fields, blocks, strict=True))
            and blocks.weights.data_ptr() == self.layer.weights
        )

    def takes(self, onto: Tensor) -> bool:
        """Return whether the kernel can add this tensor to the output as it writes it."""
        plain = onto.dtype == torch.float32 and onto.device.type == "cpu"
        return plain and onto.is_contiguous() and onto.shape == self.shape

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return the output for an ``x`` of this plan's shape, plus ``onto`` if given."""
        x = x.contiguous()
        y = torch.empty(self.shape)
        if not self.is_empty:
            added = 0 if onto is None else onto.data_ptr()
            self.found.muws_int8(self.level, self.address, x.data_ptr(), added, y.data_ptr(), torch.get_num_threads())
        return y


_plans: OrderedDict[tuple[Any, ...], Plan8] = OrderedDict()


def int8_sparse(
    x: Tensor,
    weights: Tensor,
    starts: Tensor,
    columns: Tensor,
    sums: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    activation: Tensor,
    geometry: list[int],
) -> Tensor:
    """Return the layer of :class:`Blocks8` for ``x``, ``(n, in)`` if it is a Linear, else ``(n, c, h, w)``; float32."""
    blocks = Blocks8(weights, starts, columns, sums, scales, bias, activation)
    key = (level(), x.dtype, x.device, x.shape, *geometry, *map(identity, blocks))
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = Plan8(x, Blocks8(*map(settled, blocks)), Geometry8(*geometry))  # type: ignore[arg-type]
        while len(_plans) > PLANS:
            _plans.popitem(last=False)
    return plan(x)
