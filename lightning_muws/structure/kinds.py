"""The kinds of blocks."""

from __future__ import annotations

from enum import IntEnum


class Kind(IntEnum):
    """What becomes of a block. These numbers are in files: append, never renumber."""

    DENSE = 0
    UNIFIED = 1
    PRUNED = 2
