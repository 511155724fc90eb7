"""The layer in float64: what every kernel must equal."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def reference(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the layer's output for ``x``, computed and returned in float64."""
    with torch.no_grad():
        y: Tensor = copy.deepcopy(layer).double()(x.double())
    return y


def relative_error(y: Tensor, expected: Tensor) -> float:
    """Return ``max |y - expected| / max |expected|``, or ``max |y|`` if ``expected`` is all zero.

    It is NaN if ``y`` has a NaN, and 0 if the tensors are empty.
    """
    if not expected.numel():
        return 0.0
    scale = float(expected.abs().max())
    return float((y.double() - expected).abs().max()) / (scale or 1.0)
