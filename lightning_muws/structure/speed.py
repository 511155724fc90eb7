"""Speed: block shapes and shares of pruned blocks for one time of the whole network, with one multiplier.

A choice costs ``importance * squared distance + multiplier * seconds``, and each layer takes its cheapest choice alone
(Shoham and Gersho 1988). The choices that are cheapest at some multiplier are the corners of the lower convex hull of a
layer's choices. So no search for the multiplier is needed: the edges of all hulls, sorted by their slope, are all the
multipliers at which a choice changes (Fox 1966, marginal analysis).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_muws.errors import SettingError, StateError
from lightning_muws.structure.cost import check_speedup
from lightning_muws.structure.grid import CHUNK_NUMEL
from lightning_muws.structure.layer import Bounds
from lightning_muws.structure.micro import MicroStructure
from lightning_muws.structure.sharded import whole

STEPS = 256  # shares of pruned blocks between 0 and 1 that a layer may choose from


@dataclass(frozen=True)
class Curve:
    """The seconds that a layer takes with one block shape, at several shares of pruned blocks.

    Args:
        block_shape: ``(outputs, inputs)`` of a block.
        prune_ratios: The shares that were measured, rising, from 0 to 1.
        seconds: Of one forward of the network that the layer takes at each share.
        is_unified: Whether all other blocks are unified; otherwise they are dense.

    Raises:
        SettingError: The two lists are empty or differ in length, the shares do not rise, or a time is not positive.
    """

    block_shape: tuple[int, int]
    prune_ratios: tuple[float, ...]
    seconds: tuple[float, ...]
    is_unified: bool = False

    def __post_init__(self) -> None:
        shares, seconds = self.prune_ratios, self.seconds
        rises = all(a < b for a, b in pairwise(shares)) and bool(shares) and 0 <= shares[0] <= shares[-1] <= 1
        if not rises or len(shares) != len(seconds) or not all(0 < s < math.inf for s in seconds):
            raise SettingError(
                f"prune_ratios={self.prune_ratios!r} with seconds={self.seconds!r} are not allowed: give rising shares "
                "from 0 to 1, and positive seconds for each"
            )

    def at(self, prune_ratio: float) -> float:
        """Return the seconds at a share between the first and the last that was measured.

        More pruned blocks never take longer: the measured times are replaced by the nearest falling ones. Between two
        measured shares the time is linear, as kernels take a time for each block that is left.

        Example:
            >>> Curve((4, 1), (0.5, 0.75, 1.0), (3.0, 4.0, 1.0)).at(0.625)
            3.5
        """
        shares, seconds = self.prune_ratios, falling(self.seconds)
        prune_ratio = min(max(prune_ratio, shares[0]), shares[-1])  # a number of blocks may round beyond them
        after = next(i for i, share in enumerate(shares) if share >= prune_ratio)
        before = max(0, after - 1)
        low, high = shares[before], shares[after]
        part = (prune_ratio - low) / (high - low) if high > low else 0.0
        return seconds[before] + part * (seconds[after] - seconds[before])


@dataclass(frozen=True)
class LayerTimes:
    """What a weight costs in time: the seconds of the layers that it belongs to, in one forward of the network.

    Args:
        seconds: As it is: dense, or in the structure that a rule gives it.
        curves: With open ratios, at the block shapes that may be chosen; empty if there is nothing to choose.
    """

    seconds: float
    curves: tuple[Curve, ...] = ()

    def at(self, structure: MicroStructure | None) -> float:
        """Return the seconds in a structure that was chosen from the curves; as it is if there is none, or it is open.

        Raises:
            SettingError: No curve has the structure's block shape.
        """
        if structure is None or structure.is_open:
            return self.seconds
        (prune_ratio, _), (unify_ratio, _) = structure.ranges
        for curve in self.curves:
            if (curve.block_shape, curve.is_unified) == (structure.block_shape, unify_ratio > 0):
                return curve.at(prune_ratio)
        raise SettingError(f"no time was measured for {structure}: measure again with this block shape")


@dataclass(frozen=True)
class NetworkTimes:
    """What a forward of a network costs in time, and what each of its weights contributes.

    Args:
        dense: Seconds of the best dense form of the network.
        rest: Seconds of its accelerated form outside of the layers below.
        layers: The times of each weight, by its name.
        timed: For each whole network that was timed, what ``rest`` and ``layers`` sum to, and the seconds it took;
            both rise. Other sums are read between them.

    Raises:
        SettingError: ``timed`` does not rise, or has a time that is not positive.
    """

    dense: float
    rest: float
    layers: Mapping[str, LayerTimes]
    timed: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        rises = all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(self.timed))
        if not rises or not all(0 < value < math.inf for pair in self.timed for value in pair):
            raise SettingError(f"timed={self.timed!r} is not allowed: give positive seconds that rise")

    def seconds(self, structures: Mapping[str, MicroStructure]) -> float:
        """Return the predicted seconds of the accelerated network with the structures that were chosen, by name."""
        return self.whole(self.rest + math.fsum(layer.at(structures.get(name)) for name, layer in self.layers.items()))

    def whole(self, total: float) -> float:
        """Return the seconds of a network whose parts sum to a total: linear between the networks that were timed.

        Example:
            >>> times = NetworkTimes(9.0, 1.0, {}, timed=((2.0, 3.0), (4.0, 4.0)))
            >>> times.whole(1.0), times.whole(3.0), times.whole(8.0)
            (1.5, 3.5, 8.0)
        """
        return _between(total, [(0.0, 0.0), *self.timed]) if self.timed else total

    def total(self, seconds: float) -> float:
        """Return the sum of the parts of a network that takes so many seconds: the inverse of :meth:`whole`."""
        return _between(seconds, [(0.0, 0.0), *((y, x) for x, y in self.timed)]) if self.timed else seconds

    def speedup(self, structures: Mapping[str, MicroStructure]) -> float:
        """Return the seconds of the best dense form over :meth:`seconds`."""
        return self.dense / self.seconds(structures)


@dataclass(frozen=True)
class TimeAllocation:
    """A time for the whole network, shared out among its layers.

    Args:
        multiplier: What a second costs, in shares of a weight's energy (or in units of the importance that was given).
        seconds: The predicted time of the accelerated network.
        speedup: Seconds of its best dense form over ``seconds``.
        reachable: The smallest and the largest speedup that the measured times allow.
        distance: The importance times the squared distance of all weights.
        structures: The structure of each weight that has a choice, by name; both ratios are 0 if it stays dense.
    """

    multiplier: float
    seconds: float
    speedup: float
    reachable: tuple[float, float]
    distance: float
    structures: Mapping[str, MicroStructure]


class Choice(NamedTuple):
    """One way to store a layer's weight, with its cost."""

    seconds: float
    distance: float
    structure: MicroStructure


