"""Weights that are sharded over ranks (DTensor): gathered one at a time to be chosen, held to their choice in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from lightning_muws.structure.sets import Support


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

    # the ranks have the same values already: each keeps its part, and nothing is sent
    return distribute_tensor(x, sharded.device_mesh, sharded.placements, src_data_rank=None)  # type: ignore[attr-defined]


def apply_(x: Tensor, support: Support, change: Callable[..., object], *per_block: Tensor) -> None:
    """Change a tensor in place by a support: on this rank's part alone where no block straddles ranks.

    Args:
        x: A weight, gradient or moment; sharded or not.
        support: The support of all of it.
        change: Called with the tensor, its support and ``per_block``, or with this rank's part of each.
        per_block: ``(down, across)`` each.
    """
    if not is_sharded(x):
        change(x, support, *per_block)
    elif (rows := _block_rows(x, support)) is None:
        full = whole(x)
        change(full, support, *per_block)
        local(x).copy_(local(like(full, x)))
    elif local(x).numel():
        size = support.grid.block_shape[0]
        negative = support.negative[rows.start * size : rows.stop * size]
        part = replace(support, kinds=support.kinds[rows], negative=negative)
        change(local(x), part, *(values[rows] for values in per_block))


def _block_rows(x: Tensor, support: Support) -> slice | None:
    """Return the rows of blocks that are this rank's, the same kind of answer on all; None if blocks straddle ranks."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = x.device_mesh, x.placements  # type: ignore[attr-defined]
    axes = [axis for axis, placement in enumerate(placements) if not isinstance(placement, Replicate)]
    n_rows, size = support.kinds.shape[0], support.grid.block_shape[0]
    if not axes:
        return slice(0, n_rows)
    largest_part = -(-x.shape[0] // mesh.size(axes[0]))
    if len(axes) > 1 or placements[axes[0]] != Shard(0) or support.grid.out_axis or largest_part % size:
        return None
    (length, *_), (first, *_) = compute_local_shape_and_global_offset(x.shape, mesh, placements)
    return slice(min(first // size, n_rows), min((first + length) // size, n_rows))
