"""A stored choice of kernels: whether it says anything about this model, here."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lightning_muws.runtime.kernels import KERNELS
from lightning_muws.runtime.kernels.base import Layer
from lightning_muws.runtime.measure.layer import describe, left_alone
from lightning_muws.runtime.measure.report import SpeedReport
from lightning_muws.runtime.rewrite.observe import Calls


def void(stored: SpeedReport, here: SpeedReport, layers: Mapping[str, Layer], calls: Mapping[nn.Module, Calls]) -> str:
    """Return why a stored report says nothing of this model here, or an empty string."""
    for field in ("cpu", "capability", "system", "device", "threads", "torch_version", "native"):
        then, now = getattr(stored.machine, field), getattr(here.machine, field)
        if then != now:
            return f"its {field} is {then!r} and this one's {now!r}"
    for field in ("inputs", "min_gain", "dtype", "n_folded"):
        then, now = getattr(stored, field), getattr(here, field)
        if then != now:
            return f"its {field} is {then!r} and here {now!r}"
    if [s.name for s in stored.layers] != list(layers):
        return "its layers have other names"
    for speed in stored.layers:
        layer = layers[speed.name]
        reason = left_alone(layer, calls.get(layer))
        if describe(layer) != speed.layer or bool(reason) != bool(speed.reason):
            return f"{speed.name} is a {describe(layer)} {reason} and was a {speed.layer} {speed.reason}"
        if not reason and speed.n_nonzero != int(torch.count_nonzero(layer.weight)):
            return f"{speed.name} has other weights pruned"
        if speed.winner not in KERNELS:
            return f"there is no kernel {speed.winner!r} here"
    return ""
