"""The block shape of a weight that comes without a plan: each is tried, the one of the smallest file is kept."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from lightning_muws.artifact.entropy import entropy_bytes
from lightning_muws.artifact.streams import N_KINDS, Patterns, block_bits, kinds_of, pack_kinds, plane, rotate
from lightning_muws.artifact.values import bits
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.kinds import Kind

# (1, 1) is for zeros that lie anywhere
SHAPES = tuple(sorted({(r, c) for r in (1, 2, 4, 8, 16) for c in (1, 2, 4, 8, 16)}))
BAND = 16  # rows that are looked at together, so that each shape fits
SAMPLE_NUMEL = 1 << 17
WORTH = 0.99  # blocks have to save this much, or the weight is stored flat


def find_shape(x: Tensor) -> tuple[int, int] | None:
    """Return the block shape whose streams would be smallest; None if blocks do not help.

    Args:
        x: Contiguous floating, on the CPU, two or more axes. Of a large one only bands of 16 rows are looked at.
    """
    matrix = BlockGrid().matrix(x)
    if not matrix.numel() or matrix.shape[1] > SAMPLE_NUMEL:
        return None
    n_bands = -(-len(matrix) // BAND)
    every = max(1, n_bands // max(1, SAMPLE_NUMEL // (BAND * matrix.shape[1])))
    u = np.concatenate([bits(matrix[i * BAND : (i + 1) * BAND].contiguous()) for i in range(0, n_bands, every)])
    nonzero = u[u != 0]
    value_bytes = _value_bytes(nonzero) / max(1, len(nonzero))
    costs = {shape: _cost(u, shape, value_bytes) for shape in SHAPES if shape[0] <= len(u) and shape[1] <= u.shape[1]}
    best = min(costs, key=lambda shape: costs[shape])
    return best if costs[best] < WORTH * _value_bytes(u.reshape(-1)) else None


def _value_bytes(u: Patterns) -> float:
    """Return the order-0 entropy of the byte planes of values."""
    turned = rotate(u)
    return sum(entropy_bytes(np.bincount(plane(turned, i))) for i in range(u.itemsize))


def _cost(u: Patterns, shape: tuple[int, int], value_bytes: float) -> float:
    """Return about how many bytes the streams would take."""
    (rows, cols), numel = shape, shape[0] * shape[1]
    covered = u[: len(u) // rows * rows, : u.shape[1] // cols * cols]
    kinds = kinds_of(*block_bits(covered, shape)).reshape(-1)
    counts = np.bincount(kinds, minlength=N_KINDS)
    n_unified = len(kinds) - counts[Kind.DENSE] - counts[Kind.PRUNED]
    n_free = counts[Kind.DENSE] * numel + u.size - covered.size
    coded = entropy_bytes(np.bincount(pack_kinds(kinds)))
    return float(coded + counts[Kind.UNIFIED] * numel / 8 + n_unified * (value_bytes - 1 / 8) + n_free * value_bytes)
