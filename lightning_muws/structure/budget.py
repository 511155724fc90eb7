"""Budget: the kinds of all blocks and the steps of all values for one file size, with one multiplier for the network.

This is the Lagrangian form of bit allocation (Shoham and Gersho 1988): a choice costs
``importance * squared distance + multiplier * bits``, each tensor takes its cheapest choices alone, and the multiplier
is bisected until the bits of all tensors fit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_muws.structure.cost import (
    ROUGH,
    SEARCH,
    TENSOR_BYTES,
    check_compression,
    file_bytes,
    root,
    sample,
    search,
    unreachable,
)
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.layer import Bounds, Layer, Share, cut, measure
from lightning_muws.structure.micro import MicroStructure
from lightning_muws.structure.shapes import tiles
from lightning_muws.structure.sharded import whole

FINE = 0.005  # an allocation's size is this close, as a share of it: a file's is fitted when it is written
FEW = 1 << 11  # values of a layer that its importance is found from
NEARLY = 0.1  # a layer's importance is found to this share
MOST_WEIGHT = 50.0  # that a squared distance has over its share of the energy, where next to nothing is left
RECOVERY = 0.1  # what training leaves of the loss that unifying and pruning cause, if rounding comes after it


@dataclass(frozen=True)
class Allocation:
    """A budget, shared out among the tensors of a model.

    Args:
        multiplier: What a bit costs, in units of the importances.
        n_bytes: About how many bytes the file has.
        compression: Bytes of all tensors over ``n_bytes``.
        reachable: The smallest and the largest compression that a budget reaches here.
        shares: Each tensor's share, by name.
        importance: What a squared distance of 1 costs in each tensor, by name; 0 in one that is stored exactly.
    """

    multiplier: float
    n_bytes: float
    compression: float
    reachable: tuple[float, float]
    shares: Mapping[str, Share]
    importance: Mapping[str, float]

    @property
    def structures(self) -> dict[str, MicroStructure]:
        """The structures of the tensors that are cut, by name."""
        return {name: share.structure for name, share in self.shares.items() if share.structure}


def allocate(
    tensors: Mapping[str, Tensor],
    bounds: Mapping[str, Bounds],
    compression: float,
    importance: Mapping[str, float] | None = None,
    buffers: Collection[str] = (),
    recovery: float = RECOVERY,
) -> Allocation:
    """Return the kinds of blocks and the steps with which the file is ``compression`` times smaller than the tensors.

    Args:
        tensors: All that the file will hold, by name, shared tensors once. Sharded ones are gathered one at a time: a
            collective.
        bounds: How weights are cut and what is allowed for each; tensors that have none are stored without blocks.
        compression: Bytes of all tensors over bytes of the file, above 1.
        importance: What a squared distance of 1 in a tensor costs, by name. Of other tensors it is one over the energy
            that they keep (see :func:`weigh`).
        recovery: How much of the harm of unifying and pruning is left after training, over what is left of the harm of
            rounding: 1 if rounding is trained too, or if nothing is.
        buffers: Names of tensors that no optimizer steps: they are stored exactly or in float16.

    Returns:
        An allocation that depends on the bits of the tensors alone: equal on all ranks that hold equal tensors.

    Raises:
        SettingError: The compression is not above 1, or is larger than what can be reached.
        StateError: A tensor has NaN or Inf.

    Example:
        >>> layer = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        >>> found = allocate({"weight": layer}, {"weight": Bounds(BlockGrid((4, 4)))}, compression=6)
        >>> sum(found.shares["weight"].counts), 6 <= found.compression < 6.1
        (256, True)
    """
    layers, reachable, guess = prepare(tensors, bounds, compression, importance, buffers, recovery)
    dense_bytes = sum(layer.dense_bytes for layer in layers.values())
    target = dense_bytes / compression
    samples = {name: thinned(layer) for name, layer in layers.items() if layer.bounds}
    weights, guess = weigh(layers, samples, importance or (), target, guess)
    layers |= {name: replace(layers[name], importance=weight) for name, weight in weights.items()}

    def size(multiplier: float) -> float:
        return file_bytes(layer.share(multiplier).n_bytes for layer in layers.values())

    multiplier = search(size, target, guess=guess, slack=FINE)
    shares = {name: layer.share(multiplier) for name, layer in layers.items()}
    n_bytes = file_bytes(share.n_bytes for share in shares.values())
    costs = {name: layer.importance / layer.unit**2 if layer.unit else 0.0 for name, layer in layers.items()}
    return Allocation(multiplier, n_bytes, dense_bytes / n_bytes, reachable, shares, costs)


class Prepared(NamedTuple):
    """What an allocation knows before it searches for the multiplier.

    Args:
        layers: What was measured of each tensor, by name.
        reachable: The smallest and the largest compression that a budget reaches.
        guess: Near the multiplier; 0 if nothing is known of it.
    """

    layers: dict[str, Layer]
    reachable: tuple[float, float]
    guess: float


def prepare(
    tensors: Mapping[str, Tensor],
    bounds: Mapping[str, Bounds],
    compression: float,
    importance: Mapping[str, float] | None = None,
    buffers: Collection[str] = (),
    recovery: float = RECOVERY,
) -> Prepared:
    """Do what :func:`allocate` does before its search: choose block shapes, measure, and find what can be reached.

    Arguments and errors are those of :func:`allocate`.
    """
    check_compression(compression)
    given, layers, samples = importance or {}, {}, {}
    for name, x in tensors.items():
        bound, x = bounds.get(name), x.detach()
        is_auto = bound is not None and bound.is_auto
        layer = measure(name, x, None if is_auto else bound, given.get(name), name in buffers)
        layers[name] = layer = replace(layer, recovery=recovery)
        if bound and is_auto and layer.unit:
            samples[name] = samples_of(whole(x), layer, bound)
    dense_bytes = sum(layer.dense_bytes for layer in layers.values())
    shapes, guess = choose_shapes(layers, samples, given, dense_bytes / compression)
    for name, bound in shapes.items():
        layers[name] = cut(layers[name], whole(tensors[name].detach()), bound)
    largest, smallest = (file_bytes(layer.share(end).n_bytes for layer in layers.values()) for end in SEARCH)
    reachable = dense_bytes / largest, dense_bytes / smallest
    if compression > reachable[1]:
        raise unreachable(compression, reachable)
    return Prepared(layers, reachable, guess)


@dataclass(frozen=True)
class Sample:
    """A sample of a tensor in one block shape.

    Args:
        bounds: How the tensor is cut and what is allowed.
        layer: Of the sample.
        scale: Weights of the tensor over those of the sample.
    """

    bounds: Bounds
    layer: Layer
    scale: float

    def n_bytes(self, multiplier: float) -> float:
        """Return about how many bytes the tensor takes if a bit costs ``multiplier``."""
        return TENSOR_BYTES + self.scale * (self.layer.share(multiplier).n_bytes - TENSOR_BYTES)

    def weighed(self, multiplier: float) -> Sample:
        """Return this sample with ``importance * energy that is left = 1``, if a bit costs ``multiplier``.

        More is left where a distance costs more, so the product grows with the importance: there is one solution.
        """
        energy = self.scale * self.layer.energy

        def at(logarithm: float) -> Layer:
            return replace(self.layer, importance=math.exp(logarithm) / energy)

        @functools.cache
        def product(logarithm: float) -> float:
            return logarithm + math.log(max(1 - at(logarithm).lost(multiplier), 1 / MOST_WEIGHT))

        return replace(self, layer=at(root(product, 0.0, -product(0.0), NEARLY)))


def samples_of(x: Tensor, layer: Layer, bounds: Bounds) -> list[Sample]:
    """Return a sample of a weight in each block shape that it may get; the same weights in all of them.

    Args:
        x: The weight, on no more than one rank.
        layer: What :func:`measure` returns of it without bounds.
        bounds: Its bounds, with any block shape.
    """
    found = []
    for bound in bounds.fitting(x.shape):
        matrix = tiles(bound.grid.matrix(x))
        scale, n_blocks = x.numel() / matrix.numel(), math.prod(bound.grid.counts(x.shape))
        part = cut(layer, matrix, replace(bound, grid=BlockGrid(bound.grid.block_shape)))
        part = replace(part, energy=layer.energy / scale)
        n_edge = x.numel() - n_blocks * bound.grid.block_numel  # tiles have no edges: count those of the weight
        found.append(Sample(bound, replace(part, n_free=round(n_edge / scale)), scale))
    return found


def weigh(
    layers: Mapping[str, Layer], samples: Mapping[str, Sample], held: Collection[str], target: float, guess: float = 0.0
) -> tuple[dict[str, float], float]:
    """Return importances ``1 / (energy that is left)`` of sampled tensors, and about what a bit costs with them.

    That is the slope of ``-log(share of the energy that is left)``. Summed over the layers, it prices the signal that
    is left behind layers that come one after another: their shares multiply, and a layer that loses all of its energy
    costs infinitely much, however few its weights are. What is left depends on the importance in turn, so
    :meth:`Sample.weighed` solves for it.

    Args:
        layers: All tensors, by name.
        samples: The tensors that are cut, by name.
        held: Names of those whose importance was given, and stays.
        target: Bytes that the file shall have.
        guess: Near what a bit costs; 0 if nothing is known of it.
    """

    @functools.cache
    def weighed(multiplier: float) -> dict[str, Sample]:
        return {name: one if name in held else one.weighed(multiplier) for name, one in samples.items()}

    # with the energies of the whole tensors a search takes less time, and ends near by
    guess = guess or _guess(layers, samples, target)
    guess = search(lambda x: _estimate(layers, samples, x), target, guess=guess, slack=ROUGH)
    multiplier = search(lambda x: _estimate(layers, weighed(x), x), target, guess=guess, slack=ROUGH)
    return {name: one.layer.importance for name, one in weighed(multiplier).items()}, multiplier


def _guess(layers: Mapping[str, Layer], samples: Mapping[str, Sample], target: float) -> float:
    """Return roughly what a bit costs where weights of ``b`` bits lose ``4^-b`` of their energy."""
    n_weights = sum(layer.dense_bytes for layer in layers.values()) / 4
    n_bits = 8 * target / max(1.0, n_weights)
    return max(SEARCH[0], 2 * math.log(2) * 4**-n_bits * max(1, len(samples)) / max(1.0, n_weights))


def thinned(layer: Layer) -> Sample:
    """Return a cut layer that has the blocks in the sample alone."""
    assert layer.bounds is not None  # noqa: S101  only cut layers have blocks
    at = sample(torch.arange(len(layer.picked)), max(1, FEW // layer.blocks.shape[1]))
    scale = len(layer.unify) / len(layer.picked)
    few = replace(
        layer,
        energy=layer.energy / scale,
        free=sample(layer.free, FEW),
        n_free=round(layer.n_free / scale),
        unify=layer.unify[layer.picked],
        prune=layer.prune[layer.picked],
        one_sign=layer.one_sign[layer.picked],
        picked=at,
        blocks=layer.blocks[at],
    )
    return Sample(layer.bounds, few, scale)


def choose_shapes(
    layers: Mapping[str, Layer], samples: Mapping[str, list[Sample]], held: Collection[str], target: float
) -> tuple[dict[str, Bounds], float]:
    """Return the bounds with the cheapest block shape of each sampled tensor, and about what a bit costs.

    The multiplier and the importance are those of the first shape of each: the cheapest shapes change little with them.

    Args:
        layers: All tensors, by name.
        samples: Those whose shape is chosen, in each shape.
        held: Names of those whose importance was given, and stays.
        target: Bytes that the file shall have.
    """
    if not samples:
        return {}, 0.0
    first = {name: thinned(layer) for name, layer in layers.items() if layer.bounds}
    first |= {name: tried[0] for name, tried in samples.items()}
    found, multiplier = weigh(layers, first, held, target)
    chosen = {}
    for name, tried in samples.items():
        costs = [x.scale * replace(x.layer, importance=found[name]).cost(multiplier) for x in tried]
        chosen[name] = tried[costs.index(min(costs))].bounds
    return chosen, multiplier


def _estimate(layers: Mapping[str, Layer], picked: Mapping[str, Sample], multiplier: float) -> float:
    """Return about how many bytes a file has, of which some tensors are known by a sample."""
    fixed = [layer.share(multiplier).n_bytes for name, layer in layers.items() if name not in picked]
    return file_bytes([*fixed, *(one.n_bytes(multiplier) for one in picked.values())])
