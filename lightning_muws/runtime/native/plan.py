"""Passes tensors to the compiled kernels. A plan is made once per layer and input shape; then a call is cheap."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_muws.errors import StateError
from lightning_muws.runtime.native.library import BFLOAT16_LEVEL, Layer, Signs, handle, level

PLANS = 512  # kept for the operators; a plan is some kilobytes
SMALL = 16  # elements of a tensor that is known by its numbers
GEMV_SAMPLES = 3  # up to so many samples, a Linear runs one by one instead of laying samples side by side


class Geometry(NamedTuple):
    """What a layer computes, as whole numbers, which torch's operators take as one list."""

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
    n_in: int = 0  # inputs of a sample, or channels of an image; 0 in programs that were exported without it
    mark: int = (
        0  # checksum of the logical columns, which a plan copies: other numbers at their address need another plan
    )

    def out_shape(self, n: Any, h: Any, w: Any) -> tuple[Any, Any, Any, Any]:
        """Return ``(n, out, oh, ow)`` for an input of n images of h times w."""
        oh = (h + 2 * self.pad_h - self.kernel_h) // self.stride_h + 1
        ow = (w + 2 * self.pad_w - self.kernel_w) // self.stride_w + 1
        return n, self.out, oh, ow


class Blocks(NamedTuple):
    """The tensors of a packed layer.

    Attributes:
        weights: ``(blocks, cols, rows)`` float32; as bfloat16 ``(blocks, rows, 2)``.
        starts: ``(block rows + 1)`` int32, where the blocks of a block row start.
        columns: ``(blocks)`` int16, read as unsigned: the first column of each; not read for bfloat16.
        logical: ``(2 * blocks)`` int32, the two columns of each bfloat16 block, else None.
        bias: ``(block rows * rows)`` float32 or None.
    """

    weights: Tensor
    starts: Tensor
    columns: Tensor
    logical: Tensor | None
    bias: Tensor | None


