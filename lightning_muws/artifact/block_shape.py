"""The block shape that makes the file smallest, for a weight that comes without a plan.

It prices the streams of each candidate. runtime/shapes.py answers another question, the shape that a kernel should use:
it takes the largest blocks that explain the structure, among other candidates, and no byte counts there.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_muws.artifact.entropy import count, entropy_bytes
from lightning_muws.artifact.source import Stored
from lightning_muws.artifact.streams import (
    DENSE,
    MIXED,
    N_KINDS,
    PRUNED,
    Patterns,
    block_kinds,
    pack_kinds,
    planes,
    sign_bit,
)
from lightning_muws.artifact.values import Form, bits, repeats
from lightning_muws.structure.grid import BlockGrid

Shape = tuple[int, int]

SHAPES = tuple((r, c) for r in (1, 2, 4, 8, 16) for c in (1, 2, 4, 8, 16))  # (1, 1) is for zeros that lie anywhere
BAND = 16  # rows that are looked at together, so that each shape fits
SAMPLE_NUMEL = 1 << 17
WORTH = 0.99  # blocks have to be smaller than this share of the flat weight
CLEARLY = 0.9  # blocks of values of one byte have to be smaller than this share of what zlib makes of them
TINY = 1024  # weights; such tensors of one shape share a block shape ...
MANY = 16  # ... where there are so many of them


def smallest_shape(x: Tensor) -> Shape | None:
    """Return the block shape whose streams would be smallest; None if blocks do not help.

    Args:
        x: Contiguous, floating or of one byte, on the CPU, two or more axes. Of a large one only bands of 16 rows are
            looked at.
    """
    matrix = BlockGrid().matrix(x)
    if not matrix.numel() or matrix.shape[1] > SAMPLE_NUMEL:
        return None
    n_bands = -(-len(matrix) // BAND)
    every = max(1, n_bands // max(1, SAMPLE_NUMEL // (BAND * matrix.shape[1])))
    form = Form(str(x.dtype).removeprefix("torch."))
    bands = [form.patterns(matrix[i * BAND : (i + 1) * BAND].contiguous()) for i in range(0, n_bands, every)]
    u = np.concatenate(bands)[None]
    shape, cost = _smallest(u)
    if x.element_size() == 1 and cost > CLEARLY * len(zlib.compress(u.tobytes(), 6)):
        return None  # readers of format 1.0 know no blocks of them
    return shape


def shared_shapes(tensors: Mapping[str, Stored]) -> dict[str, Shape | None]:
    """Return one block shape for all tiny tensors of a shape and dtype, where there are many; others are left out.

    To look at each one would take more time than all other work on it. Tensors without zeros and without equal
    neighbours have no blocks, and are looked at apart from the rest.

    Args:
        tensors: By name.
    """
    alike: dict[tuple[object, ...], list[str]] = {}
    for name, x in tensors.items():
        if len(x.shape) >= 2 and 0 < x.shape.numel() <= TINY and x.is_cuttable:
            alike.setdefault((x.shape, x.dtype), []).append(name)
    found: dict[str, Shape | None] = {}
    for group in alike.values():
        if len(group) < MANY:
            continue
        u = bits(torch.stack([BlockGrid().matrix(tensors[name].read()) for name in group]))
        is_plain = (u != 0).all((1, 2)) & ~_pairs(u, 1).any((1, 2)) & ~_pairs(u, 2).any((1, 2))
        for members in (is_plain, ~is_plain):
            if members.any():
                shape, _ = _smallest(u[members])
                found |= {name: shape for name, is_member in zip(group, members, strict=True) if is_member}
    return found


def _smallest(u: Patterns) -> tuple[Shape | None, float]:
    """Return the block shape whose streams over all matrices ``(n, rows, cols)`` would be smallest, and their bytes."""
    nonzero = u[u != 0]
    n_values = max(1, len(nonzero))
    value_bytes = _value_bytes(nonzero) / n_values
    one_bytes = value_bytes - 1 / 8  # no sign; where values repeat, magnitude and sign may go together
    if repeats(nonzero):
        one_bytes = _value_bytes(nonzero & ~sign_bit(u.dtype)) / n_values
    most = [n if _pairs(u, axis).any() else 1 for axis, n in ((1, u.shape[1]), (2, u.shape[2]))]
    shapes = [(rows, cols) for rows, cols in SHAPES if rows <= most[0] and cols <= most[1]]
    costs = {shape: _cost(u, shape, value_bytes, one_bytes) for shape in shapes}
    best = min(costs, key=lambda shape: costs[shape])
    return (best if costs[best] < WORTH * _value_bytes(u.reshape(-1)) else None), costs[best]


def _pairs(u: Patterns, axis: int) -> NDArray[np.bool_]:
    """Return where two neighbours along an axis have one magnitude; without any, no block along it is unified."""
    magnitudes = np.moveaxis(u & ~sign_bit(u.dtype), axis, 0)
    equal: NDArray[np.bool_] = np.moveaxis(magnitudes[1:] == magnitudes[:-1], 0, axis)
    return equal


def _value_bytes(u: Patterns) -> float:
    """Return about how many bytes values take: the order-0 entropy of their byte planes, or of a few that repeat."""
    n_bytes = sum(entropy_bytes(count(one)) for one in planes(u))
    if repeats(u[u != 0]):
        n_bytes = min(n_bytes, entropy_bytes(np.unique(u, return_counts=True)[1]))
    return n_bytes


def _cost(u: Patterns, shape: Shape, value_bytes: float, one_bytes: float) -> float:
    """Return about how many bytes the streams would take, if a value and a magnitude take so many."""
    (rows, cols), numel = shape, shape[0] * shape[1]
    covered = u[:, : u.shape[1] // rows * rows, : u.shape[2] // cols * cols]
    kinds = block_kinds(covered.reshape(-1, covered.shape[2]), shape).reshape(-1)
    counts = np.bincount(kinds, minlength=N_KINDS)
    n_unified = len(kinds) - counts[DENSE] - counts[PRUNED]
    n_free = counts[DENSE] * numel + u.size - covered.size
    coded = entropy_bytes(np.bincount(pack_kinds(kinds)))
    return float(coded + counts[MIXED] * numel / 8 + n_unified * one_bytes + n_free * value_bytes)
