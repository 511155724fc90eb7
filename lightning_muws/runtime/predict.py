"""Predicts what ``accelerate`` will gain at each choice of block shapes and shares, from times measured here and now.

The times of layers that are measured alone do not sum to the time of a network, whose layers find other things in the
caches and pass each other's outputs on. So whole networks with random weights are timed too, and the times of the
layers are scaled to fit, and what is left is read between the networks that were timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median

from torch import nn

from lightning_muws.errors import SettingError
from lightning_muws.runtime.accelerate import NETWORK_TIMING, Acceleration, Settings
from lightning_muws.runtime.kernels import KERNELS
from lightning_muws.runtime.kernels.base import Kernel, Layer
from lightning_muws.runtime.measure.layer import describe, left_alone
from lightning_muws.runtime.measure.network import Form, dense_forms, fast_forms
from lightning_muws.runtime.measure.shares import Bench, Measured
from lightning_muws.runtime.rewrite.observe import Example, Root, inference, replace_module
from lightning_muws.runtime.timing import gain, race
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.layer import Bounds
from lightning_muws.structure.micro import MicroStructure
from lightning_muws.structure.plan import PlanEntry, clean_name, named_weights
from lightning_muws.structure.speed import Curve, LayerTimes, NetworkTimes, falling, hull, time_choices, walk

# of the way from the slowest to the fastest choices: there whole networks are timed
PARTS = (0.15, 0.3, 0.45, 0.6, 0.8)
WHOLE_TIMING = replace(NETWORK_TIMING, budget_s=8.0, sample_s=0.1)  # runs in a row: its own caches, as in use
SCALES = (0.5, 2.0)  # limits of what whole networks may do to the times of layers


def layer_times(
    model: nn.Module,
    example_input: object,
    entries: Mapping[str, PlanEntry],
    say: Callable[[str], object] = lambda text: None,
) -> NetworkTimes:
    """Return what the layers of a network take on this machine, at the choices that a budget has for them.

    Equal layers are measured once. A ResNet-18 takes about a minute. The model is not changed: a copy runs in eval
    mode, on the model's device, with as many threads as torch has.

    Args:
        model: The network, in any mode, not sharded.
        example_input: A tensor, a tuple of arguments, or a dict of keyword arguments, as the model is called in use:
            the network will be fast for inputs of this shape.
        entries: The covered weights by name: the ``covered`` of a plan that was made with ``open_ratios=True``.
        say: Is called with a line of text after each part.

    Returns:
        The times, for ``CompressionRun(..., budget=Budget(speedup=2), times=...)``.

    Raises:
        SettingError: The example has no tensors, or reaches no covered weight of a Linear or a convolution.
    """
    with inference():
        work = Acceleration.of(copy.deepcopy(model).eval(), Example.of(example_input), Settings())
        names = _names(model, work, entries)
        if not names:
            raise SettingError(
                "no layer can be measured for speedup: the example reaches no covered weight of a Linear, Conv1d or "
                "Conv2d, so cover some or give another example"
            )
        covered: dict[nn.Module, PlanEntry] = {layer: entries[name] for layer, name in names.items()}
        n_bytes = sum(p.numel() * p.element_size() for p in work.root.parameters())
        bench = Bench(work.calls, covered, work.clock, work.settings.min_gain, n_bytes)
        n_kinds = len({bench.kind(layer) for layer in _measurable(work)})
        for layer in _measurable(work):
            n_known = len(bench.known)
            bench.measure(layer)
            if len(bench.known) > n_known:
                say(f"measured {len(bench.known)} of {n_kinds} kinds of layers, {describe(layer)}")
        times = _whole(work, bench, names)
        say(f"measured the whole network: its best dense form takes {1e3 * times.dense:.3g} ms")
        return times


def fit(sums: Sequence[float], totals: Sequence[float]) -> tuple[float, float]:
    """Return the rest and the scale with the least squares of ``rest + scale * sum - total``.

    The rest is not negative, and the scale is within ``SCALES``.

    Example:
        >>> fit([1.0, 2.0, 3.0], [2.5, 4.0, 5.5])
        (1.0, 1.5)
    """
    x, y = fmean(sums), fmean(totals)
    variance = sum((s - x) ** 2 for s in sums)
    scale = sum((s - x) * (t - y) for s, t in zip(sums, totals, strict=True)) / variance if variance > 0 else 1.0
    if y < scale * x:  # the best line through zero
        scale = sum(s * t for s, t in zip(sums, totals, strict=True)) / sum(s * s for s in sums)
    scale = min(max(scale, SCALES[0]), SCALES[1])
    return max(0.0, y - scale * x), scale


def _measurable(work: Acceleration) -> list[Layer]:
    return [layer for layer in work.layers.values() if not left_alone(layer, work.calls.get(layer))]


def _names(model: nn.Module, work: Acceleration, entries: Mapping[str, PlanEntry]) -> dict[Layer, str]:
    """Return the name of the covered weight of each layer that can be measured; layers may share a weight."""
    first = {id(parameter): name for name, parameter, _ in named_weights(model)}
    places = {clean_name(n): first[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
    measurable, names = set(_measurable(work)), {}
    for path, layer in work.layers.items():
        name = places.get(clean_name(f"{path}.weight" if path else "weight"), "")
        if name in entries and layer in measurable:
            names[layer] = name
    return names


def _whole(work: Acceleration, bench: Bench, names: Mapping[Layer, str]) -> NetworkTimes:
    """Time whole networks with the choices that a budget would take, and return the layers' times, scaled to fit."""
    alone: dict[str, LayerTimes] = {}
    for layer, name in names.items():
        found = bench.measure(layer)
        alone[name] = _sum(alone[name], found) if name in alone else LayerTimes(found.fixed, found.curves)
    forms = dense_forms(work.source, work.root, work.example)
    times = race(_tasks(forms), work.clock, NETWORK_TIMING)
    best = min(times, key=lambda form: median(times[form]))
    sums, gains = [], []
    for structures in _picked(work, bench, names, alone):
        # each against the dense form alone, as accelerate does: more networks would share the caches
        root, steps = _built(work, bench, names, structures)
        fast = fast_forms(root, work.example, steps)
        raced = race(_tasks({best: forms[best], **fast}), work.clock, WHOLE_TIMING, keep=[best])
        times[best] = raced[best]
        sums.append(NetworkTimes(1.0, 0.0, alone).seconds(structures))
        gains.append(gain(raced[best], raced[min(fast, key=lambda form: median(raced[form]))]))
    dense = median(times[best])
    totals = [dense / gained for gained in gains]
    rest, scale = fit(sums, totals)
    layers = {
        name: LayerTimes(scale * layer.seconds, tuple(_scaled(curve, scale) for curve in layer.curves))
        for name, layer in alone.items()
    }
    return NetworkTimes(dense, rest, layers, timed(sums, totals, rest, scale))