def allocate_time(
    tensors: Mapping[str, Tensor],
    bounds: Mapping[str, Bounds],
    times: NetworkTimes,
    speedup: float,
    importance: Mapping[str, float] | None = None,
) -> TimeAllocation:
    """Return block shapes and ratios with which the network is predicted to run ``speedup`` times as fast as dense.

    Args:
        tensors: The weights, by name. Sharded ones are gathered one at a time: a collective.
        bounds: What is allowed for each weight that has a choice; its grid's block shape is not used.
        times: What the choices take.
        speedup: Seconds of the best dense form over those of the accelerated network, above 1.
        importance: What a squared distance of 1 in a weight costs, by name; by default ``1 / |W|^2``, so that it is the
            share of the weight's energy that is lost.

    Returns:
        An allocation that depends on the times and the bits of the tensors alone: equal on all ranks that hold equal
        ones.

    Raises:
        SettingError: The speedup is not above 1, or is larger than what can be reached.
        StateError: A weight has NaN or Inf.

    Example:
        >>> from lightning_muws.structure.grid import BlockGrid
        >>> layer = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        >>> curve = Curve((4, 1), (0.5, 0.9), (5e-5, 1e-5))
        >>> times = NetworkTimes(dense=1.1e-4, rest=1e-5, layers={"weight": LayerTimes(1e-4, (curve,))})
        >>> found = allocate_time({"weight": layer}, {"weight": Bounds(BlockGrid())}, times, speedup=3.0)
        >>> found.structures["weight"].prune_ratio, round(found.speedup, 2)
        (0.734375, 3.01)
    """
    check_speedup(speedup)
    choices = time_choices(tensors, bounds, times.layers, importance)
    fixed = times.rest + sum(layer.seconds for name, layer in times.layers.items() if name not in choices)
    hulls = {name: hull(found) for name, found in choices.items()}
    slowest, fastest = (fixed + sum(corners[i].seconds for corners in hulls.values()) for i in (0, -1))
    reachable = times.dense / times.whole(slowest), times.dense / times.whole(fastest)
    allowed = times.total(times.dense / speedup)
    if fastest > allowed:
        raise _unreachable(speedup, reachable)
    multiplier, picked = walk(choices, hulls, allowed - fixed)
    seconds = times.whole(fixed + sum(choice.seconds for choice in picked.values()))
    return TimeAllocation(
        multiplier=multiplier,
        seconds=seconds,
        speedup=times.dense / seconds,
        reachable=reachable,
        distance=math.fsum(choice.distance for choice in picked.values()),
        structures={name: choice.structure for name, choice in picked.items()},
    )


