"""Where a stream of rans gets a new table: wherever it pays. Imports no torch.

Costs are whole numbers, so that the native coder decides as numpy does, to the bit, whatever its logarithm is.
"""

from __future__ import annotations

import numpy as np

from lightning_muws.artifact import native
from lightning_muws.artifact.entropy import Bytes, Ints

POINT, FINE, COARSE = 24, 28, 12  # bits after the point of a cost, of a mantissa, and of a place in LOGS
LOGS = np.rint(np.log2(1 + np.arange((1 << COARSE) + 1) / (1 << COARSE)) * (1 << POINT)).astype(np.int64)
# What a table takes in the stream, in bits: 4 bytes, and 1.2 for each symbol from its first to its last.
TABLE_COST, SYMBOL_COST = 32 << POINT, round(9.6 * (1 << POINT))


def counts(data: Bytes, stretch: int) -> Ints:
    """Return how often each byte occurs in every ``stretch`` bytes, ``(ceil(n / stretch), 256)``."""
    if native.level() is not None:
        return native.count(data, stretch)
    starts = range(0, len(data), stretch)
    found = [np.bincount(data[start : start + stretch], minlength=256) for start in starts]
    return np.array(found, np.int64).reshape(-1, 256)


def merged(found: Ints) -> tuple[Ints, Ints, int]:
    """Return the first stretch of each table, the counts of its symbols ``(n, 256)``, and what all cost.

    A stretch joins the table before it if one table for both costs no more than two.

    Args:
        found: ``(n_stretches, 256)``, no row without a count; may be changed.
    """
    if native.level() is not None:
        return native.merge(found, (TABLE_COST, SYMBOL_COST, LOGS))
    firsts: list[int] = []
    tables: list[Ints] = []
    last, total = 0, 0  # what the last table costs, and those before it
    for i, (row, apart) in enumerate(zip(found, costs(found).tolist(), strict=True)):
        together = int(costs(tables[-1] + row)) if tables else 0
        if tables and together <= last + apart:
            tables[-1], last = tables[-1] + row, together
        else:
            firsts.append(i)
            tables.append(row)
            last, total = apart, total + last
    return np.array(firsts, np.int64), np.array(tables, np.int64).reshape(-1, 256), total + last


def costs(found: Ints) -> Ints:
    """Return what the symbols of each row ``(..., 256)`` take with a separate table, in bits times ``2 ** POINT``.

    The entropy of ``n`` symbols that occur ``c`` times each is ``n log n - sum c log c`` (Shannon 1948, section 6).

    Example:
        >>> row = np.zeros(256, np.int64)
        >>> row[:2] = 500
        >>> (int(costs(row)) - TABLE_COST - 2 * SYMBOL_COST) / (1 << POINT)
        1000.0
    """
    n, is_there = found.sum(-1), found > 0
    entropy = n * _log2(n) - (found * _log2(np.maximum(found, 1))).sum(-1)
    width = 256 - is_there.argmax(-1) - is_there[..., ::-1].argmax(-1)
    total: Ints = entropy + SYMBOL_COST * width + TABLE_COST
    return total


def _log2(n: Ints) -> Ints:
    """Return the logarithm of whole numbers from 1 to below 2**34, linear between the places of LOGS."""
    exponent = np.frexp(n.astype(np.float64))[1].astype(np.int64) - 1
    mantissa = (n << FINE >> exponent) - (1 << FINE)
    at, rest = mantissa >> (FINE - COARSE), mantissa & ((1 << (FINE - COARSE)) - 1)
    found: Ints = (exponent << POINT) + LOGS[at] + ((LOGS[at + 1] - LOGS[at]) * rest >> (FINE - COARSE))
    return found
