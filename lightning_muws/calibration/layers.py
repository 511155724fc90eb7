"""Layers that are linear in their inputs: each as a matrix, its inputs as the columns that the matrix multiplies."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  what everybody calls it

from lightning_muws.structure.grid import BlockGrid

SLAB_NUMEL = 1 << 22  # entries of unfolded inputs that are in memory at once
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a layer whose outputs are its weight times its inputs, plus a bias."""
    return isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED))


def weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return the parameters of a layer."""
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)  # noqa: S101  is_linear
    return weight, bias if isinstance(bias, Tensor) else None


def layer_grid(module: nn.Module) -> BlockGrid:
    """Return how the weight of a layer is seen as a matrix ``(out, in * kernel)``; blocks of one weight."""
    if isinstance(module, TRANSPOSED):
        return BlockGrid((1, 1), 1, module.groups)
    return BlockGrid((1, 1))


def columns(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Yield the inputs of a layer as ``(samples, groups, n)``, some samples at a time.

    ``output = weight_matrix @ column + bias`` for each sample, where the weight is the matrix ``(out, in * kernel)`` of
    its :class:`~lightning_muws.structure.grid.BlockGrid`: a sample of a convolution is one position of its output.

    Args:
        module: A layer for which :func:`is_linear` holds.
        x: What it is called with.
    """
    if isinstance(module, nn.Linear):
        flat = x.reshape(-1, 1, x.shape[-1])
        yield from torch.split(flat, max(1, SLAB_NUMEL // max(1, x.shape[-1])))
        return
    assert isinstance(module, (*CONVOLUTIONS, *TRANSPOSED))  # noqa: S101  is_linear
    windows = _windows(module, x if x.ndim == len(module.kernel_size) + 2 else x[None])
    n = module.in_channels // module.groups * math.prod(module.kernel_size)
    batch = max(1, SLAB_NUMEL // max(1, windows[0].numel()))
    rows = max(1, SLAB_NUMEL * windows.shape[2] // max(1, batch * windows[0].numel()))
    for part in torch.split(windows, batch):
        for slab in torch.split(part, rows, dim=2):
            # (batch, in, *positions, *kernel) to (batch, *positions, in, *kernel)
            yield slab.movedim(1, 1 + len(module.kernel_size)).reshape(-1, module.groups, n)


def _windows(module: nn.Module, x: Tensor) -> Tensor:
    """Return a view ``(batch, in, *positions, *kernel)`` of what each position of a convolution's output sees."""
    assert isinstance(module, (*CONVOLUTIONS, *TRANSPOSED))  # noqa: S101  only convolutions come here
    is_transposed, n_axes, stride = isinstance(module, TRANSPOSED), len(module.kernel_size), module.stride
    if is_transposed:  # the convolution of inputs with zeros between them, by the kernel run backwards
        x, stride = _spread(module, x), (1,) * n_axes
    else:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, step, dilation) in enumerate(zip(module.kernel_size, stride, module.dilation, strict=True)):
        x = x.unfold(2 + axis, dilation * (size - 1) + 1, step)[..., ::dilation]
    return x.flip(tuple(range(-n_axes, 0))) if is_transposed else x


def _spread(module: nn.Module, x: Tensor) -> Tensor:
    """Return the inputs of a transposed convolution with ``stride - 1`` zeros between them, and padded."""
    assert isinstance(module, TRANSPOSED)  # noqa: S101  only transposed convolutions come here
    sizes = [(n - 1) * stride + 1 for n, stride in zip(x.shape[2:], module.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    at = (slice(None), slice(None), *(slice(None, None, stride) for stride in module.stride))
    spread[at] = x
    pads: list[int] = []
    for i in reversed(range(len(sizes))):
        reach = module.dilation[i] * (module.kernel_size[i] - 1) - int(module.padding[i])
        pads += [reach, reach + module.output_padding[i]]
    return F.pad(spread, pads)
