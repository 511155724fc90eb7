"""Tells whether a saved choice of kernels still holds for this model, on this machine."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lightning_muws.runtime.kernels import KERNELS
from lightning_muws.runtime.kernels.base import Layer
from lightning_muws.runtime.measure.layer import describe, left_alone
from lightning_muws.runtime.measure.report import SpeedReport
from lightning_muws.runtime.rewrite.observe import Calls

MACHINE = ("cpu", "capability", "system", "device", "threads", "torch_version", "native")
SETTINGS = ("inputs", "min_gain", "dtype", "n_folded", "max_error")


def stale(stored: SpeedReport, here: SpeedReport, layers: Mapping[str, Layer], calls: Mapping[nn.Module, Calls]) -> str:
    """Return why a saved report no longer holds, or an empty string if it holds.

    Args:
        stored: The saved report.
        here: A report with the machine, inputs and settings of this call.
        layers: The model's layers by name.
        calls: How the example calls each of them.
    """
    for fields, then_of, now_of in ((MACHINE, stored.machine, here.machine), (SETTINGS, stored, here)):
        for field in fields:
            then, now = getattr(then_of, field), getattr(now_of, field)
            if then != now:
                return f"{field}: {then!r} when saved, {now!r} now"
    if [s.name for s in stored.layers] != list(layers):
        return "the layers have other names"
    for speed in stored.layers:
        layer = layers[speed.name]
        reason = left_alone(layer, calls.get(layer))
        if describe(layer) != speed.layer or bool(reason) != bool(speed.reason):
            then, now = f"{speed.layer} {speed.reason}".strip(), f"{describe(layer)} {reason}".strip()
            return f"{speed.name}: {then} when saved, {now} now"
        if not reason and speed.n_nonzero != int(torch.count_nonzero(layer.weight)):
            return f"{speed.name} has other weights pruned"
        if speed.winner not in KERNELS:
            return f"there is no kernel {speed.winner!r} here"
    return ""
