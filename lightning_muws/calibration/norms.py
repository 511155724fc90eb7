"""Batch norms re-estimated: the running statistics of what the compressed layers before them return."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether a module is a batch norm that keeps running statistics."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None


def running_statistics(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return the mean and the variance of each channel, both averaged over the batches.

    These are the running statistics of a batch norm in training mode with ``momentum=None`` (the cumulative average of
    Ioffe and Szegedy 2015, section 3.1, with the unbiased variance).

    Args:
        inputs: What the batch norm is called with, ``(batch, channels, *positions)`` each.

    Returns:
        Two tensors ``(channels,)`` float32; None if a batch has a single value in each channel.

    Example:
        >>> mean, var = running_statistics([torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [5.0]])])
        >>> mean.item(), var.item()
        (3.5, 1.0)
    """
    if any(x.numel() == x.shape[1] for x in inputs):
        return None
    flat = [x.movedim(1, 0).flatten(1).to(torch.float32) for x in inputs]
    return torch.stack([x.mean(1) for x in flat]).mean(0), torch.stack([x.var(1) for x in flat]).mean(0)
