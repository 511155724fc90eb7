"""Tall blocks: each group of outputs gathers the inputs it keeps and multiplies them, all groups in one batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_muws.runtime.kernels.base import (
    Convolution,
    Kernel,
    Layer,
    TorchKernel,
    convolution_of,
    is_plain,
    zero_bias,
)

HEIGHTS = (256, 128, 64, 32, 16)  # outputs of a group, tallest first
WORTH = 0.8  # share of the weights computed; above, the gather costs what the products save
SHORTER = 0.9  # a shorter group must compute less than this share of what the tallest so far does


class Groups(TorchKernel):
    """Groups of outputs, each a dense layer of the inputs that it keeps; weights of zero make all groups equally wide.

    Args:
        layer: Linear, or a convolution of one group.
        kept: ``(n_groups, n_kept)`` int64, the inputs of each group.
        weight: ``(n_groups, height, n_kept, ...)`` of the layer's dtype.
        loop: For a convolution: run one per group, one after the other, instead of one grouped convolution.
    """

    kept: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, layer: Layer, kept: Tensor, weight: Tensor, loop: bool) -> None:
        super().__init__(layer)
        self.convolution = convolution_of(layer)
        self.n_out = len(layer.weight)
        self.loop = loop
        n_groups, height = weight.shape[:2]
        bias = F.pad(zero_bias(layer), (0, n_groups * height - self.n_out))
        self.register_buffer("kept", kept.flatten())
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("bias", bias.view(n_groups, height))

    def compute(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        if self.convolution is not None:
            return self._convolve(x, self.convolution)
        n_groups, height, n_kept = self.weight.shape
        flat = x.reshape(-1, x.shape[-1]).t()
        gathered = flat.index_select(0, self.kept).view(n_groups, n_kept, -1)
        y = torch.baddbmm(self.bias.unsqueeze(2), self.weight, gathered)
        y = y.view(n_groups * height, -1)[: self.n_out].t()
        return y.reshape(*x.shape[:-1], self.n_out)

    def _convolve(self, x: Tensor, c: Convolution) -> Tensor:
        axis, (n_groups, height) = c.channel_axis(x), self.weight.shape[:2]
        gathered = x.index_select(axis, self.kept)
        if self.loop:
            parts = gathered.chunk(n_groups, axis)
            y = torch.cat([c(p, w, b) for p, w, b in zip(parts, self.weight, self.bias, strict=True)], axis)
        else:
            y = c(gathered, self.weight.flatten(0, 1), self.bias.flatten(), groups=n_groups)
        return y if n_groups * height == self.n_out else y.narrow(axis, 0, self.n_out).contiguous()


def _grouped(layer: nn.Module, loop: bool) -> Kernel | None:
    if not is_plain(layer) or getattr(layer, "groups", 1) != 1 or not layer.weight.numel():
        return None
    weight = layer.weight.detach()
    used = (weight != 0).flatten(2).any(2) if weight.dim() > 2 else weight != 0
    best: tuple[float, Tensor, int] | None = None
    for height in HEIGHTS:
        n_groups = -(-len(used) // height)
        if n_groups < 2:
            continue
        by_group = F.pad(used, (0, 0, 0, n_groups * height - len(used))).view(n_groups, height, -1).any(1)
        n_kept = max(1, int(by_group.sum(1).max()))
        share = n_kept * n_groups * height / used.numel()
        if best is None or share < SHORTER * best[0]:
            best = share, by_group, n_kept
    if best is None or best[0] > WORTH:
        return None
    _, by_group, n_kept = best
    n_groups = len(by_group)
    height = next(h for h in HEIGHTS if -(-len(used) // h) == n_groups)
    # The inputs that the group keeps, in order, then others, whose weights are zero, up to n_kept.
    kept = by_group.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :n_kept]
    padded = torch.cat([weight, weight.new_zeros(n_groups * height - len(weight), *weight.shape[1:])])
    tall = padded.view(n_groups, height, *weight.shape[1:])
    chosen = torch.stack([rows.index_select(1, columns) for rows, columns in zip(tall, kept, strict=True)])
    return Groups(layer, kept, chosen, loop)


def build(layer: nn.Module, block_shape: tuple[int, int], example: Tensor) -> Kernel | None:
    """Return the groups as one batched product or grouped convolution, or None if no height saves a fifth."""
    return _grouped(layer, loop=False)


def build_loop(layer: nn.Module, block_shape: tuple[int, int], example: Tensor) -> Kernel | None:
    """Return the groups of a convolution as one convolution each, which is faster if a group keeps few inputs."""
    return None if isinstance(layer, nn.Linear) else _grouped(layer, loop=True)
