"""The values that a file holds of a tensor: projected on its structure, and rounded to its step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.structure import Structure


@torch.no_grad()
def as_stored(
    x: Tensor,
    step: float = 0.0,
    structure: Structure | None = None,
    grid: BlockGrid | None = None,
    recovery: float = 1.0,
    name: str = "weight",
) -> Tensor:
    """Return a tensor as a lossy file holds it after its blocks were chosen.

    Args:
        x: Any floating dtype; half precision is computed in float32.
        step: The distance of neighbouring values; 0 for no rounding. The magnitude of a unified block has at least one.
        structure: What it is projected on first; None if it is not cut.
        grid: How it is cut; needed with a structure.
        recovery: How much of the squared distance to the projection is left: with less than 1 the result lies between
            the tensor and its projection, as if training had moved the projection back. It is then in no structure.
        name: The tensor's name in error messages.

    Returns:
        Same shape, dtype and device.

    Raises:
        StateError: The tensor has NaN or Inf, and a structure.

    Example:
        >>> from lightning_muws import MicroStructure
        >>> structure = MicroStructure((1, 2), prune_ratio=0.5)
        >>> as_stored(torch.tensor([[0.1, 0.1, 0.9, 2.1]]), 0.5, structure, structure.grid)
        tensor([[0., 0., 1., 2.]])
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = projected = x.detach().to(dtype)
    choice = structure.nearest(wide, grid, name) if structure and grid else None
    if choice:
        projected = choice.place(wide)
    stored = projected
    if step:
        stored = (projected / step).round_().mul_(step)
        if choice:
            magnitudes = choice.magnitudes
            steps = (magnitudes.abs() / step).round_().clamp_min_(1)
            stored = choice.support.place_(stored, steps.mul_(step) * magnitudes.sign())
    if recovery != 1:
        stored = stored + (wide - projected) * (1 - math.sqrt(recovery))
    return stored.to(x.dtype)
