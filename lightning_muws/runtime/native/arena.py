"""Places values that live for some steps of a program in one piece of memory. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

LINE = 64  # bytes of a cache line, at which every value starts
SLACK = 64  # bytes after a value that vectors may read


class Life(NamedTuple):
    """A value of a program.

    Attributes:
        n_bytes: Its size.
        first: The step that writes it.
        last: The last step that reads it.
    """

    n_bytes: int
    first: int
    last: int


def place(lives: Sequence[Life]) -> tuple[list[int], int]:
    """Return where each value starts, in bytes, and the size of the memory that holds them all.

    Values that live at the same time do not overlap. Large values are placed first, each at the lowest place that is
    free for its whole life.

    Example:
        >>> place([Life(100, 0, 1), Life(100, 1, 2), Life(100, 2, 3)])  # the third takes the place of the first
        ([0, 192, 0], 384)
    """
    starts = [0] * len(lives)
    placed: list[int] = []
    for i in sorted(range(len(lives)), key=lambda i: (-lives[i].n_bytes, i)):
        beside = [j for j in placed if lives[j].first <= lives[i].last and lives[i].first <= lives[j].last]
        start = 0
        for j in sorted(beside, key=starts.__getitem__):
            if start + _room(lives[i]) <= starts[j]:
                break
            start = max(start, starts[j] + _room(lives[j]))
        starts[i] = start
        placed.append(i)
    return starts, max((starts[i] + _room(life) for i, life in enumerate(lives)), default=0)


def _room(life: Life) -> int:
    return -(-(life.n_bytes + SLACK) // LINE) * LINE
