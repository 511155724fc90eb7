"""Booleans, eight to a byte: how signs are kept between updates and in checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def pack(flags: Tensor) -> Tensor:
    """Return booleans of any shape as uint8 ``(ceil(n / 8),)``, first flag in the lowest bit, rest padded with False.

    Example:
        >>> pack(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    flat = flags.flatten().to(torch.uint8)
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
    packed = flat[:, 0].clone()
    for bit in range(1, 8):
        packed |= flat[:, bit] << bit
    return packed


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the booleans that :func:`pack` packed, in this shape."""
    bits = torch.stack([(packed >> bit) & 1 for bit in range(8)], dim=1)
    return bits.flatten()[: math.prod(shape)].view(*shape).to(torch.bool)
