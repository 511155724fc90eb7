"""Hands tensors to the compiled kernels, and tells torch what comes back: one operator, so one node of a graph."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_muws.errors import StateError
from lightning_muws.runtime.native.library import Layer, Signs, handle, level, library

PLANS = 512  # kept; a plan is some kilobytes


class Geometry(NamedTuple):
    """What a layer does, as whole numbers: they cross torch's operators as one list."""

    out: int
    kernel_h: int = 1
    kernel_w: int = 1
    stride_h: int = 1
    stride_w: int = 1
    pad_h: int = 0
    pad_w: int = 0
    groups: int = 1
    rows: int = 4
    cols: int = 1
    relu: int = 0
    bfloat16: int = 0
    batch_lanes: int = 0
    batch_last: int = 0

    def out_shape(self, n: Any, h: Any, w: Any) -> tuple[Any, Any, Any, Any]:
        """Return ``(n, out, oh, ow)`` for an input of n images of h times w."""
        oh = (h + 2 * self.pad_h - self.kernel_h) // self.stride_h + 1
        ow = (w + 2 * self.pad_w - self.kernel_w) // self.stride_w + 1
        return n, self.out, oh, ow


class _Plan:
    """A plan in C++ and the memory it points to. It is a pure function of its key: shapes and addresses."""

    def __init__(self, name: str, layer: Layer) -> None:
        self.layer, self.level, self.found = layer, handle(name), library()
        self.address = self.found.muws_plan(self.level, ctypes.addressof(layer)) if self.found else None

    def __del__(self) -> None:
        if self.found and self.address:
            self.found.muws_free_plan(self.level, self.address)


_plans: OrderedDict[tuple[Any, ...], _Plan] = OrderedDict()


def empty_batch_last(shape: tuple[int, int, int, int]) -> Tensor:
    """Return new memory for ``(n, c, h, w)`` with the images side by side: strides ``(1, h*w*n, w*n, n)``."""
    n, c, h, w = shape
    return torch.empty_strided(shape, (1, h * w * n, w * n, n))


def is_batch_last(x: Tensor) -> bool:
    """Say whether the images of ``(n, c, h, w)`` lie side by side."""
    n, _, h, w = x.shape
    return n > 1 and x.stride() == (1, h * w * n, w * n, n)


def block_sparse(
    x: Tensor,
    weights: Tensor,
    starts: Tensor,
    columns: Tensor,
    logical: Tensor | None,
    bias: Tensor | None,
    geometry: list[int],
) -> Tensor:
    """Return the convolution of ``x (n, c, h, w)`` with packed blocks, ``(n, out, oh, ow)`` float32.

    The layout of what comes back is contiguous, unless the geometry says ``batch_last`` or ``x`` has it.

    Args:
        x: float32 on the CPU, any strides.
        weights: ``(blocks, cols, rows)``; as bfloat16 ``(blocks, cols / 2, rows, 2)``.
        starts: ``(block rows + 1)`` int32, where the blocks of a block row start.
        columns: ``(blocks)`` int32, the first logical column of each.
        logical: ``(n)`` int32, the column of the matrix each logical column is, or None for all in order.
        bias: ``(block rows * rows)`` or None.
        geometry: The numbers of :class:`Geometry`.
    """
    g = Geometry(*geometry)
    last_in = bool(g.batch_lanes) and is_batch_last(x)
    if not last_in:
        x = x.contiguous()
    out_shape = g.out_shape(x.shape[0], x.shape[2], x.shape[3])
    last_out = bool(g.batch_lanes) and x.shape[0] > 1 and (last_in or bool(g.batch_last))
    y = empty_batch_last(out_shape) if last_out else torch.empty(out_shape)
    if not y.numel():
        return y
    name = level()
    tensors = (starts, columns, logical, weights, bias)
    pointers = tuple(0 if t is None else t.data_ptr() for t in tensors)
    key = (name, x.shape, last_in, last_out, *geometry, *pointers)
    plan = _plans.get(key)
    if plan is None:
        plan = _new_plan(key, name, x, out_shape, g, starts, logical, pointers, last_in, last_out)
    found, threads = plan.found, torch.get_num_threads()
    assert found is not None  # noqa: S101  for the type checker: _new_plan saw to it
    if g.kernel_h * g.kernel_w * x.shape[2] * x.shape[3] == 1 and x.shape[0] < 4 and not g.bfloat16 and logical is None:
        found.muws_gemv(plan.level, ctypes.addressof(plan.layer), x.data_ptr(), y.data_ptr(), threads)
    else:
        found.muws_run(plan.level, plan.address, x.data_ptr(), y.data_ptr(), threads)
    return y


def _new_plan(
    key: tuple[Any, ...],
    name: str | None,
    x: Tensor,
    out_shape: tuple[int, int, int, int],
    g: Geometry,
    starts: Tensor,
    logical: Tensor | None,
    pointers: tuple[int, ...],
    last_in: bool,
    last_out: bool,
) -> _Plan:
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise StateError(f"a native layer computes in float32 on the CPU; got {x.dtype} on {x.device}: convert it first")
    if name is None:
        raise StateError("the native kernels are not there: this layer was built where they are; build it again here")
    n, c, h, w = x.shape
    layer = Layer(n, c, h, w, *out_shape[1:], *g[1:8], g.rows, g.cols, starts.numel() - 1)
    layer.n_logical = 0 if logical is None else logical.numel()
    layer.starts, layer.columns, layer.logical, layer.weights, layer.bias = pointers
    layer.relu, layer.bfloat16, layer.batch_lanes = g.relu, g.bfloat16, g.batch_lanes
    layer.batch_last_in, layer.batch_last_out = int(last_in), int(last_out)
    plan = _Plan(name, layer)
    if not plan.address:
        raise StateError(f"an input of shape {tuple(x.shape)} is too large for the native kernels: use a smaller batch")
    _plans[key] = plan
    while len(_plans) > PLANS:
        _plans.popitem(last=False)
    return plan


def signed_linear(
    x: Tensor,
    magnitudes: Tensor,
    minus: Tensor,
    starts: Tensor,
    columns: Tensor,
    onto: Tensor | None,
    geometry: list[int],
) -> Tensor:
    """Return ``onto + W x`` for one sample ``x (in)``, the weights of W one bit each and one magnitude a block.

    Args:
        x: ``(in)`` float32 on the CPU.
        magnitudes: ``(blocks)`` float32.
        minus: uint8, a bit for each weight that is below zero; signs.h says in which order.
        starts: ``(block rows + 1)`` int32.
        columns: ``(blocks)`` int32.
        onto: ``(out)`` to add to, a bias or what other blocks gave; None for zero.
        geometry: ``[out, rows, cols, relu]``.
    """
    n_out, rows, cols, relu = geometry
    name, found = level(), library()
    if name is None or found is None:
        raise StateError("the native kernels are not there: this layer was built where they are; build it again here")
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise StateError(f"a native layer computes in float32 on the CPU; got {x.dtype} on {x.device}: convert it first")
    x = x.contiguous()
    y = torch.zeros(n_out) if onto is None else onto.clone()
    layer = Signs(x.numel(), n_out, rows, cols, starts.numel() - 1)
    layer.starts, layer.columns, layer.magnitudes = starts.data_ptr(), columns.data_ptr(), magnitudes.data_ptr()
    layer.minus, layer.add, layer.relu = minus.data_ptr(), 1, relu
    found.muws_signs(handle(name), ctypes.addressof(layer), x.data_ptr(), y.data_ptr(), torch.get_num_threads())
    return y
