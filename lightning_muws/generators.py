"""Puts the states of random number generators back. Knows nothing of this package."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def kept_generators(others: Iterable[torch.Generator] = ()) -> Iterator[None]:
    """Put back the states of Python's, NumPy's and torch's global generators, on all devices, when the block ends.

    Args:
        others: More generators to put back.

    Example:
        >>> with kept_generators():
        ...     first = torch.rand(1)
        >>> bool(torch.rand(1) == first)
        True
    """
    own = [(generator, generator.get_state()) for generator in others]
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  users' code may draw from it
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        for index, state in enumerate(devices):
            torch.cuda.set_rng_state(state, index)
        for generator, state in own:
            generator.set_state(state)
