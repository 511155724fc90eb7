"""The dense layer as it is, as oneDNN prepacks it, and in bfloat16 and int8: what a kernel has to beat."""

from __future__ import annotations

import copy
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_muws.runtime.kernels.base import Kernel, Layer, bias_of, channels_last, convolution_of, is_plain


def build(layer: nn.Module, block_shape: tuple[int, int], example: Tensor, *, relu: bool = False) -> nn.Module | None:
    """Return a copy of the layer, followed by ReLU where asked for."""
    return nn.Sequential(copy.deepcopy(layer), nn.ReLU()) if relu else copy.deepcopy(layer)


class Prepacked(Kernel):
    """The layer with its weight in the order that oneDNN reads, packed when it first runs on a CPU.

    Args:
        layer: A plain layer.
        relu: Whether ReLU ends it, fused.
        keep_layout: Give the output in the input's memory format; otherwise as oneDNN leaves it, channels last.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: Layer, relu: bool, keep_layout: bool = True) -> None:
        super().__init__(layer, relu)
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
        """Return the layer's output for any batch; on another device, in another dtype, or compiled, torch's own."""
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


def build_prepacked(
    layer: nn.Module, block_shape: tuple[int, int], example: Tensor, *, relu: bool = False
) -> nn.Module | None:
    """Return the layer prepacked by oneDNN: float32 on a CPU, Linear and Conv2d."""
    return prepacked(layer, relu=relu, keep_layout=True) if example.device.type == "cpu" else None


def prepacked(layer: nn.Module, *, relu: bool = False, keep_layout: bool) -> Prepacked | None:
    """Return the layer prepacked, or None where oneDNN does not have it."""
    if not is_plain(layer) or layer.weight.dtype != torch.float32 or layer.weight.device.type != "cpu":
        return None
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch's own
        return None
    if isinstance(layer, nn.Conv1d) or not layer.weight.numel():
        return None
    if isinstance(layer, nn.Conv2d) and isinstance(layer.padding, str):
        return None
    kernel = Prepacked(layer, relu, keep_layout)
    try:
        kernel._weight()
    except (AttributeError, NotImplementedError, RuntimeError):  # a torch built without these operators
        return None
    return kernel


class HalfPrecision(Kernel):
    """The layer computed in bfloat16, between float32 inputs and outputs."""

    def __init__(self, layer: Layer, relu: bool) -> None:
        super().__init__(layer, relu)
        rounded = copy.deepcopy(layer).to(torch.bfloat16).requires_grad_(False)
        self.rounded = channels_last(rounded) if isinstance(layer, nn.Conv2d) else rounded

    def compute(self, x: Tensor) -> Tensor:
        """Return the layer's output, rounded to bfloat16 on the way."""
        y: Tensor = self.rounded(x.to(torch.bfloat16)).to(x.dtype)
        return y.contiguous()


def build_bf16(
    layer: nn.Module, block_shape: tuple[int, int], example: Tensor, *, relu: bool = False
) -> nn.Module | None:
    """Return the float32 layer computed in bfloat16."""
    return HalfPrecision(layer, relu) if is_plain(layer) and layer.weight.dtype == torch.float32 else None


def build_int8(
    layer: nn.Module, block_shape: tuple[int, int], example: Tensor, *, relu: bool = False
) -> nn.Module | None:
    """Return a Linear on a CPU with weights in int8 and its input quantised as it comes, where torch still has it."""
    if type(layer) is not nn.Linear or layer.weight.dtype != torch.float32 or example.device.type != "cpu":
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that this module will be removed
        try:
            from torch.ao.quantization import quantize_dynamic

            quantized: nn.Module = quantize_dynamic(  # type: ignore[no-untyped-call]  # torch's own
                nn.Sequential(copy.deepcopy(layer)), {nn.Linear}
            )
        except (ImportError, RuntimeError):
            return None
    return nn.Sequential(quantized, nn.ReLU()) if relu else quantized
