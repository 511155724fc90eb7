"""Layer: what a budget knows of one tensor, and the kinds and the step that are cheapest at a price of a bit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_muws.errors import SettingError, StateError
from lightning_muws.structure.assign import choose_kinds
from lightning_muws.structure.cost import (
    FINEST,
    SAMPLED,
    TENSOR_BYTES,
    Cost,
    best_step,
    coarsest_step,
    entropy,
    sample,
    table_bits,
    value_cost,
)
from lightning_muws.structure.grid import CHUNK_NUMEL, BlockGrid
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.micro import MicroStructure
from lightning_muws.structure.plan import PlanEntry
from lightning_muws.structure.shapes import fitting
from lightning_muws.structure.sharded import whole

ROUNDS = 3  # of choosing kinds and measuring what their symbols then cost
EXACT = 0.9  # of its bits that a value takes if it is stored exactly: exponents repeat
HALF_BITS = 14  # that a value takes in float16


@dataclass(frozen=True)
class Bounds:
    """What a budget may do with one weight.

    Args:
        grid: How the weight is cut into blocks.
        signs: In a unified block: ``free`` or ``shared``, as in :class:`MicroStructure`.
        prune_ratio: The least and the largest share of the blocks that are pruned.
        unify_ratio: The least and the largest share of the blocks that are unified.
        is_auto: Whether another block shape may take the place of the grid's: the cheapest of ``fitting``.

    Raises:
        SettingError: A value is not allowed.

    Example:
        >>> Bounds(BlockGrid((4, 4)), prune_ratio=(0.0, 0.0)).counts(10)  # never prune
        ((0, 0), (0, 10))
    """

    grid: BlockGrid
    signs: Literal["free", "shared"] = "free"
    prune_ratio: tuple[float, float] = (0.0, 1.0)
    unify_ratio: tuple[float, float] = (0.0, 1.0)
    is_auto: bool = False

    def __post_init__(self) -> None:
        if self.signs not in ("free", "shared"):
            raise SettingError(f"signs={self.signs!r} is not allowed: give 'free' or 'shared'")
        for name in ("prune_ratio", "unify_ratio"):
            given: object = getattr(self, name)  # a configuration file may have put anything there
            pair = given if isinstance(given, (tuple, list)) and len(given) == 2 else ()
            numbers = [x for x in pair if isinstance(x, (int, float)) and not isinstance(x, bool)]
            if len(numbers) != 2 or not 0 <= numbers[0] <= numbers[1] <= 1:
                raise SettingError(f"{name}={given!r} is not allowed: give a least and a largest share, from 0 to 1")
        if (least := self.prune_ratio[0] + self.unify_ratio[0]) > 1 + 1e-9:
            raise SettingError(f"the least shares of pruned and unified blocks sum to {least}: lower one of them")

    @classmethod
    def of(cls, entry: PlanEntry) -> Bounds:
        """Return the bounds of a plan's entry: the ranges of its ratios, or exactly its counts of blocks."""
        structure = entry.structure
        if isinstance(structure, MicroStructure):
            return cls(entry.grid, structure.signs, *structure.ranges, is_auto=structure.block_shape == "auto")
        counts, n = structure.counts(entry.grid, entry.shape), max(1, entry.n_blocks)
        prune_ratio, unify_ratio = counts[Kind.PRUNED] / n, counts[Kind.UNIFIED] / n
        return cls(entry.grid, "free", (prune_ratio, prune_ratio), (unify_ratio, unify_ratio))

    def fitting(self, shape: torch.Size | tuple[int, ...]) -> tuple[Bounds, ...]:
        """Return these bounds with each grid that a weight of this shape may get."""
        grids = fitting(self.grid, shape) if self.is_auto else (self.grid,)
        return tuple(replace(self, grid=grid, is_auto=False) for grid in grids)

    def counts(self, n_blocks: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the least and the largest number of blocks that are pruned, and that are unified."""
        pruned = round(self.prune_ratio[0] * n_blocks), round(self.prune_ratio[1] * n_blocks)
        least = min(round(self.unify_ratio[0] * n_blocks), n_blocks - pruned[0])
        return (pruned[0], min(pruned[1], n_blocks - least)), (least, round(self.unify_ratio[1] * n_blocks))


@dataclass(frozen=True)
class Share:
    """What one tensor gets of a budget.

    Args:
        counts: Its blocks: dense, unified, pruned; zeros if it is not cut into blocks.
        structure: The structure with exactly these counts; None if the tensor is not cut.
        step: The distance of neighbouring stored values, in units of the tensor; 0 if it is stored exactly.
        n_bytes: About how many bytes of the file are its own.
    """

    counts: tuple[int, int, int]
    structure: MicroStructure | None
    step: float
    n_bytes: float


def measure(
    name: str, x: Tensor, bounds: Bounds | None = None, importance: float | None = None, is_buffer: bool = False
) -> Layer:
    """Return what an allocation needs to know of a tensor: far less than the tensor. A collective if it is sharded.

    Raises:
        StateError: The tensor has NaN or Inf.
    """
    dense_bytes = x.numel() * x.element_size()
    if not x.numel() or not x.is_floating_point() or x.element_size() == 1:
        return Layer(dense_bytes, plain_bits=8.0 * dense_bytes)
    if is_buffer:  # by its shape alone: ranks may hold other values
        return Layer(dense_bytes, plain_bits=float(HALF_BITS * x.numel()))
    x = whole(x)
    low, high = (float(value) for value in torch.aminmax(x))
    top = max(-low, high)
    if not math.isfinite(top):
        raise StateError(f"{name} has NaN or Inf: a budget needs finite weights, so lower the learning rate")
    if top == 0:
        return Layer(dense_bytes)
    unit = 2.0 ** math.frexp(top)[1]  # a power of two: dividing by it is exact, and no square overflows
    flat = x.reshape(-1)
    parts = (flat[start : start + CHUNK_NUMEL].to(torch.float32) / unit for start in range(0, len(flat), CHUNK_NUMEL))
    energy = math.fsum(float(part.square().sum(dtype=torch.float64)) for part in parts)
    k = 1 / energy if importance is None else importance * unit**2
    plain_bits = EXACT * 8 * dense_bytes
    free = (sample(flat) / unit).to(torch.float32).cpu()
    layer = Layer(dense_bytes, plain_bits, unit, top / unit, energy, k, free, x.numel())
    return cut(layer, x, bounds) if bounds else layer


def cut(layer: Layer, x: Tensor, bounds: Bounds) -> Layer:
    """Return the layer with the distances of its blocks, and a sample of them; as it is if no block fits into it."""
    grid = bounds.grid
    if 0 in grid.counts(x.shape):
        return layer
    matrix = grid.matrix(x)
    covered = grid.covered(matrix)
    unify, gain = (cost.flatten() for cost in MicroStructure(signs=bounds.signs).costs(covered, grid, 1 / layer.unit))
    n_negative = grid.sum(grid.tall(covered).signbit().to(torch.float32)).flatten()
    one_sign = (n_negative == 0) | (n_negative == grid.block_numel) | (bounds.signs == "shared")
    down, across = grid.counts(x.shape)
    tiles = grid.tall(covered).view(down, grid.block_shape[0], across, grid.block_shape[1])
    picked = sample(torch.arange(down * across), max(1, SAMPLED // grid.block_numel))
    at = picked.to(x.device)
    blocks = (tiles[at // across, :, at % across].flatten(1) / layer.unit).to(torch.float32).cpu()
    edges = torch.cat([edge.reshape(-1) for edge in grid.edges(matrix)])
    return replace(
        layer,
        free=(sample(edges) / layer.unit).to(torch.float32).cpu(),
        n_free=len(edges),
        bounds=bounds,
        unify=unify.cpu(),
        prune=(unify + gain).cpu(),
        one_sign=one_sign.cpu(),
        picked=picked,
        blocks=blocks,
    )


@dataclass(frozen=True)
class Layer:
    """What an allocation knows of a tensor; lengths are in units of ``unit``.

    Args:
        dense_bytes: Of the tensor in memory.
        plain_bits: About how many bits it takes if it is stored exactly (a buffer: in float16).
        unit: A power of two near the largest ``|w|``; 0 if the tensor is always stored plainly.
        top: The largest ``|w|``.
        energy: The sum of all squares.
        importance: What a squared distance of 1 costs.
        free: ``(n,)`` float32, a sample of the values that are in no block.
        n_free: How many values are in no block.
        bounds: How it is cut, and what is allowed; None if it is not cut.
        unify: ``(n_blocks,)`` squared distances of unifying each block.
        prune: ``(n_blocks,)`` squared distances of pruning each block.
        one_sign: ``(n_blocks,)`` bool, which blocks need no signs when they are unified.
        picked: ``(s,)`` int64, which blocks are in the sample.
        blocks: ``(s, block_numel)`` float32, the sample of blocks.
        recovery: What the distances of unifying and pruning are multiplied by.
    """

    dense_bytes: int
    plain_bits: float = 0.0
    unit: float = 0.0
    top: float = 0.0
    energy: float = 0.0
    importance: float = 0.0
    free: Tensor = field(default_factory=lambda: torch.empty(0))
    n_free: int = 0
    bounds: Bounds | None = None
    unify: Tensor = field(default_factory=lambda: torch.empty(0))
    prune: Tensor = field(default_factory=lambda: torch.empty(0))
    one_sign: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    picked: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    blocks: Tensor = field(default_factory=lambda: torch.empty(0, 1))
    recovery: float = 1.0

    def share(self, multiplier: float) -> Share:
        """Return what is cheapest for the tensor if a bit costs ``multiplier``."""
        if not self.unit:
            return Share((0, 0, 0), None, 0.0, self.plain_bits / 8 + TENSOR_BYTES)
        if self.bounds is None:
            step = self._step(multiplier, self.n_free, self.n_free, 0)
            cost = value_cost(self.free, step)
            if cost.bits * self.n_free + self.importance * cost.error * self.n_free / multiplier > self.plain_bits:
                return Share((0, 0, 0), None, 0.0, self.plain_bits / 8 + TENSOR_BYTES)
            n_bits = cost.bits * self.n_free + table_bits(self.n_free, self.top / step)
            return Share((0, 0, 0), None, step * self.unit, n_bits / 8 + TENSOR_BYTES)
        prices, kinds = self.settle(multiplier)
        counts = torch.bincount(kinds, minlength=3).tolist()
        n = sum(counts)
        signs = self.bounds.grid.block_numel * int(((kinds == Kind.UNIFIED) & ~self.one_sign).sum())
        n_free = self.n_free + counts[Kind.DENSE] * self.bounds.grid.block_numel
        n_bits = n_free * prices.free.bits + counts[Kind.UNIFIED] * prices.magnitude.bits + signs
        n_bits += n * entropy(_symbols(kinds, self.one_sign)) + table_bits(n_free, self.top / prices.step)
        prune_ratio, unify_ratio = counts[Kind.PRUNED] / n, counts[Kind.UNIFIED] / n
        structure = MicroStructure(
            self.bounds.grid.block_shape, prune_ratio, min(unify_ratio, 1 - prune_ratio), self.bounds.signs
        )
        return Share(tuple(counts), structure, prices.step * self.unit, n_bits / 8 + TENSOR_BYTES)

    def cost(self, multiplier: float) -> float:
        """Return the bits of a cut tensor's cheapest kinds and step, and what their distances cost in bits."""
        prices, kinds = self.settle(multiplier)
        blocks = self.costs(multiplier, prices).gather(0, kinds[None]).sum(dtype=torch.float64)
        edges = self.n_free * (prices.free.bits + self.importance / multiplier * prices.free.error)
        return float(blocks) + edges

    def lost(self, multiplier: float) -> float:
        """Return the share of a cut tensor's energy that its cheapest kinds and step lose."""
        assert self.bounds is not None  # noqa: S101  only cut tensors lose blocks
        prices, kinds = self.settle(multiplier)
        numel, unified = self.bounds.grid.block_numel, kinds == Kind.UNIFIED
        n_free = self.n_free + numel * int((kinds == Kind.DENSE).sum())
        moved = self.unify[unified].sum(dtype=torch.float64) + self.prune[kinds == Kind.PRUNED].sum(dtype=torch.float64)
        rounded = n_free * prices.free.error + numel * int(unified.sum()) * prices.magnitude.error
        return (float(moved) + rounded) / self.energy

    def settle(self, multiplier: float) -> tuple[Prices, Tensor]:
        """Return the prices of symbols and the cheapest kinds ``(n_blocks,)``, each found from the other in turn."""
        assert self.bounds is not None  # noqa: S101  only cut tensors are settled
        kinds = torch.zeros(len(self.unify), dtype=torch.int64)
        prices = self.prices(multiplier, kinds)._replace(kinds=(0.0, 0.0, 0.0, 0.0))
        for _ in range(ROUNDS):
            kinds = choose_kinds(self.costs(multiplier, prices), *self.bounds.counts(len(kinds)))
            prices = self.prices(multiplier, kinds)
        return prices, kinds

    def costs(self, multiplier: float, prices: Prices) -> Tensor:
        """Return ``(3, n_blocks)`` what each block costs dense, unified and pruned, in bits."""
        numel, k = self.blocks.shape[1], self.importance / multiplier
        moved = k * self.recovery
        dense, mixed, one_sign, pruned = prices.kinds
        unified = k * numel * prices.magnitude.error + prices.magnitude.bits
        signs = torch.where(self.one_sign, one_sign + unified, mixed + unified + numel)
        free = numel * (k * prices.free.error + prices.free.bits) + dense
        return torch.stack(
            [torch.full_like(self.unify, free), signs.add(self.unify, alpha=moved), self.prune * moved + pruned]
        )

    def prices(self, multiplier: float, kinds: Tensor) -> Prices:
        """Return what symbols cost if blocks are of these kinds."""
        numel, counts = self.blocks.shape[1], _symbols(kinds, self.one_sign)
        n_dense, n_unified = int(counts[0]), int(counts[1:4].sum())
        n_values = self.n_free + n_dense * numel + n_unified
        step = self._step(multiplier, max(1, n_values), max(1, self.n_free + (n_dense + n_unified) * numel), n_unified)
        picked = kinds[self.picked]
        dense, unified = self.blocks[picked == Kind.DENSE], self.blocks[picked == Kind.UNIFIED]
        values = torch.cat([self.free, (dense if len(dense) else self.blocks).flatten()])
        blocks = unified if len(unified) else self.blocks
        magnitudes = blocks.mean(1).abs() if self.bounds and self.bounds.signs == "shared" else blocks.abs().mean(1)
        likely = (counts + 0.5) / (counts + 0.5).sum()  # half a block more of each, so that none costs infinitely much
        dense, mixed, one_sign, _, pruned = (-likely.log2()).tolist()
        kind_bits = (dense, mixed, one_sign, pruned)
        return Prices(step, value_cost(values, step), value_cost(magnitudes, step, least=1), kind_bits)

    def _step(self, multiplier: float, n_values: int, n_weights: int, n_unified: int) -> float:
        step = best_step(multiplier, self.importance, n_values, n_weights)
        return min(max(step, self.top / (FINEST - 2)), coarsest_step(self.top, n_unified))


class Prices(NamedTuple):
    """What symbols cost in a layer: its step, a value in no unified block, a magnitude, and the kinds in bits.

    The kinds are those of the file: dense, unified with both signs, unified with one (of two), pruned.
    """

    step: float
    free: Cost
    magnitude: Cost
    kinds: tuple[float, float, float, float]


def _symbols(kinds: Tensor, one_sign: Tensor) -> Tensor:
    """Return how often the five kinds of the file occur: dense, mixed signs, all positive, all negative, pruned."""
    n_dense, n_unified, n_pruned = torch.bincount(kinds, minlength=3).tolist()
    n_one = int(((kinds == Kind.UNIFIED) & one_sign).sum())
    return torch.tensor([n_dense, n_unified - n_one, n_one // 2, n_one - n_one // 2, n_pruned])
