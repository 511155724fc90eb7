"""Second moments of the inputs of a layer, as Optimal Brain Surgeon needs them; and the error of a weight in them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_muws.calibration.layers import columns

DAMPING = 0.01  # of the mean of H's diagonal, added to it (Frantar et al. 2023, section 3.3, step 3)
SHRINKAGE = 2.0  # MiniLM at 8x, 256 sentences: squared error 0.015; with 0 it is 0.033, rounding has 0.020


class Moments(NamedTuple):
    """Second moments of the inputs of a layer; with a bias, the last input is always 1.

    Args:
        own: ``(groups, n, n)`` float32, ``E[x x^T]``.
        cross: ``(groups, n, n)`` float32, ``E[x_dense x^T]`` with the inputs that the layer has in the dense network.
        n_samples: How many samples of inputs they are a mean of.
    """

    own: Tensor
    cross: Tensor
    n_samples: int

    @property
    def damping(self) -> float:
        """What is added to the diagonal, in shares of its mean.

        Few samples of many inputs show correlations that other inputs do not have. So it is as if ``SHRINKAGE * n``
        samples without correlation had been seen as well (shrinkage of Ledoit and Wolf 2004, of a fixed weight).
        """
        return DAMPING + SHRINKAGE * self.own.shape[-1] / self.n_samples


def second_moments(module: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]], has_bias: bool) -> Moments | None:
    """Return the mean second moments over batches; None if the batches have no samples.

    Args:
        module: The layer.
        pairs: What it is called with in the compressed and in the dense network, batch by batch; twice the same tensor
            where there is but one network.
        has_bias: Whether to append an input of 1.
    """
    own: Tensor | None = None
    cross: Tensor | None = None
    n_samples = 0
    for x, dense in pairs:
        others = columns(module, dense) if dense is not x else None
        for part in columns(module, x):
            a = _with_one(part, has_bias)
            product = a.transpose(1, 2) @ a
            own = product if own is None else own.add_(product)
            if others is not None:
                other = _with_one(next(others), has_bias).transpose(1, 2) @ a
                cross = other if cross is None else cross.add_(other)
            n_samples += a.shape[1]
    if own is None or not n_samples:
        return None
    own /= n_samples
    return Moments(own, own if cross is None else cross.div_(n_samples), n_samples)


def _with_one(part: Tensor, has_bias: bool) -> Tensor:
    """Return samples ``(samples, groups, n)`` as ``(groups, samples, n or n + 1)`` float32."""
    x = part.to(torch.float32).transpose(0, 1)
    return torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2) if has_bias else x


def energy(weight: Tensor, moments: Tensor) -> float:
    """Return ``tr(W H W^T)``, the mean squared output of a weight ``(out, n)`` for moments ``(groups, n, n)``.

    Example:
        >>> energy(torch.tensor([[1.0, 2.0]]), torch.eye(2)[None])
        5.0
    """
    return _trace(weight, moments, weight)


def output_error(weight: Tensor, found: Tensor, moments: Moments, dense_energy: float) -> float:
    """Return ``E|W x_dense - Q x|^2``: how far the outputs are from those of the dense network.

    Args:
        weight: ``(out, n)``, W.
        found: ``(out, n)``, Q.
        moments: Of the inputs.
        dense_energy: ``E|W x_dense|^2``.
    """
    return max(0.0, dense_energy - 2 * _trace(weight, moments.cross, found) + _trace(found, moments.own, found))


def _trace(left: Tensor, moments: Tensor, right: Tensor) -> float:
    groups, n = moments.shape[:2]
    product = left.reshape(groups, -1, n).to(moments) @ moments
    return float((product.to(torch.float64) * right.reshape(groups, -1, n)).sum())


def toward_dense(weight: Tensor, moments: Moments, damping: float) -> Tensor:
    """Return the weight whose outputs are nearest to those of the dense network, ``argmin E|W x_dense - Q x|^2``.

    The inputs of a layer differ from those in the dense network, as the layers before it are compressed. The minimum is
    ``W C H^-1`` (Li et al. 2025, GPTAQ, arXiv:2504.02692, section 3), written so that damping draws it towards W:
    ``W + W (C - H) (H + damping * mean(diag(H)) I)^-1``.
    """
    if moments.cross is moments.own:
        return weight
    groups, n = moments.own.shape[:2]
    own = moments.own.to(torch.float64)
    ridge = damping * own.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float32).tiny)
    damped = own + ridge[:, None, None] * torch.eye(n, dtype=own.dtype, device=own.device)
    w = weight.reshape(groups, -1, n).to(torch.float64)
    change = torch.cholesky_solve((w @ (moments.cross - own)).transpose(1, 2), torch.linalg.cholesky(damped))
    return (w + change.transpose(1, 2)).to(weight.dtype).view(weight.shape)
