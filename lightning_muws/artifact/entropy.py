"""How often bytes occur in a stream, and the least a coder without context can make of them. Imports no torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_muws.artifact import native

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]

AT_A_TIME = 1 << 17  # bytes counted together: bincount takes eight times the memory of its input


def count(data: Bytes) -> Ints:
    """Return how often each byte occurs.

    Args:
        data: ``(n,)`` uint8.

    Returns:
        ``(256,)`` int64.
    """
    if native.level() is not None:
        found: Ints = native.count(data, max(1, len(data))).sum(axis=0)
        return found
    parts = (data[start : start + AT_A_TIME] for start in range(0, len(data), AT_A_TIME))
    return sum((np.bincount(part, minlength=256) for part in parts), np.zeros(256, np.int64))


def entropy_bytes(counts: NDArray[Any]) -> float:
    """Return the order-0 entropy, in bytes, of a stream whose symbols occur so often (Shannon 1948, section 6).

    Args:
        counts: ``(n_symbols,)`` integers >= 0.

    Example:
        >>> entropy_bytes(np.array([8, 8]))
        2.0
    """
    p = counts[counts > 0].astype(np.float64)
    return float((p * np.log2(p.sum() / p)).sum() / 8) if len(p) else 0.0
