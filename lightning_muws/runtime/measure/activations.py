"""Collects what a layer's inputs are from calibration batches, and chooses how they are rounded to 8 bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lightning_muws.errors import SettingError
from lightning_muws.runtime.kernels.base import Layer, matrix_of
from lightning_muws.runtime.kernels.native import geometry_of, is_native
from lightning_muws.runtime.kernels.native_int8 import Activation, Int8Sparse, assemble
from lightning_muws.runtime.kernels.reference import reference
from lightning_muws.runtime.native.quantize import choose_rows, pack8, quantized
from lightning_muws.runtime.rewrite.observe import Example

KEPT = 1 << 20  # numbers of a layer's inputs that are kept, for its errors
PER_BATCH = 1 << 17  # of them from one batch, so that several batches are among them
JUDGED = 1 << 18  # of them that the choice of a rounding runs on
SHARES = (0.999, 0.9999)  # of the inputs that a range by percentile holds
SHRINKS = tuple(1 - 0.05 * i for i in range(15))  # of the range, tried for the least squared error


@dataclass
class Inputs:
    """What a layer got in all calibration batches.

    Attributes:
        low: The smallest number.
        high: The largest number.
        kept: Whole samples of some batches, :data:`KEPT` numbers at most, but at least one sample.
    """

    low: float = 0.0
    high: float = 0.0
    kept: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """Add the input of one more batch."""
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        left = min(PER_BATCH, KEPT - sum(k.numel() for k in self.kept))
        n = min(len(x), left // max(1, x[0].numel())) if x.dim() > 1 else 0
        if n or not self.kept:
            self.kept.append((x[: max(n, 1)] if x.dim() > 1 else x).clone())


def check_batches(calibration: object, example: Example) -> list[Example]:
    """Return the calibration batches, checked.

    Args:
        calibration: An iterable of batches, each given as the example is; or one tensor, a single batch.
        example: The example input.

    Raises:
        SettingError: There is none, or one has other shapes or dtypes than the example (the first dimension may
            differ), or NaN or infinity.
    """
    if isinstance(calibration, Tensor):
        calibration = [calibration]
    if isinstance(calibration, (str, bytes, Mapping)) or not isinstance(calibration, Iterable):
        raise SettingError(
            f"calibration is a {type(calibration).__name__}: give a list of batches, each as example_input is given"
        )
    batches = [Example.of(batch) for batch in calibration]
    if not batches:
        raise SettingError("calibration has no batches: give some, such as 256 images of the training set")
    wanted = [(x.shape[1:], x.dtype) for x in example.tensors]
    for i, batch in enumerate(batches):
        found = [(x.shape[1:], x.dtype) for x in batch.tensors]
        if found != wanted:
            raise SettingError(
                f"calibration batch {i} has {_listed(found)}, the example {_listed(wanted)}: give batches alike"
            )
        if any(not len(x) for x in batch.tensors if x.dim()):
            raise SettingError(f"calibration batch {i} has no samples: give batches of at least one")
        if not all(bool(x.isfinite().all()) for x in batch.tensors if x.is_floating_point()):
            raise SettingError(f"calibration batch {i} has NaN or infinity: give batches of finite numbers")
    return batches


def _listed(found: list[tuple[Any, Any]]) -> str:
    return ", ".join(f"(n, {', '.join(map(str, shape))}) {str(dtype).removeprefix('torch.')}" for shape, dtype in found)


def collect(root: nn.Module, layers: Iterable[nn.Module], batches: Iterable[Example]) -> dict[nn.Module, Inputs]:
    """Run the batches through ``root``, and return what each layer got.

    Raises:
        SettingError: A layer got NaN or infinity: the network itself overflows on the batch.
    """
    wanted = set(layers)
    found: dict[nn.Module, Inputs] = {}

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module in wanted and len(args) == 1 and isinstance(args[0], Tensor) and args[0].numel():
            if not bool(args[0].isfinite().all()):
                raise SettingError(
                    "a layer gets NaN or infinity from a calibration batch: check the model and the batch"
                )
            found.setdefault(module, Inputs()).add(args[0].detach())

    handle = register_module_forward_pre_hook(before)
    try:
        for batch in batches:
            batch(root)
    finally:
        handle.remove()
    return found


def fit(layer: Layer, example: Tensor, inputs: Inputs | None) -> Int8Sparse | str:
    """Return the layer in 8 bits with the rounding of inputs that loses least, or why there is none.

    The candidates are the whole range, ranges by percentile, the range of least squared error of the inputs, and for a
    Linear the range of each sample. Each runs on the layer's own inputs; the smallest root of the mean squared error of
    the outputs wins.

    Args:
        layer: Linear, Conv1d or Conv2d, in eval mode.
        example: One input of the layer.
        inputs: What it got from the calibration batches; None if there are none: then only a Linear has a rounding.
    """
    if not is_native(layer, example):
        return "the native kernels do not compute this layer"
    if not bool(layer.weight.isfinite().all()):
        return "its weight has NaN or infinity"
    if inputs is None and not isinstance(layer, nn.Linear):
        return "a convolution needs the range of its inputs: give calibration batches"
    weights = quantized(matrix_of(layer))
    packed = pack8(weights, *choose_rows(weights.whole, layer.weight.shape[0] // geometry_of(layer).groups))
    if inputs is None:
        return assemble(layer, packed, None)
    ways: list[Activation | None] = [None] if isinstance(layer, nn.Linear) else []
    ways += candidates(inputs)
    first = inputs.kept[0]
    few = first[: max(1, JUDGED // max(1, first[0].numel()))] if first.dim() > 1 else first
    expected = reference(layer, few)
    kernels = [assemble(layer, packed, way) for way in ways]
    losses = [float((kernel(few).double() - expected).square().mean()) for kernel in kernels]
    return kernels[losses.index(min(losses))]


def candidates(inputs: Inputs) -> list[Activation]:
    """Return the ranges to try: all inputs, those without the outermost, and that of least squared error."""
    numbers = torch.cat([x.flatten()[:PER_BATCH] for x in inputs.kept]).float()
    ordered = numbers.sort().values
    found = [Activation.of(inputs.low, inputs.high, "range")]
    for share in SHARES:
        last = len(ordered) - 1
        low, high = ordered[round((1 - share) * last)], ordered[round(share * last)]
        found.append(Activation.of(float(low), float(high), f"percentile {100 * share:g}"))
    shrunk = [Activation.of(inputs.low * share, inputs.high * share, "mse") for share in SHRINKS]
    losses = [float((numbers - rounded(numbers, way)).square().sum()) for way in shrunk]
    return [*found, shrunk[losses.index(min(losses))]]


def rounded(x: Tensor, activation: Activation) -> Tensor:
    """Return ``x`` rounded to 8 bits and back.

    Example:
        >>> rounded(torch.tensor([0.4, 0.6, 9.0]), Activation(1.0, 252))
        tensor([0., 1., 3.])
    """
    if not activation.scale:
        return torch.zeros_like(x)
    whole = (x / activation.scale).clamp(-activation.zero, 255 - activation.zero).round()
    return whole * activation.scale
