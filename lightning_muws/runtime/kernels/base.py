"""What kernels share: the layer they stand for, its matrix, and the ReLU at their end. Knows no kernel."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

Layer = nn.Linear | nn.Conv1d | nn.Conv2d
LAYER_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d)  # exactly these: a subclass may compute something else


@dataclass(frozen=True)
class Convolution:
    """How a convolution slides: all that ``conv1d`` and ``conv2d`` take beside the weight and the bias."""

    n_spatial: int
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, layer: nn.Conv1d | nn.Conv2d) -> Convolution:
        """Return how the layer slides."""
        padding: str | tuple[int, ...] = layer.padding
        return cls(len(layer.kernel_size), layer.stride, padding, layer.dilation, layer.groups)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int | None = None) -> Tensor:
        """Return the convolution of ``x``, batched or not; ``groups`` other than the layer's where given."""
        groups = self.groups if groups is None else groups
        if self.n_spatial == 1:
            return F.conv1d(x, weight, bias, self.stride, self.padding, self.dilation, groups)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)

    def channel_axis(self, x: Tensor) -> int:
        """Return the axis of ``x`` that runs over channels."""
        return x.dim() - self.n_spatial - 1


class Kernel(nn.Module):
    """A layer computed in a way of its own: subclasses fill :meth:`compute`, and keep what they packed in buffers.

    Args:
        layer: What it stands for, which is not kept.
        relu: Whether ReLU ends it.
    """

    def __init__(self, layer: Layer, relu: bool) -> None:
        super().__init__()
        self.relu = relu
        self.stands_for = f"{type(layer).__name__}({layer.extra_repr()})"
        self.train(layer.training)

    def compute(self, x: Tensor) -> Tensor:
        """Return the layer's output without ReLU, in memory of its own."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for any batch."""
        y = self.compute(x)
        return y.relu_() if self.relu else y

    def with_relu(self) -> Self:
        """Return the same kernel with ReLU at its end; both share what is packed, also after a move to a device."""
        twin = copy.copy(self)
        twin.relu = True
        return twin

    def extra_repr(self) -> str:
        """Return what it stands for."""
        return self.stands_for + (", relu" if self.relu else "")


def convolution_of(layer: Layer) -> Convolution | None:
    """Return how the layer slides, or None of a Linear."""
    return None if isinstance(layer, nn.Linear) else Convolution.of(layer)


def channels_last(module: nn.Module) -> nn.Module:
    """Move the module's convolution weights to channels last, in place, and return it."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]  # torch's stub


def is_plain(layer: nn.Module) -> TypeGuard[Layer]:
    """Return whether a kernel of torch operations can stand for the layer: its type, padding and dtype."""
    return (
        type(layer) in LAYER_TYPES
        and getattr(layer, "padding_mode", "zeros") == "zeros"
        and isinstance(layer.weight, Tensor)
        and layer.weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    )


def matrix_of(layer: Layer) -> Tensor:
    """Return the weight as ``(out, in * kernel)``, detached."""
    return layer.weight.detach().flatten(1)


def bias_of(layer: Layer) -> Tensor | None:
    """Return a copy of the bias, detached, or None."""
    return None if layer.bias is None else layer.bias.detach().clone()


def zero_bias(layer: Layer) -> Tensor:
    """Return the bias, zeros where there is none."""
    weight, bias = layer.weight, bias_of(layer)
    return torch.zeros(len(weight), dtype=weight.dtype, device=weight.device) if bias is None else bias