def time_choices(
    tensors: Mapping[str, Tensor],
    bounds: Mapping[str, Bounds],
    layers: Mapping[str, LayerTimes],
    importance: Mapping[str, float] | None = None,
) -> dict[str, list[Choice]]:
    """Return the ways to store each weight that has some, with their seconds and distances, by name.

    The arguments and errors are those of :func:`allocate_time`.
    """
    given = importance or {}
    return {
        name: _choices(name, tensors[name].detach(), bounds[name], layer, given.get(name))
        for name, layer in layers.items()
        if name in bounds and layer.curves
    }


def _unreachable(speedup: float, reachable: tuple[float, float]) -> SettingError:
    return SettingError(
        f"speedup={speedup:g} cannot be reached on this machine: the kernels, and what they do not cover, take too "
        f"long; the measured times allow {reachable[0]:.3g} to {reachable[1]:.3g}, so ask for less or cover more "
        "weights"
    )


def walk(
    choices: Mapping[str, Sequence[Choice]], hulls: Mapping[str, Sequence[Choice]], allowed: float
) -> tuple[float, dict[str, Choice]]:
    """Return the multiplier and a choice a layer, whose seconds sum to at most ``allowed`` (or to the least there is).

    All layers begin at the first corner of their hull, the least distance, and move along its edges, the one that
    costs least distance a second first. The layer that moves last takes the least distance that still is in time. The
    sum of distances is at most what that last move costs above the least possible one.

    Args:
        choices: All choices of each layer.
        hulls: The corners of :func:`hull` of each layer.
        allowed: Seconds.
    """
    picked = {name: corners[0] for name, corners in hulls.items()}
    edges = []
    for name, corners in hulls.items():
        slope = 0.0
        for before, after in pairwise(corners):  # rounding must not put a hull's edges out of order
            slope = max(slope, (after.distance - before.distance) / (before.seconds - after.seconds))
            edges.append((slope, name, after))
    multiplier = 0.0
    for slope, name, after in sorted(edges, key=lambda edge: edge[0]):  # a stable sort
        if math.fsum(choice.seconds for choice in picked.values()) <= allowed:
            break
        multiplier, picked[name] = slope, after
        left = allowed - math.fsum(choice.seconds for other, choice in picked.items() if other != name)
        if after.seconds <= left:
            in_time = [choice for choice in choices[name] if choice.seconds <= left]
            picked[name] = min(in_time, key=lambda choice: (choice.distance, choice.seconds))
    return multiplier, picked


def hull(choices: Sequence[Choice]) -> list[Choice]:
    """Return the corners of the lower convex hull, from the least distance to the least seconds.

    Example:
        >>> dense = MicroStructure()
        >>> [c[:2] for c in hull([Choice(4, 0, dense), Choice(3, 3, dense), Choice(2, 4, dense), Choice(1, 9, dense)])]
        [(4, 0), (2, 4), (1, 9)]
    """
    corners: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.distance, choice.seconds)):
        if corners and choice.seconds >= corners[-1].seconds:
            continue
        while len(corners) > 1 and _is_above(corners[-2], corners[-1], choice):
            corners.pop()
        corners.append(choice)
    return corners


def _is_above(before: Choice, middle: Choice, after: Choice) -> bool:
    """Return whether the middle choice is on or above the line between the other two."""
    saved, lost = before.seconds - middle.seconds, middle.distance - before.distance
    return lost * (before.seconds - after.seconds) >= (after.distance - before.distance) * saved


