"""Times a layer at several block shapes and shares of pruned blocks; equal layers are timed once.

The weights are random: the time of a kernel depends on where the zeros are, not on the other values.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import torch
from torch import nn

from lightning_muws.runtime.kernels import DENSE, KERNELS, ROUNDED
from lightning_muws.runtime.kernels.base import Kernel, Layer
from lightning_muws.runtime.kernels.native import is_native
from lightning_muws.runtime.measure.layer import between, pick
from lightning_muws.runtime.rewrite.observe import FAILURES, Calls
from lightning_muws.runtime.shapes import shapes_for_speed
from lightning_muws.runtime.timing import Timing, gain, race
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.micro import MicroStructure
from lightning_muws.structure.plan import PlanEntry
from lightning_muws.structure.speed import Curve
from lightning_muws.structure.structure import Structure

SHARES = (0.3, 0.5, 0.7, 0.85, 0.95)  # of pruned blocks; between them, times are almost linear
STRUCTURES = Timing(rounds=7, least_rounds=3, budget_s=1.0, hopeless=math.inf, sample_s=0.002)
KERNEL = Timing(rounds=2, least_rounds=2)  # to choose among the kernels of one structure
FOR_UNIFIED = ("signs", "pooled")  # kernels that gain from unified blocks
SQUARES: tuple[tuple[int, int], ...] = ((4, 4), (8, 8), (16, 16))  # shapes of unified blocks
SEED = 0  # of random weights


@dataclass(frozen=True)
class Measured:
    """What a layer takes; seconds are those of all its calls in one forward of the network.

    Args:
        form: The dense form that ``accelerate`` picks for it.
        dense: Seconds of that form.
        fixed: Seconds in the structure that a rule gives the weight; ``dense`` if there is none.
        curves: Seconds at the choices of an open structure.
    """

    form: str
    dense: float
    fixed: float
    curves: tuple[Curve, ...] = ()


@dataclass
class Bench:
    """The measurements of a network's layers.

    Args:
        calls: How the example calls each layer.
        entries: The plan of each layer's weight; a layer whose weight is not covered has none.
        clock: Returns seconds.
        min_gain: How many times faster than dense a kernel must be.
        n_bytes: Bytes of the network's weights.
        known: What was measured so far, by what it depends on.
    """

    calls: Mapping[nn.Module, Calls]
    entries: Mapping[nn.Module, PlanEntry]
    clock: Callable[[], float]
    min_gain: float
    n_bytes: int
    known: dict[str, Measured] = field(default_factory=dict)

    def kind(self, layer: Layer) -> str:
        """Return all that the times of a layer depend on: layers of one kind are equal."""
        entry, seen = self.entries.get(layer), self.calls[layer]
        inputs = [(tuple(x.shape), x.stride(), x.dtype) for x in seen.inputs]
        return f"{layer} {layer.weight.dtype} {seen.n} {inputs} {(entry.structure, entry.grid) if entry else None}"

    def measure(self, layer: Layer) -> Measured:
        """Return what a layer takes; an equal layer is not measured again."""
        kind = self.kind(layer)
        if kind not in self.known:
            self.known[kind] = self._measure(layer, self.entries.get(layer))
        return self.known[kind]

    def _measure(self, layer: Layer, entry: PlanEntry | None) -> Measured:
        seen = self.calls[layer]
        form, dense, _ = self._race(layer, [])
        dense *= seen.n / len(seen.inputs)
        if entry is None:
            return Measured(form, dense, dense)
        if not entry.is_open:
            gains = self._race(layer, [self.kernel(layer, entry.structure, entry.grid)])[2]
            return Measured(form, dense, dense / gains[0])
        curves = []
        for grid, is_unified in self._candidates(layer, entry):
            ratios = (0.0, *SHARES) if is_unified else SHARES
            structures = [at_share(entry, grid, ratio, is_unified) for ratio in ratios]
            if is_unified and not any(n in self._build(layer, structures[0], grid) for n in FOR_UNIFIED):
                continue
            gains = self._race(layer, [self.kernel(layer, structure, grid) for structure in structures])[2]
            curves.append(Curve(grid.block_shape, ratios, tuple(dense / gained for gained in gains), is_unified))
        return Measured(form, dense, dense, tuple(curves))

    def _candidates(self, layer: Layer, entry: PlanEntry) -> list[tuple[BlockGrid, bool]]:
        """Return the grids to measure for an open weight, each with whether the blocks left are unified."""
        x, taps = self.calls[layer].inputs[0], math.prod(layer.weight.shape[2:])
        shapes, unified = shapes_for_speed(taps, is_native(layer, x)), SQUARES
        if entry.structure.block_shape not in (MicroStructure().block_shape, "auto"):
            shapes = unified = (entry.grid.block_shape,)  # the user's own
        grids = [
            (replace(entry.grid, block_shape=shape), is_unified)
            for is_unified, choices in ((False, shapes), (True, unified))
            for shape in choices
        ]
        return [(g, u) for g, u in grids if g.fits(entry.shape) and 0 not in g.counts(entry.shape)]

    def kernel(self, layer: Layer, structure: Structure, grid: BlockGrid) -> Kernel | None:
        """Return the fastest kernel for a layer with random weights inside a structure; None if there is none."""
        return self._fastest(layer, self._build(layer, structure, grid))

    def step(self, layer: Layer, structure: Structure | None, grid: BlockGrid) -> Kernel | None:
        """Return the fastest kernel that can be a step of a native program; None if there is none.

        Args:
            layer: A layer.
            structure: That its random weights are inside of; None for a layer as it is.
            grid: The blocks that a kernel takes.
        """
        built = self._build(layer, structure, grid)
        return self._fastest(layer, {n: k for n, k in built.items() if k.step(1) is not None})

    def _fastest(self, layer: Layer, built: Mapping[str, Kernel]) -> Kernel | None:
        if len(built) < 2:
            return next(iter(built.values()), None)
        times = race({name: self._task(layer, module) for name, module in built.items()}, self.clock, KERNEL)
        return built[min(built, key=lambda name: median(times[name]))]

    def _build(self, layer: Layer, structure: Structure | None, grid: BlockGrid) -> dict[str, Kernel]:
        """Return all kernels that apply to a layer with random weights inside a structure, by name."""
        x = self.calls[layer].inputs[0]
        random = layer if structure is None else with_random_weights(layer, structure, grid)
        built: dict[str, Kernel] = {}
        for name, build in KERNELS.items():
            if name in DENSE or name in ROUNDED:
                continue
            try:
                if (module := build(random, grid.block_shape, x)) is not None:
                    module(x)
                    built[name] = module
            except FAILURES:  # accelerate leaves such a kernel out, too
                continue
        return built

    def _race(self, layer: Layer, kernels: Sequence[nn.Module | None]) -> tuple[str, float, list[float]]:
        """Return the best dense form, its seconds, and the gain of each kernel over it; 1 where that form stays."""
        x = self.calls[layer].inputs[0]
        built = {name: KERNELS[name](layer, (1, 1), x) for name in DENSE if name != "dense"}
        forms: dict[str, nn.Module] = {"dense": layer, **{n: m for n, m in built.items() if m is not None}}
        others = {str(i): module for i, module in enumerate(kernels) if module is not None}
        tasks = {name: self._task(layer, module) for name, module in (forms | others).items()}
        flush = between(self.calls[layer].inputs, self.n_bytes)
        times = race(tasks, self.clock, STRUCTURES, keep=list(tasks), between=flush)
        dense = {name: times[name] for name in forms}
        form, gains = pick(dense, self.min_gain), [1.0] * len(kernels)
        for name in others:
            if pick({**dense, name: times[name]}, self.min_gain) == name:
                gains[int(name)] = gain(times[form], times[name])  # round by round: other processes slow both
        return form, median(times[form]), gains

    def _task(self, layer: Layer, module: nn.Module) -> Callable[[], object]:
        inputs = self.calls[layer].inputs
        return lambda: [module(x) for x in inputs]


def at_share(entry: PlanEntry, grid: BlockGrid, share: float, is_unified: bool) -> MicroStructure:
    """Return the structure with this share of blocks pruned, and all others dense or unified."""
    signs = entry.structure.signs if isinstance(entry.structure, MicroStructure) else "free"
    return MicroStructure(grid.block_shape, share, 1 - share if is_unified else 0.0, signs)


def with_random_weights(layer: Layer, structure: Structure, grid: BlockGrid) -> Layer:
    """Return a copy of a layer whose weights are random and inside a structure."""
    generator = torch.Generator().manual_seed(SEED)
    weight = torch.randn(layer.weight.shape, generator=generator) * math.sqrt(2 / max(1, layer.weight[0].numel()))
    random = copy.copy(layer)
    random._parameters = dict(layer._parameters)
    inside = structure.project(weight.to(layer.weight.dtype), grid).to(layer.weight.device)
    random.weight = nn.Parameter(inside, requires_grad=False)
    return random
