"""Micro-structures: blocks that are dense, unified or pruned, and the nearest such weight (Lin et al., 2106.08301)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from lightning_muws.errors import SettingError
from lightning_muws.structure.assign import cheapest
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.structure import Choice, refuse_non_finite
from lightning_muws.structure.support import Support, mean


@dataclass(frozen=True)
class MicroStructure:
    """The set of weights of which given shares of the blocks are pruned, and unified.

    A number as a ratio sets it. With a budget (see :class:`lightning_muws.Budget`), two ratios of 0 leave both to the
    budget, and so does a range such as ``prune_ratio=(0, 0.3)``, inside its limits; a 0 beside a range is free.

    Args:
        block_shape: Outputs and inputs of a block, on the weight seen as the matrix ``(out, in * kernel)``; ``auto``:
            each weight gets the one of a few shapes that costs least, when its structure is chosen
            (:mod:`lightning_muws.structure.shapes`).
        prune_ratio: Share of the blocks that are all zero, in [0, 1]: ``round(prune_ratio * n_blocks)`` of each weight.
            Or the least and the largest share that a budget may choose: ``(0, 0)`` never prunes.
        unify_ratio: Share of the blocks whose weights share one magnitude, in [0, 1]; with prune_ratio at most 1. Or
            the least and the largest share that a budget may choose.
        signs: In a unified block, ``free``: each weight keeps its sign; ``shared``: all weights are one value.

    Raises:
        SettingError: A value is not allowed.

    Example:
        >>> MicroStructure(block_shape=(1, 2), unify_ratio=0.5).project(torch.tensor([[3.0, -1.0], [5.0, 5.0]]))
        tensor([[ 3., -1.],
                [ 5.,  5.]])
    """

    block_shape: tuple[int, int] | Literal["auto"] = (4, 4)
    prune_ratio: float | tuple[float, float] = 0.0
    unify_ratio: float | tuple[float, float] = 0.0
    signs: Literal["free", "shared"] = "free"

    def __post_init__(self) -> None:
        shape = self.block_shape
        if isinstance(shape, str) and shape != "auto":
            raise SettingError(
                f"block_shape={shape!r} is not allowed: give two whole numbers >= 1, such as (4, 4), or 'auto'"
            )
        if not isinstance(shape, str):
            object.__setattr__(self, "block_shape", BlockGrid(shape).block_shape)
        for name in ("prune_ratio", "unify_ratio"):
            object.__setattr__(self, name, _ratio(name, getattr(self, name)))
        prune_ratio, unify_ratio = (x[0] if isinstance(x, tuple) else x for x in (self.prune_ratio, self.unify_ratio))
        if prune_ratio + unify_ratio > 1 + 1e-9:
            raise SettingError(
                f"prune_ratio={self.prune_ratio} and unify_ratio={self.unify_ratio} sum to more than 1: "
                "they are shares of all blocks, so lower one of them"
            )
        signs: object = self.signs
        if not isinstance(signs, str) or signs not in ("free", "shared"):
            raise SettingError(f"signs={self.signs!r} is not allowed: give 'free' or 'shared'")

    @property
    def grid(self) -> BlockGrid:
        """The grid of its blocks on a weight whose outputs are on axis 0; 4x4 until an ``auto`` shape is chosen."""
        return BlockGrid() if self.block_shape == "auto" else BlockGrid(self.block_shape)

    @property
    def is_open(self) -> bool:
        """Whether a budget chooses its ratios: both are 0, or one is a range."""
        return self.has_range or self.prune_ratio == self.unify_ratio == 0

    @property
    def has_range(self) -> bool:
        """Whether a ratio is a range, from which only a budget can choose."""
        return isinstance(self.prune_ratio, tuple) or isinstance(self.unify_ratio, tuple)

    @property
    def ranges(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The least and the largest share of the blocks that are pruned, and unified.

        Example:
            >>> MicroStructure(prune_ratio=(0, 0.3)).ranges, MicroStructure(prune_ratio=0.5).ranges
            (((0.0, 0.3), (0.0, 1.0)), ((0.5, 0.5), (0.0, 0.0)))
        """
        prune_ratio, unify_ratio = (_range(x, self.is_open) for x in (self.prune_ratio, self.unify_ratio))
        return prune_ratio, unify_ratio

    def quotas(self, n_blocks: int) -> tuple[int, int]:
        """Return how many of ``n_blocks`` blocks are pruned, and unified; of a range, the least share."""
        prune_ratio, unify_ratio = (least for least, _ in self.ranges)
        n_pruned = round(prune_ratio * n_blocks)
        return n_pruned, min(round(unify_ratio * n_blocks), n_blocks - n_pruned)

    def counts(self, grid: BlockGrid, shape: torch.Size | tuple[int, ...]) -> dict[Kind, int]:
        """Return how many blocks of a weight of this shape stay dense, are unified, and are pruned."""
        n_blocks = math.prod(grid.counts(shape))
        n_pruned, n_unified = self.quotas(n_blocks)
        return {Kind.DENSE: n_blocks - n_pruned - n_unified, Kind.UNIFIED: n_unified, Kind.PRUNED: n_pruned}

    def objection(self, grid: BlockGrid, shape: torch.Size | tuple[int, ...]) -> str:
        """Return why the structure leaves a weight of this shape as it is; empty if it changes the weight."""
        if self.has_range:
            return "a ratio is a range, from which only a budget chooses"
        if self.is_open:
            return "prune_ratio and unify_ratio are 0"
        n_blocks = math.prod(grid.counts(shape))
        if n_blocks == 0:
            return f"smaller than one block of {grid.block_shape}"
        return "" if any(self.quotas(n_blocks)) else f"the ratios of {n_blocks} blocks round to none"

    def project(self, weight: Tensor, grid: BlockGrid | None = None, name: str = "weight") -> Tensor:
        """Return the nearest point of the set, ``argmin |z - weight|``.

        Args:
            weight: Any floating dtype, two or more axes; half precision is computed in float32.
            grid: How the weight is cut into blocks; by default with its outputs on axis 0.
            name: The weight's name in error messages.

        Returns:
            Same shape, dtype and device. Edges and dense blocks keep every bit.

        Raises:
            StateError: The weight has NaN or Inf.
        """
        return self.nearest(weight, grid or self.grid, name).place(weight)

    def support(self, weight: Tensor, grid: BlockGrid | None = None, name: str = "weight") -> Support:
        """Return the support of the point that :meth:`project` returns: each block's kind, and the signs."""
        return self.nearest(weight, grid or self.grid, name).support

    @torch.no_grad()
    def nearest(self, weight: Tensor, grid: BlockGrid, name: str = "weight") -> Choice:
        """Return the choice of the nearest point; which blocks are pruned and which unified is decided jointly.

        A unified block becomes ``sign(w) * mean(|w|)`` (``mean(w)`` with shared signs), at a squared distance of
        ``n * Var(|w|)``. A pruned block becomes zero, at a squared distance of ``|w|^2``.

        Raises:
            StateError: The weight has NaN or Inf.
        """
        matrix = grid.matrix(weight.detach())
        covered = grid.covered(matrix)
        unify_cost, gain = self.costs(covered, grid, 1.0)
        largest = float((unify_cost + gain).max()) if gain.numel() else 1.0
        info = torch.finfo(gain.dtype)
        if not info.tiny / info.eps < largest < torch.inf or not all(
            torch.isfinite(e).all() for e in grid.edges(matrix)
        ):
            refuse_non_finite(matrix, name)
            unify_cost, gain = self.costs(covered, grid, cost_scale(covered, gain.dtype, grid.block_numel))
        n_pruned, n_unified = self.quotas(gain.numel())
        pruned, unified = cheapest(unify_cost.flatten(), gain.flatten(), n_pruned, n_unified)
        kinds = unified.to(torch.uint8).add_(pruned, alpha=int(Kind.PRUNED)).view(gain.shape)
        return self._unify(weight, Support(grid, kinds, kinds.new_empty(0, dtype=torch.bool)))

    def _unify(self, weight: Tensor, support: Support) -> Choice:
        """Return the choice with the signs of this weight, if they are free, and the means of its unified blocks."""
        blocks = list(support.unified_blocks(weight))
        if not blocks:
            return Choice(support, weight.new_empty(0))
        if self.signs == "free":
            signs = torch.cat([x.signbit() for x in blocks], 1)
            support, blocks = Support(support.grid, support.kinds, signs), [x.abs_() for x in blocks]
        return Choice(support, torch.cat([mean(x.clone) for x in blocks]))

    def costs(self, covered: Tensor, grid: BlockGrid, scale: float) -> tuple[Tensor, Tensor]:
        """Return the squared distance of unifying each block, and what pruning it adds to that."""
        tall, n = grid.tall(covered), grid.block_numel
        dtype = torch.promote_types(covered.dtype, torch.float32)
        shape = tall.shape[0], covered.shape[1] // grid.block_shape[1]
        unify_cost, gain = (torch.empty(shape, dtype=dtype, device=covered.device) for _ in range(2))
        for rows in grid.chunks(covered):
            x = tall[rows].to(dtype)
            x = x.abs() if self.signs == "free" else x.clone()
            if scale != 1:
                x.mul_(scale)
            # About the block's first entry: exact for a block of one value, and as the entry is one of the block's,
            # the variance loses at most log2(n) bits (Chan, Golub and LeVeque 1983, shifted data).
            first = grid.first(x).clone()
            x.sub_(grid.spread(first))
            shift = grid.sum(x) / n
            unify_cost[rows] = (grid.sum(x.square_()) - n * shift.square()).clamp_min_(0)
            gain[rows] = n * (first + shift).square()
        return unify_cost, gain


