"""The dense layer as it is, prepacked by oneDNN, and in bfloat16 and int8: what a kernel has to beat."""

from __future__ import annotations

import copy
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_muws.runtime.kernels.base import (
    Kernel,
    Layer,
    TorchKernel,
    bias_of,
    channels_last,
    convolution_of,
    is_plain,
)


class Dense(Kernel):
    """A copy of the layer, run as it is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for any batch."""
        y = cast("Tensor", cast("nn.Module", self._modules["layer"]).forward(x))  # quicker than an attribute and a call
        return y.relu_() if self.relu else y


def build(layer: nn.Module, block_shape: tuple[int, int], example: Tensor) -> Kernel:
    """Return a copy of the layer."""
    return Dense(layer)


class Prepacked(TorchKernel):
    """The layer with its weight in the order that oneDNN reads; it is packed when the layer first runs on a CPU.

    Args:
        layer: A plain layer.
        keep_layout: Return the output in the input's memory format; otherwise oneDNN's, channels last.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: Layer, keep_layout: bool = True) -> None:
        super().__init__(layer)
        self.convolution = convolution_of(layer)
        self.keep_layout = keep_layout
        self.register_buffer("weight", layer.weight.detach().clone())
        self.register_buffer("bias", bias_of(layer))
        self.packed: tuple[int, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"packed": None}  # oneDNN's tensors can be neither copied nor saved

    def _weight(self) -> Tensor:
        version = 0 if self.weight.is_inference() else self.weight._version  # a state_dict may have been loaded since
        if self.packed is None or self.packed[0] != version:
            if self.convolution is None:
                packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)
            else:
                c = self.convolution
                packed = torch.ops.mkldnn._reorder_convolution_weight(
                    self.weight, c.padding, c.stride, c.dilation, c.groups, None
                )
            self.packed = version, packed
        return self.packed[1]

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output; torch's own operator computes other devices and dtypes, and compiled graphs."""
        c = self.convolution
        if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != self.weight.dtype or not x.numel():
            y = F.linear(x, self.weight, self.bias) if c is None else c(x, self.weight, self.bias)
            return y.relu_() if self.relu else y
        attribute = "relu" if self.relu else "none"
        if c is None:
            y = torch.ops.mkldnn._linear_pointwise(x, self._weight(), self.bias, attribute, [], "")
            return cast("Tensor", y)
        batched = x if x.dim() == 4 else x.unsqueeze(0)
        y = torch.ops.mkldnn._convolution_pointwise(
            batched, self._weight(), self.bias, c.padding, c.stride, c.dilation, c.groups, attribute, [], ""
        )
        if self.keep_layout and batched.is_contiguous():
            y = y.contiguous()
        return cast("Tensor", y if x.dim() == 4 else y.squeeze(0))


def build_prepacked(layer: nn.Module, block_shape: tuple[int, int], example: Tensor) -> Kernel | None:
    """Return the layer prepacked by oneDNN: a Linear or Conv2d of float32 on a CPU."""
    return prepacked(layer, keep_layout=True) if example.device.type == "cpu" else None


def prepacked(layer: nn.Module, *, keep_layout: bool) -> Prepacked | None:
    """Return the layer prepacked, or None if oneDNN does not have it."""
    if not is_plain(layer) or layer.weight.dtype != torch.float32 or layer.weight.device.type != "cpu":
        return None
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch's own
        return None
    if isinstance(layer, nn.Conv1d) or not layer.weight.numel():
        return None
    if isinstance(layer, nn.Conv2d) and isinstance(layer.padding, str):
        return None
    kernel = Prepacked(layer, keep_layout)
    try:
        kernel._weight()
    except (AttributeError, NotImplementedError, RuntimeError):  # a torch built without these operators
        return None
    return kernel


class HalfPrecision(TorchKernel):
    """The layer computed in bfloat16, between float32 inputs and outputs."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        rounded = copy.deepcopy(layer).to(torch.bfloat16).requires_grad_(False)
        self.rounded = channels_last(rounded) if isinstance(layer, nn.Conv2d) else rounded

    def compute(self, x: Tensor) -> Tensor:
        """Return the layer's output; input, weights and output are rounded to bfloat16."""
        y: Tensor = self.rounded(x.to(torch.bfloat16)).to(x.dtype)
        return y.contiguous()


def build_bf16(layer: nn.Module, block_shape: tuple[int, int], example: Tensor) -> Kernel | None:
    """Return a float32 layer computed in bfloat16."""
    return HalfPrecision(layer) if is_plain(layer) and layer.weight.dtype == torch.float32 else None


class Int8(TorchKernel):
    """A Linear with int8 weights, which quantizes its input at every call."""

    def __init__(self, layer: Layer, quantized: nn.Module) -> None:
        super().__init__(layer)
        self.quantized = quantized

    def compute(self, x: Tensor) -> Tensor:
        """Return the layer's output; input and weights are rounded to int8."""
        y: Tensor = self.quantized(x)
        return y


def build_int8(layer: nn.Module, block_shape: tuple[int, int], example: Tensor) -> Kernel | None:
    """Return a float32 Linear on a CPU dynamically quantized, or None if this torch does not have that."""
    if type(layer) is not nn.Linear or layer.weight.dtype != torch.float32 or example.device.type != "cpu":
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it will remove this module
        try:
            from torch.ao.quantization import quantize_dynamic

            quantized: nn.Sequential = quantize_dynamic(  # type: ignore[no-untyped-call]  # torch's own
                nn.Sequential(copy.deepcopy(layer)), {nn.Linear}
            )
        except (ImportError, RuntimeError):
            return None
    return Int8(layer, quantized[0])  # without the Sequential, which costs a call
