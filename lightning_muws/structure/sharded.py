"""Weights that are sharded over ranks (DTensor): gather one to choose its blocks, then change each part in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.structure import Choice
from lightning_muws.structure.support import Support


def is_sharded(x: Tensor) -> bool:
    """Return whether a tensor is a DTensor, of which each rank holds a part."""
    return hasattr(x, "placements")


def whole(x: Tensor) -> Tensor:
    """Return all of a tensor on every rank; a collective where it is sharded, and itself where it is not."""
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]


def local(x: Tensor) -> Tensor:
    """Return this rank's part of a tensor, in the same memory; itself where it is not sharded."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def like(x: Tensor, sharded: Tensor) -> Tensor:
    """Return a whole tensor, the same on every rank, sharded like another; itself where that one is not."""
    if not is_sharded(sharded):
        return x
    from torch.distributed.tensor import distribute_tensor

    # all ranks have the same values: each keeps its part, and nothing is sent
    return distribute_tensor(x, sharded.device_mesh, sharded.placements, src_data_rank=None)  # type: ignore[attr-defined]


def norm(x: Tensor) -> float:
    """Return the Euclidean norm of all of a tensor."""
    return float(whole(torch.linalg.vector_norm(x)))


def apply_(x: Tensor, support: Support, change: Callable[..., object], *per_block: Tensor) -> None:
    """Change a tensor in place by its support from :func:`part`: only this rank's part if no block straddles ranks.

    Args:
        x: A weight, gradient or moment; sharded or not.
        support: This rank's support of it; of all of it where blocks straddle ranks.
        change: Called with the support, the tensor or this rank's part of it, and ``per_block``.
        per_block: ``(n_unified,)`` each.
    """
    if not is_sharded(x):
        change(support, x, *per_block)
    elif _block_rows(x, support.grid) is None:
        full = whole(x)
        change(support, full, *per_block)
        local(x).copy_(local(like(full, x)))
    elif local(x).numel():
        change(support, local(x), *per_block)


def largest(x: Tensor, support: Support, measure: Callable[..., float], *per_block: Tensor) -> float:
    """Return the largest ``measure(support, x, *per_block)`` over the ranks' parts, the same on all; NaN is Inf."""
    if not is_sharded(x) or _block_rows(x, support.grid) is None:
        return measure(support, whole(x), *per_block)
    found = measure(support, local(x), *per_block) if local(x).numel() else 0.0
    worst = torch.tensor(torch.inf if math.isnan(found) else found, device=x.device)
    for axis in _sharded_axes(x):
        dist.all_reduce(worst, dist.ReduceOp.MAX, x.device_mesh.get_group(axis))  # type: ignore[attr-defined]
    return float(worst)


def part(x: Tensor, support: Support, magnitudes: Tensor) -> Choice:
    """Return the choice of the blocks on this rank; that of all blocks if some straddle ranks."""
    if not is_sharded(x) or (rows := _block_rows(x, support.grid)) is None:
        return Choice(support, magnitudes)
    mine, ours = support.rows(rows)
    return Choice(Support(mine.grid, mine.kinds.clone(), mine.negative.clone()), magnitudes[ours].clone())


def gathered(x: Tensor, support: Support, magnitudes: Tensor) -> Choice:
    """Undo :func:`part`: a collective where the tensor is sharded."""
    if not is_sharded(x) or _block_rows(x, support.grid) is None:
        return Choice(support, magnitudes)
    mine = [t.cpu() for t in (support.kinds, support.negative, magnitudes)]
    group = x.device_mesh.get_group(_sharded_axes(x)[0])  # type: ignore[attr-defined]
    parts: list[list[Tensor]] = [[]] * dist.get_world_size(group)
    dist.all_gather_object(parts, mine, group=group)
    kinds, negative, magnitudes = (
        torch.cat([t for t in ours if t.numel()] or ours[:1], axis).to(x.device)
        for ours, axis in zip(zip(*parts, strict=True), (0, -2, 0), strict=True)
    )
    return Choice(Support(support.grid, kinds, negative), magnitudes)


def choice_state(x: Tensor, support: Support, magnitudes: Tensor) -> dict[str, Tensor]:
    """Return the whole choice of a tensor's blocks as plain tensors; a collective where the tensor is sharded."""
    support, magnitudes = gathered(x, support, magnitudes)
    return {"magnitudes": magnitudes, **support.state_dict()}


def load_choice(x: Tensor, state: Mapping[str, Tensor], grid: BlockGrid) -> Choice:
    """Return this rank's part of the choice in a :func:`choice_state`."""
    return part(x, Support.from_state_dict(state, grid), state["magnitudes"])


def _sharded_axes(x: Tensor) -> list[int]:
    from torch.distributed.tensor import Replicate

    return [axis for axis, placement in enumerate(x.placements) if not isinstance(placement, Replicate)]  # type: ignore[attr-defined]


def _block_rows(x: Tensor, grid: BlockGrid) -> slice | None:
    """Return this rank's rows of blocks; None, on all ranks alike, if blocks straddle ranks."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements, axes = x.device_mesh, x.placements, _sharded_axes(x)  # type: ignore[attr-defined]
    n_rows, size = grid.counts(x.shape)[0], grid.block_shape[0]
    if not axes:
        return slice(0, n_rows)
    if len(axes) > 1 or placements[axes[0]] != Shard(0):
        return None
    (length, *_), (first, *_) = compute_local_shape_and_global_offset(x.shape, mesh, placements)
    if grid.batched:  # a rank has whole matrices
        down = n_rows // max(1, x.shape[0])
        return slice(min(first * down, n_rows), min((first + length) * down, n_rows))
    largest_part = -(-x.shape[0] // mesh.size(axes[0]))
    if grid.out_axis or largest_part % size:
        return None
    return slice(min(first // size, n_rows), min((first + length) // size, n_rows))