def timed(sums: Sequence[float], totals: Sequence[float], rest: float, scale: float) -> tuple[tuple[float, float], ...]:
    """Return the networks' ``rest + scale * sum`` and their totals; more never takes less, nor equal sums other times.

    Example:
        >>> timed([3.0, 2.0, 1.0, 1.0], [4.0, 2.0, 2.5, 3.5], rest=0.5, scale=1.0)
        ((1.5, 2.5), (2.5, 2.5), (3.5, 4.0))
    """
    at: dict[float, list[float]] = {}
    for one, total in zip(sums, totals, strict=True):
        at.setdefault(rest + scale * one, []).append(total)
    slowest_first = sorted(at, reverse=True)
    seconds = falling([fmean(at[point]) for point in slowest_first])
    return tuple(zip(slowest_first, seconds, strict=True))[::-1]


def _picked(
    work: Acceleration, bench: Bench, names: Mapping[Layer, str], alone: Mapping[str, LayerTimes]
) -> list[dict[str, MicroStructure]]:
    """Return what a budget chooses for the weights as they are, by name, for a few times of the network."""
    weights = {name: weight for name, weight, _ in named_weights(work.source)}
    bounds = {name: Bounds.of(bench.entries[layer]) for layer, name in names.items()}
    choices = time_choices(weights, bounds, alone)
    hulls = {name: hull(found) for name, found in choices.items()}
    slowest, fastest = (sum(corners[i].seconds for corners in hulls.values()) for i in (0, -1))
    allowed = [slowest + part * (fastest - slowest) for part in PARTS] if choices else [slowest]
    return [
        {name: choice.structure for name, choice in walk(choices, hulls, seconds)[1].items()} for seconds in allowed
    ]


def _built(
    work: Acceleration, bench: Bench, names: Mapping[Layer, str], structures: Mapping[str, MicroStructure]
) -> tuple[Root, dict[str, Kernel]]:
    """Return a copy of the network with these structures, as ``accelerate`` builds it.

    The first has each layer in the form that ``accelerate`` picks for it. The second has, by name, the kernels of a
    chain for the layers that are in another form.
    """
    root, steps = copy.deepcopy(work.root), {}
    twins = dict(zip(work.root.modules(), root.modules(), strict=True))
    paths = {module: path for path, module in work.root.named_modules()}
    for layer in _measurable(work):
        found, structure, grid = bench.measure(layer), None, BlockGrid()
        seconds = found.dense
        if (name := names.get(layer)) is not None:
            entry, chosen = bench.entries[layer], structures.get(name)
            if chosen is None and not entry.is_open:
                structure, grid, seconds = entry.structure, entry.grid, found.fixed
            elif chosen is not None and not chosen.is_open:
                structure, grid = chosen, replace(entry.grid, block_shape=chosen.grid.block_shape)
                seconds = LayerTimes(found.fixed, found.curves).at(chosen)
        module: nn.Module | None = None
        if structure is not None and seconds < found.dense:
            module = bench.kernel(layer, structure, grid)
        elif found.form != "dense":
            module = KERNELS[found.form](layer, (1, 1), work.calls[layer].inputs[0])
        if module is not None:
            replace_module(root, twins[layer], module)
        if not (isinstance(module, Kernel) and module.step(1) is not None):
            step = bench.step(layer, structure, grid)
            if step is not None:
                steps[paths[layer]] = step
    return root, steps


def _scaled(curve: Curve, scale: float) -> Curve:
    return Curve(curve.block_shape, curve.prune_ratios, tuple(scale * s for s in curve.seconds), curve.is_unified)


def _sum(times: LayerTimes, more: Measured) -> LayerTimes:
    """Return the times of a weight that belongs to one layer more: its choices are those that all its layers have."""
    seconds = {(curve.block_shape, curve.is_unified): curve.seconds for curve in more.curves}
    both = [
        Curve(c.block_shape, c.prune_ratios, tuple(a + b for a, b in zip(c.seconds, other, strict=True)), c.is_unified)
        for c in times.curves
        if (other := seconds.get((c.block_shape, c.is_unified)))
    ]
    return LayerTimes(times.seconds + more.fixed, tuple(both))


def _tasks(forms: Mapping[str, Form]) -> dict[str, Callable[[], object]]:
    return {name: lambda form=form: form[1](form[0]) for name, form in forms.items()}  # type: ignore[misc]
