"""The contract that every kernel keeps, and what kernels of torch operations share. Knows no kernel.

A kernel's file has a function ``build`` (:data:`Build`), which returns a :class:`Kernel` or None. The class lists all
that the measurement and the fusion of a graph (rewrite/graph.py) may ask of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

if TYPE_CHECKING:
    from lightning_muws.runtime.native.steps import Sparse

Layer = nn.Linear | nn.Conv1d | nn.Conv2d
LAYER_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d)  # exactly these: a subclass may compute something else


class Kernel(nn.Module):
    """One layer computed in another way, for inference.

    Every kernel keeps this contract:

    * ``forward(x)`` equals the layer's for any batch and any size, with the same shape and dtype. It does not change
      ``x``, and nothing else holds the memory of what it returns, so that the next step may overwrite it.
    * The weights are buffers. The layer is not kept. The kernel can be copied, pickled, moved and given a state_dict.
    * Fusion may ask for :meth:`with_relu`, :attr:`can_add`, :meth:`with_batch_last` and :meth:`step`. The defaults here
      are right for a kernel that reads :attr:`relu` in its ``forward`` and has nothing special to offer.

    Attributes:
        relu: Whether ReLU ends the kernel.
        can_add: Whether ``forward(x, onto)`` adds ``onto`` to the output before ReLU. It changes neither tensor.
    """

    relu: bool = False
    can_add: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def with_relu(self) -> Self:
        """Return the same kernel with ReLU at its end; the two share their buffers, even after a move to a device."""
        twin = copy.copy(self)
        twin.relu = True
        return twin

    def with_batch_last(self) -> Kernel | None:
        """Return the same kernel for 4-d batches whose images lie side by side in memory, or None if it has no such.

        It takes such a batch without a copy and returns one (strides ``(1, h * w * n, w * n, n)``); it also takes any
        other input.
        """
        return None

    def step(self, n_in: int) -> Sparse | None:
        """Return the kernel as a step of a native program, or None if it cannot be one.

        Args:
            n_in: Numbers of a sample, or channels of an image, that the layer takes.
        """
        return None


Build = Callable[[nn.Module, tuple[int, int], Tensor], Kernel | None]
"""``build(layer, block_shape, example)``: the layer as a kernel, or None if the kernel does not apply to it.

``layer`` is in eval mode and is never changed; its weight holds exact zeros where its blocks are pruned.
``block_shape`` is that of the blocks in the matrix ``(out, in * kernel)``. ``example`` is one input of the layer.
"""


class TorchKernel(Kernel):
    """A kernel of torch operations: subclasses fill in :meth:`compute`.

    Args:
        layer: The layer that it computes.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.stands_for = f"{type(layer).__name__}({layer.extra_repr()})"

    def compute(self, x: Tensor) -> Tensor:
        """Return the layer's output without ReLU, in new memory."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for any batch."""
        y = self.compute(x)
        return y.relu_() if self.relu else y

    def extra_repr(self) -> str:
        """Return the layer that it computes."""
        return self.stands_for + (", relu" if self.relu else "")


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
        """Return the convolution of ``x``, batched or not; ``groups`` replaces the layer's if given."""
        groups = self.groups if groups is None else groups
        if self.n_spatial == 1:
            return F.conv1d(x, weight, bias, self.stride, self.padding, self.dilation, groups)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)

    def channel_axis(self, x: Tensor) -> int:
        """Return the axis of ``x`` that runs over channels."""
        return x.dim() - self.n_spatial - 1


def convolution_of(layer: Layer) -> Convolution | None:
    """Return how the layer slides, or None for a Linear."""
    return None if isinstance(layer, nn.Linear) else Convolution.of(layer)


def channels_last(module: nn.Module) -> nn.Module:
    """Move the module's convolution weights to channels last, in place, and return it."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]  # torch's stub


def is_plain(layer: nn.Module) -> TypeGuard[Layer]:
    """Return whether kernels of torch operations handle the layer's type, padding and dtype."""
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
    """Return a copy of the bias, or zeros if the layer has none."""
    weight, bias = layer.weight, bias_of(layer)
    return torch.zeros(len(weight), dtype=weight.dtype, device=weight.device) if bias is None else bias
