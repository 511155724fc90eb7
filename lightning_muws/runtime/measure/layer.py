"""Builds a layer's kernels, checks them against float64, times them in turn, and picks the one that stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn

from lightning_muws.runtime.kernels import DENSE, KERNELS, ROUNDED
from lightning_muws.runtime.kernels.base import LAYER_TYPES, Kernel, Layer
from lightning_muws.runtime.kernels.reference import reference, relative_error
from lightning_muws.runtime.measure.report import LayerSpeed
from lightning_muws.runtime.rewrite.observe import Calls, has_hooks
from lightning_muws.runtime.timing import Timing, gain, race

# The relative error that a kernel may have, by the dtype of the weights.
ERRORS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
ROUNDED_ERROR = 3e-2  # of kernels of lower precision, if they may win
CACHE_BYTES = 1 << 26  # reading this much empties the caches
CLOSE = 1.25  # in a chain, 8 bits are preferred if alone they take no longer than so many times the fastest kernel


@dataclass(frozen=True)
class Criteria:
    """How a layer's kernels are judged.

    Args:
        kernels: Names of the kernels to try; those of :data:`~lightning_muws.runtime.kernels.DENSE` always are.
        min_gain: How many times faster than the best dense form a kernel must be to stay.
        rounded: Kernels of lower precision that may win; others are timed for comparison only.
        clock: Returns seconds.
        timing: How long the measurement may take.
        n_bytes: Bytes of the network's weights. As much memory is read between two samples, up to ``CACHE_BYTES``.
        max_error: The relative error that kernels of lower precision may have, if they may win.
        fitted: Kernels that are built for this layer already, by name; or why there is none.
        samples: Inputs that kernels of :attr:`fitted` are checked on; the layer's inputs if empty.
    """

    kernels: Sequence[str]
    min_gain: float
    rounded: Sequence[str]
    clock: Callable[[], float]
    timing: Timing
    n_bytes: int
    max_error: float = ROUNDED_ERROR
    fitted: Mapping[str, Kernel | str] = field(default_factory=dict)
    samples: Sequence[Tensor] = ()


def choose(
    name: str, layer: Layer, inputs: Sequence[Tensor], block_shape: tuple[int, int], criteria: Criteria
) -> tuple[LayerSpeed, nn.Module, tuple[str, Kernel] | None]:
    """Measure a layer's kernels; return the measurements, the module that wins, and the fastest for a native program.

    The module is the layer itself if dense wins. The last is a kernel and its name, or None if no kernel that may win
    can be a step of a program.

    Args:
        name: The layer's name in the report.
        layer: Linear, Conv1d or Conv2d, in eval mode.
        inputs: One input of each shape that it is called with.
        block_shape: ``(rows, columns)`` of its blocks.
        criteria: How the kernels are judged.
    """
    built, errors, refused = build_all(layer, inputs, block_shape, criteria)
    modules: dict[str, nn.Module] = {**built, "dense": layer}  # the layer itself stays, so it is timed itself
    tasks = {kernel: _task(module, inputs) for kernel, module in modules.items()}
    times = race(tasks, criteria.clock, criteria.timing, keep=DENSE, between=between(inputs, criteria.n_bytes))
    allowed = [kernel for kernel in times if kernel not in ROUNDED or kernel in criteria.rounded]
    winner = pick({kernel: times[kernel] for kernel in allowed}, criteria.min_gain)
    speed = LayerSpeed(
        name=name,
        layer=describe(layer),
        inputs=tuple(tuple(x.shape) for x in inputs),
        block_shape=block_shape,
        n_weights=layer.weight.numel(),
        n_nonzero=int(torch.count_nonzero(layer.weight)),
        times={kernel: median(values) for kernel, values in times.items()},
        errors=errors,
        winner=winner,
        refused=refused,
    )
    return speed, modules[winner], _fastest_step(modules, times, allowed)


def _fastest_step(
    modules: Mapping[str, nn.Module], times: Mapping[str, Sequence[float]], allowed: Sequence[str]
) -> tuple[str, Kernel] | None:
    steps = {
        name: module
        for name in allowed
        if isinstance(module := modules[name], Kernel) and times[name] and module.step(1) is not None
    }
    if not steps:
        return None
    fastest = min(steps, key=lambda name: median(times[name]))
    if "native_int8" in steps and median(times["native_int8"]) <= CLOSE * median(times[fastest]):
        fastest = "native_int8"  # a chain passes bytes on, and its weights stay in the caches
    return fastest, steps[fastest]


def pick(times: Mapping[str, Sequence[float]], min_gain: float) -> str:
    """Return the fastest kernel if it beats the best dense form by ``min_gain``, else that dense form.

    A dense form other than ``dense`` must itself beat ``dense`` by ``min_gain``.

    Example:
        >>> pick({"dense": [4.0, 4.0], "compact": [1.0, 1.1]}, min_gain=1.1)
        'compact'
        >>> pick({"dense": [4.0, 4.0], "compact": [3.9, 3.8]}, min_gain=1.1)
        'dense'
    """
    best = "dense"
    for form in DENSE:
        if form in times and gain(times["dense"], times[form]) >= min_gain and _middle(times, form, best):
            best = form
    others = [kernel for kernel in times if kernel not in DENSE and times[kernel]]
    fastest = min(others, key=lambda kernel: median(times[kernel]), default=best)
    return fastest if fastest != best and gain(times[best], times[fastest]) >= min_gain else best


def _middle(times: Mapping[str, Sequence[float]], one: str, other: str) -> bool:
    return median(times[one]) <= median(times[other])


def build_all(
    layer: Layer, inputs: Sequence[Tensor], block_shape: tuple[int, int], criteria: Criteria
) -> tuple[dict[str, nn.Module], dict[str, float], dict[str, str]]:
    """Return the kernels that apply and are accurate, the relative error of each, and why others were refused."""
    expected = [reference(layer, x) for x in inputs]
    samples = [reference(layer, x) for x in criteria.samples] if criteria.fitted else []
    built: dict[str, nn.Module] = {}
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    for kernel in dict.fromkeys(["dense", *criteria.kernels]):
        fitted = criteria.fitted.get(kernel)
        if isinstance(fitted, str):
            refused[kernel] = fitted
            continue
        tried, wanted = (criteria.samples, samples) if fitted is not None and samples else (inputs, expected)
        try:
            module = KERNELS[kernel](layer, block_shape, inputs[0]) if fitted is None else fitted
            if module is None:
                continue
            outputs = [module(x) for x in tried]
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            refused[kernel] = f"it raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        wrong = max(
            relative_error(y, e) if y.shape == e.shape else float("inf") for y, e in zip(outputs, wanted, strict=True)
        )
        errors[kernel] = wrong
        limit = criteria.max_error if kernel in ROUNDED else ERRORS[layer.weight.dtype]
        compared = kernel == "dense" or (kernel in ROUNDED and kernel not in criteria.rounded)
        if compared or wrong <= max(limit, 2 * errors["dense"]):
            built[kernel] = module
        else:
            refused[kernel] = f"its relative error is {wrong:.1e}, more than {limit:.0e}"
    return built, errors, refused


def left_alone(layer: Layer, seen: Calls | None) -> str:
    """Return why a layer is not measured, or an empty string."""
    if type(layer) not in LAYER_TYPES:
        return f"a {type(layer).__name__} may compute something else than the layer it inherits from"
    if has_hooks(layer):
        return "it has hooks"
    if layer.weight.dtype not in ERRORS:
        return f"its weights are of dtype {layer.weight.dtype}"
    if seen is None or not seen.n:
        return "the example does not reach it"
    if not seen.takes_one or not seen.inputs or not seen.inputs[0].numel() or not layer.weight.numel():
        return "its input is not one tensor with values"
    return ""


def describe(layer: Layer) -> str:
    """Return the layer's type, weight shape, stride and groups, such as ``Conv2d 64x32x3x3/2``."""
    sizes = "x".join(map(str, layer.weight.shape))
    stride = getattr(layer, "stride", (1,))
    extra = f"/{stride[0]}" if any(s != 1 for s in stride) else ""
    return f"{type(layer).__name__} {sizes}{extra}" + (f" g{layer.groups}" if getattr(layer, "groups", 1) != 1 else "")


def _task(module: nn.Module, inputs: Sequence[Tensor]) -> Callable[[], object]:
    return lambda: [module(x) for x in inputs]


def between(inputs: Sequence[Tensor], n_bytes: int) -> Callable[[], object] | None:
    """Return a task that pushes the weights out of the caches, as the rest of the network does between two calls."""
    if inputs[0].device.type != "cpu":
        return None
    rest = torch.zeros(max(1, min(n_bytes, CACHE_BYTES) // 4))
    return lambda: (rest.sum(), [x.sum() for x in inputs])