def batch_last_strides(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the strides of ``(n, c, h, w)`` with the images side by side."""
    n, _, h, w = shape
    return 1, h * w * n, w * n, n


def is_batch_last(x: Tensor) -> bool:
    """Return whether the images of ``(n, c, h, w)`` lie side by side."""
    return x.shape[0] > 1 and x.stride() == batch_last_strides(x.shape)


class Plan:
    """A layer prepared for inputs of one shape and strides."""

    def __init__(self, x: Tensor, blocks: Blocks, g: Geometry) -> None:
        self.blocks = blocks  # the plan in C++ points into them
        self.found, self.level = level_for(x)
        self.last_in = g.batch_lanes == 1 and is_batch_last(x)
        self.is_ready = self.last_in or x.is_contiguous()
        self.x_shape, self.x_strides = x.shape, x.stride()
        n, c, h, w = x.shape
        check_width(x.shape, c, g.n_in)
        self.shape = g.out_shape(n, h, w)
        last_out = g.batch_lanes == 1 and n > 1 and (self.last_in or bool(g.batch_last))
        self.strides = batch_last_strides(self.shape) if last_out else None
        self.adds = g.batch_lanes != 1 or last_out  # elsewhere outputs are transposed before they are stored
        layer = Layer(n, c, h, w, *self.shape[1:], *g[1:8], g.rows, g.cols, blocks.starts.numel() - 1)
        layer.n_logical = 0 if blocks.logical is None else blocks.logical.numel()
        for name, tensor in blocks._asdict().items():
            setattr(layer, name, 0 if tensor is None else tensor.data_ptr())
        layer.relu, layer.bfloat16, layer.batch_lanes = g.relu, g.bfloat16, g.batch_lanes
        layer.batch_last_in, layer.batch_last_out = int(self.last_in), int(last_out)
        layer.threads = torch.get_num_threads()
        self.layer, self.address = layer, None
        is_linear = g.kernel_h * g.kernel_w * h * w * g.groups == 1 and not g.pad_h and not g.pad_w
        self.is_gemv = is_linear and n <= GEMV_SAMPLES and not g.bfloat16 and not last_out  # it knows no other layout
        if self.is_gemv or 0 in self.shape:
            return
        if g.bfloat16 and level() != BFLOAT16_LEVEL:
            raise StateError(
                f"a bfloat16 layer needs the level {BFLOAT16_LEVEL}; this machine uses {level()}: call accelerate() "
                "again here"
            )
        self.address = self.found.muws_plan(self.level, ctypes.addressof(layer))
        if not self.address:
            raise StateError(f"an input of shape {tuple(x.shape)} is too large for the native kernels: lower the batch")

    def is_for(self, x: Tensor, tensors: Mapping[str, Tensor | None]) -> bool:
        """Return whether the plan fits this input and these buffers; quicker than a look-up in a table."""
        blocks = self.blocks
        return (
            x.shape == self.x_shape
            and x.stride() == self.x_strides
            and x.dtype is torch.float32
            and tensors["weights"] is blocks.weights
            and tensors["starts"] is blocks.starts
            and tensors["columns"] is blocks.columns
            and tensors["logical"] is blocks.logical
            and tensors["bias"] is blocks.bias
            and blocks.weights.data_ptr() == self.layer.weights
        )

    def takes(self, onto: Tensor) -> bool:
        """Return whether the kernel can add this tensor to the output as it writes it."""
        strides = batch_last_strides(self.shape) if self.strides else None
        laid = onto.stride() == strides if strides else onto.is_contiguous()
        plain = onto.dtype == torch.float32 and onto.device.type == "cpu"
        return bool(self.address and self.adds and laid and plain and onto.shape == self.shape)

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return the output for an ``x`` of this plan's shape and strides, plus ``onto`` if given."""
        if not self.is_ready:
            x = x.contiguous()
        y = torch.empty(self.shape) if self.strides is None else torch.empty_strided(self.shape, self.strides)
        if self.address:
            added = 0 if onto is None else onto.data_ptr()
            self.found.muws_run(self.level, self.address, x.data_ptr(), added, y.data_ptr(), torch.get_num_threads())
        elif self.is_gemv:
            layer = ctypes.addressof(self.layer)
            self.found.muws_gemv(self.level, layer, x.data_ptr(), y.data_ptr(), torch.get_num_threads())
        return y

    def __del__(self) -> None:
        if getattr(self, "address", None):
            self.found.muws_free_plan(self.level, self.address)


def is_small(tensor: Tensor) -> bool:
    """Return whether a layer's tensor is told from others by its numbers, and not by its address.

    A program of AOTInductor makes its small constants anew at each call.
    """
    return tensor.numel() <= SMALL


def identity(tensor: Tensor | None) -> int | tuple[float, ...]:
    """Return what tells a layer's tensor from others."""
    if tensor is None:
        return 0
    return tuple(tensor.flatten().tolist()) if is_small(tensor) else tensor.data_ptr()


def settled(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor, or a copy of a small one, which may be gone after this call."""
    return tensor.clone() if tensor is not None and is_small(tensor) else tensor


_plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()


def block_sparse(
    x: Tensor,
    weights: Tensor,
    starts: Tensor,
    columns: Tensor,
    logical: Tensor | None,
    bias: Tensor | None,
    geometry: list[int],
) -> Tensor:
    """Return the convolution of ``x (n, c, h, w)`` with :class:`Blocks`, ``(n, out, oh, ow)`` float32.

    It is contiguous, unless the geometry has ``batch_last`` or the images of ``x`` lie side by side.
    """
    blocks = Blocks(weights, starts, columns, logical, bias)
    # a plan is a pure function of these
    key = (level(), x.dtype, x.shape, x.stride(), *geometry, *map(identity, blocks))
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = Plan(x, Blocks(*map(settled, blocks)), Geometry(*geometry))  # type: ignore[arg-type]
        while len(_plans) > PLANS:
            _plans.popitem(last=False)
    return plan(x)


def signed_linear(
    x: Tensor,
    magnitudes: Tensor,
    minus: Tensor,
    starts: Tensor,
    columns: Tensor,
    onto: Tensor | None,
    geometry: list[int],
) -> Tensor:
    """Return ``onto + W x`` for one sample; W has one bit per weight and one magnitude per block.

    Args:
        x: ``(in)`` float32 on the CPU.
        magnitudes: ``(blocks)`` float32.
        minus: uint8, a bit for each weight, set if it is negative; signs.h gives the order.
        starts: ``(block rows + 1)`` int32, where the blocks of a block row start.
        columns: ``(blocks)`` int16, read as unsigned: the first column of each.
        onto: ``(out)``, a bias or the output of other blocks; None for zero.
        geometry: ``[out, rows, cols, relu, in]``; without the last one in programs that were exported so.
    """
    n_out, rows, cols, relu, n_in = (*geometry, 0)[:5]
    found, address = level_for(x)
    check_width(x.shape, len(x), n_in)
    x = x.contiguous()
    y = torch.zeros(n_out) if onto is None else onto.clone(memory_format=torch.contiguous_format)
    layer = Signs(n_out, rows, cols, starts.numel() - 1)
    layer.starts, layer.columns, layer.magnitudes = starts.data_ptr(), columns.data_ptr(), magnitudes.data_ptr()
    layer.minus, layer.relu = minus.data_ptr(), relu
    found.muws_signs(address, ctypes.addressof(layer), x.data_ptr(), y.data_ptr(), torch.get_num_threads())
    return y


def check_width(shape: tuple[int, ...], given: int, n_in: int) -> None:
    """Check that an input is as wide as the layer, whose kernels would read past its end.

    Args:
        shape: Of the input, for the message.
        given: Its numbers of a sample, or its channels.
        n_in: What the layer takes; 0 if that is not known.

    Raises:
        StateError: It is not.
    """
    if n_in and given != n_in:
        raise StateError(
            f"a native layer of {n_in} inputs or channels got {given}, in an input of shape {tuple(shape)}"
        )


def refuse_gradient(x: Tensor) -> None:
    """Raise if the call should record a gradient.

    Raises:
        StateError: If ``x`` requires one and gradients are enabled.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise StateError(
            "a native layer has no gradient: run it under torch.inference_mode(), or train the dense model"
        )


def level_for(x: Tensor) -> tuple[ctypes.CDLL, int]:
    """Return the library and the level in use, for an input that the kernels take.

    Raises:
        StateError: ``x`` is not float32 on the CPU, or the kernels are not installed.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise StateError(
            f"a native layer computes in float32 on the CPU; got {x.dtype} on {x.device}: convert it first"
        )
    name = level()
    if name is None:
        raise StateError(
            "this layer needs the native kernels, which are not installed here: call accelerate() again on this machine"
        )
    return handle(name)
