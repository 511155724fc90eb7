"""The kinds of blocks."""

from __future__ import annotations

from enum import IntEnum


class Kind(IntEnum):
    """What a block is: free weights, weights of one magnitude, or zeros.

    Supports and checkpoints hold these numbers. The streams of a file use them too, and number two more cases for
    themselves: see :mod:`lightning_muws.artifact.streams`.
    """

    DENSE = 0
    UNIFIED = 1
    PRUNED = 2