def _between(x: float, points: Sequence[tuple[float, float]]) -> float:
    """Return the piecewise linear function through points that rise, the first at 0; beyond the last it is ``~ x``."""
    for (a, b), (c, d) in pairwise(points):
        if x <= c:
            return b + (x - a) / (c - a) * (d - b)
    c, d = points[-1]
    return x * d / c


def falling(values: Sequence[float]) -> list[float]:
    """Return the nearest values that never rise, ``argmin |x - values|`` (pool adjacent violators, Ayer et al. 1955).

    Example:
        >>> falling([5.0, 2.0, 3.0, 1.0])
        [5.0, 2.5, 2.5, 1.0]
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, n = float(value), 1
        while pools and pools[-1][0] < mean:
            above, m = pools.pop()
            mean, n = (above * m + mean * n) / (m + n), m + n
        pools.append((mean, n))
    return [mean for mean, n in pools for _ in range(n)]


def _choices(name: str, x: Tensor, bounds: Bounds, layer: LayerTimes, importance: float | None) -> list[Choice]:
    """Return all choices of a weight; the first one is to leave it dense, if that is allowed."""
    x = whole(x)
    low, high = (float(value) for value in torch.aminmax(x))
    top = max(-low, high)
    if not math.isfinite(top):
        raise StateError(f"{name} has NaN or Inf: a budget needs finite weights, so lower the learning rate")
    unit = 2.0 ** math.frexp(top)[1] if top else 1.0  # a power of two: dividing by it is exact
    flat = x.reshape(-1)
    parts = (flat[start : start + CHUNK_NUMEL].to(torch.float32) / unit for start in range(0, len(flat), CHUNK_NUMEL))
    energy = math.fsum(float(part.square().sum(dtype=torch.float64)) for part in parts)
    k = 1 / max(energy, 1e-300) if importance is None else importance * unit**2
    dense = MicroStructure(bounds.grid.block_shape, signs=bounds.signs)
    n_blocks = math.prod(bounds.grid.counts(x.shape))
    (least_pruned, _), (least_unified, _) = bounds.counts(n_blocks)
    found = [] if least_pruned or least_unified else [Choice(layer.seconds, 0.0, dense)]
    for curve in layer.curves:
        grid = replace(bounds.grid, block_shape=curve.block_shape)
        if grid.fits(x.shape) and 0 not in grid.counts(x.shape):
            found += _along(curve, x, replace(bounds, grid=grid), 1 / unit, k)
    if not found:
        raise SettingError(f"{name} has no choice within its bounds: give other bounds, or leave it out by a rule")
    return found


def _along(curve: Curve, x: Tensor, bounds: Bounds, scale: float, k: float) -> list[Choice]:
    """Return the choices of a weight along a curve that its bounds allow."""
    grid = bounds.grid
    structure = MicroStructure(grid.block_shape, signs=bounds.signs)
    covered = grid.covered(grid.matrix(x))
    unify, gain = (cost.flatten() for cost in structure.costs(covered, grid, scale))
    # with all others unified, pruning a block adds its gain; with all others dense, both costs
    costs = gain if curve.is_unified else unify.add_(gain)
    start = float(unify.sum(dtype=torch.float64)) if curve.is_unified else 0.0
    sums = torch.cat([costs.new_zeros(1, dtype=torch.float64), costs.sort().values.cumsum(0, dtype=torch.float64)])
    n = len(costs)
    pruned, unified = bounds.counts(n)
    counts = [round(i / STEPS * n) for i in range(STEPS + 1)]
    within = (round(curve.prune_ratios[0] * n), round(curve.prune_ratios[-1] * n))
    shares = sorted(
        {m for m in (*counts, *within, *pruned) if within[0] <= m <= within[1] and pruned[0] <= m <= pruned[1]}
    )
    if curve.is_unified:
        shares = [m for m in shares if unified[0] <= n - m <= unified[1]]
    elif unified[0]:
        return []
    lost = sums[torch.tensor(shares, dtype=torch.int64, device=sums.device)].tolist() if shares else []
    return [
        Choice(
            curve.at(m / n),
            k * (start + distance),
            replace(structure, prune_ratio=m / n, unify_ratio=(n - m) / n if curve.is_unified else 0.0),
        )
        for m, distance in zip(shares, lost, strict=True)
    ]
