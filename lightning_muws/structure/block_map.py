"""BlockMap: the kinds of the blocks of a weight as a small picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_muws.pictures import png
from lightning_muws.structure.kinds import Kind

MOST = 192  # cells along a side: the blocks of 4x4 of a weight of 768x768, one by one
COLOURS = {Kind.PRUNED: (241, 243, 245), Kind.UNIFIED: (244, 162, 89), Kind.DENSE: (61, 90, 128)}
MEANING = {
    Kind.DENSE: "dense: free weights",
    Kind.UNIFIED: "unified: one magnitude",
    Kind.PRUNED: "pruned: all zero",
}
_TABLE = np.array([COLOURS[kind] for kind in Kind], np.float64)


@dataclass(frozen=True, eq=False)
class BlockMap:
    """How many blocks of each kind lie in each cell of a picture; a cell is one block where there are few.

    Args:
        counts: ``(down, across, 3)``, whole numbers: dense, unified and pruned blocks of each cell.
        n_blocks: Blocks of the weight, ``(down, across)``.
        cell: Blocks of a cell, ``(down, across)``; those at the far edges may have fewer.

    Example:
        >>> found = BlockMap.of(np.array([[0, 1], [2, 2]], np.uint8))
        >>> found.pixels()[0, 1].tolist(), found.totals
        ([244, 162, 89], (1, 1, 2))
    """

    counts: NDArray[Any]
    n_blocks: tuple[int, int]
    cell: tuple[int, int]

    @classmethod
    def of(cls, kinds: Tensor | NDArray[np.uint8], most: int = MOST) -> BlockMap:
        """Return the map of kinds ``(down, across)``, a :class:`Kind` a block, with at most ``most`` cells a side."""
        found = kinds.cpu().numpy() if isinstance(kinds, Tensor) else kinds
        sketch = Sketch((found.shape[0], found.shape[1]), most)
        sketch.add(found)
        return sketch.map()

    @property
    def is_exact(self) -> bool:
        """Whether each cell is one block."""
        return self.cell == (1, 1)

    @property
    def totals(self) -> tuple[int, int, int]:
        """Dense, unified and pruned blocks of the weight."""
        dense, unified, pruned = self.counts.sum(axis=(0, 1), dtype=np.int64).tolist()
        return dense, unified, pruned

    def pixels(self) -> NDArray[np.uint8]:
        """Return ``(down, across, 3)``: the colour of each cell, the mean of those of its blocks."""
        whole = self.counts.sum(axis=2, keepdims=True, dtype=np.int64)
        found: NDArray[np.uint8] = np.rint(self.counts / np.maximum(1, whole) @ _TABLE).astype(np.uint8)
        return found

    def _repr_png_(self) -> bytes:
        """Return the picture, for a notebook; small ones are enlarged."""
        pixels = self.pixels()
        scale = max(1, 2 * MOST // max(pixels.shape))
        return png(pixels.repeat(scale, axis=0).repeat(scale, axis=1))

    def __str__(self) -> str:
        down, across = self.n_blocks
        note = "" if self.is_exact else f", a pixel is {self.cell[0]} x {self.cell[1]} blocks"
        return f"{down:,} x {across:,} blocks{note}"


class Sketch:
    """Makes the map of a weight from its block rows, a few at a time: a large weight needs little memory.

    Args:
        n_blocks: Blocks of the weight, ``(down, across)``.
        most: The most cells along a side.
    """

    def __init__(self, n_blocks: tuple[int, int], most: int = MOST) -> None:
        self.n_blocks = n_blocks
        self._cell = tuple(max(1, -(-n // most)) for n in n_blocks)
        down, across = (-(-n // size) for n, size in zip(n_blocks, self._cell, strict=True))
        self._counts = np.zeros((down, across, len(Kind)), np.min_scalar_type(math.prod(self._cell)))
        self._at = 0

    def add(self, kinds: NDArray[np.uint8]) -> None:
        """Add the next block rows.

        Args:
            kinds: ``(rows, across)``, a :class:`Kind` a block.
        """
        if kinds.size:
            rows = (self._at + np.arange(len(kinds))) // self._cell[0]
            starts = np.arange(0, kinds.shape[1], self._cell[1])
            for kind in Kind:
                across = np.add.reduceat(kinds == kind, starts, axis=1, dtype=np.int64)
                np.add.at(self._counts[:, :, kind], rows, across.astype(self._counts.dtype))
        self._at += len(kinds)

    def map(self) -> BlockMap:
        """Return the map."""
        return BlockMap(self._counts, self.n_blocks, (self._cell[0], self._cell[1]))
