"""Tolerance: the structure whose blocks all stay within a relative error, in place of a size."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lightning_muws.errors import SettingError, StateError
from lightning_muws.structure.assign import count, smallest
from lightning_muws.structure.cost import entropy
from lightning_muws.structure.grid import BlockGrid, fold
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.layer import EXACT, Bounds
from lightning_muws.structure.micro import MicroStructure, cost_scale
from lightning_muws.structure.shapes import tiles
from lightning_muws.structure.sharded import whole


def check_max_relative_error(value: object) -> None:
    """Check a largest relative error.

    Raises:
        SettingError: It is no number above 0 and below 1.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1:
        raise SettingError(
            f"max_relative_error={value!r} is not allowed: give a number above 0 and below 1, such as 0.3"
        )


@torch.no_grad()
def within(name: str, weight: Tensor, bounds: Bounds, max_relative_error: float) -> MicroStructure:
    """Return the structure that prunes and unifies as many blocks of a weight as a relative error ``e`` allows.

    With ``q`` the root mean square of the norms ``|b|`` of all blocks, each block b is

    - pruned if ``|b| <= e * q``: pruning a block loses all of it, so its error is judged by the other blocks. This is
      the threshold of Han et al. 2015 (section 3.1: a factor times the standard deviation of the layer), by blocks;
    - else unified if ``|b - unify(b)| <= e * |b|``, which ISO/IEC 15938-17 calls a unification threshold;
    - else dense.

    A bound on the number of pruned or unified blocks comes before the error. Without one, the nearest weight with this
    structure is at most ``sqrt(1 + prune_ratio) * e * |W|`` from ``W``: each pruned block adds at most ``(e * q)^2`` to
    the squared distance, and all unified ones together at most ``(e * |W|)^2``.

    Args:
        name: The weight's name in error messages.
        weight: Any floating dtype, two or more axes. A collective if it is sharded.
        bounds: How it is cut into blocks, and how many of them may be pruned and unified. Of several block shapes it
            gets the one that makes a lossless file smallest, as a sample tells.
        max_relative_error: ``e``, above 0 and below 1.

    Raises:
        SettingError: The error is not allowed.
        StateError: The weight has NaN or Inf.

    Example:
        >>> from lightning_muws.structure.grid import BlockGrid
        >>> blocks = torch.tensor([[9.0, -8.0], [0.1, 0.2], [9.0, 1.0]])
        >>> found = within("weight", blocks, Bounds(BlockGrid((1, 2))), max_relative_error=0.1)
        >>> found.counts(found.grid, blocks.shape)
        {<Kind.DENSE: 0>: 1, <Kind.UNIFIED: 1>: 1, <Kind.PRUNED: 2>: 1}
    """
    check_max_relative_error(max_relative_error)
    x = whole(weight.detach())
    if not bool(torch.isfinite(x).all()):
        raise StateError(f"{name} has NaN or Inf: an error needs finite weights, so lower the learning rate")
    found = bounds.fitting(x.shape)
    if len(found) > 1:
        bounds = min(found, key=lambda bound: _sampled_bits(x, bound, max_relative_error))
    return _within(bounds.grid.matrix(x), bounds, max_relative_error)


def _sampled_bits(x: Tensor, bounds: Bounds, max_relative_error: float) -> float:
    """Return about how many bits a weight of ``x`` takes in a lossless file, from a sample."""
    matrix, grid = tiles(bounds.grid.matrix(x)), BlockGrid(bounds.grid.block_shape)
    counts = _within(matrix, replace(bounds, grid=grid), max_relative_error).counts(grid, matrix.shape)
    n, value_bits = sum(counts.values()), EXACT * 8 * x.element_size()
    unified_bits = value_bits + (grid.block_numel if bounds.signs == "free" else 0)
    block_bits = counts[Kind.DENSE] * grid.block_numel * value_bits + counts[Kind.UNIFIED] * unified_bits
    block_bits += n * entropy(torch.tensor(list(counts.values())))
    in_blocks = math.prod(bounds.grid.counts(x.shape)) * grid.block_numel / x.numel()
    return in_blocks * block_bits / (n * grid.block_numel) + (1 - in_blocks) * value_bits


def _within(matrix: Tensor, bounds: Bounds, max_relative_error: float) -> MicroStructure:
    """Return the structure of a matrix; see :func:`within`."""
    grid = bounds.grid
    covered = grid.covered(matrix)
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    costs = MicroStructure(signs=bounds.signs).costs(covered, grid, cost_scale(covered, dtype, grid.block_numel))
    unify, gain = (cost.flatten().to(torch.float64) for cost in costs)
    squares, n = unify + gain, len(unify)  # |b|^2
    if not n:
        return MicroStructure(grid.block_shape, signs=bounds.signs)
    allowed = max_relative_error**2
    pruned_bounds, unified_bounds = bounds.counts(n)
    n_pruned = _clamped(count(squares <= allowed * fold(squares / n, 0)), pruned_bounds)
    is_left = ~smallest(squares, n_pruned)
    n_unified = min(_clamped(count(is_left & (unify <= allowed * squares)), unified_bounds), n - n_pruned)
    prune_ratio = n_pruned / n
    return MicroStructure(grid.block_shape, prune_ratio, min(n_unified / n, 1 - prune_ratio), bounds.signs)


def _clamped(n: int, bounds: tuple[int, int]) -> int:
    return min(max(n, bounds[0]), bounds[1])