def _ratio(name: str, value: object) -> float | tuple[float, float]:
    """Return a checked ratio: a share, or the least and the largest one; a configuration file may have anything.

    Raises:
        SettingError: It is neither.
    """
    given = value if isinstance(value, (tuple, list)) and len(value) == 2 else [value]
    shares = [float(x) for x in given if isinstance(x, Real) and not isinstance(x, bool)]
    if len(shares) != len(given) or not 0 <= shares[0] <= shares[-1] <= 1:
        raise SettingError(
            f"{name}={value!r} is not allowed: give a share of the blocks from 0 to 1, or a least and a largest one"
        )
    return (shares[0], shares[1]) if len(shares) == 2 else shares[0]


def _range(ratio: float | tuple[float, float], is_open: bool) -> tuple[float, float]:
    if isinstance(ratio, tuple):
        return ratio
    return (0.0, 1.0) if is_open and ratio == 0 else (ratio, ratio)


def cost_scale(covered: Tensor, dtype: torch.dtype, n: int) -> float:
    """Return the power of two that makes the costs of blocks of n weights as large as this dtype holds: it is exact."""
    top = float(covered.abs().max()) if covered.numel() else 0.0
    limit = math.frexp(torch.finfo(dtype).max)[1]
    # a cost is at most n * (2 * top)^2; four bits are left for sums of two costs, and their double
    return 2.0 ** min((limit - n.bit_length() - 6) // 2 - math.frexp(top)[1], limit - 2)
