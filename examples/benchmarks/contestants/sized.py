"""Our own file of a network, lossless or as coarse as a rule allows."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import nn

from contestants.arena import Arena, State, Stored
from lightning_muws import load_compressed, save_compressed

MAX_ERRORS = (0.15, 0.125, 0.1, 0.08, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01, 0.005)
ALLOWED_LOSS = 0.001  # of accuracy, that a network may lose when its weights are rounded for a smaller file


def muws(state: State, how: str = "muws", **settings: object) -> Stored:
    """Return our file of a network; without settings it is lossless."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.muws"
        save_compressed(dict(state), path, **settings)
        return Stored(path.stat().st_size, how, load_compressed(path))


def rounded(arena: Arena, state: State, into: nn.Module | None = None) -> Stored:
    """Return our lossy file of a network with the largest `max_error` that loses 0.1 points or less.

    Args:
        arena: Its test set decides.
        state: The tensors of the network.
        into: A network that they fit into, if it is smaller than a new one.
    """
    least = arena.accuracy(arena.loaded(state, into)) - ALLOWED_LOSS
    for max_error in MAX_ERRORS:
        file = muws(state, f"muws, max_error {max_error:g}", max_error=max_error, lossy="all")
        if arena.accuracy(arena.loaded(file.state, into)) >= least:
            return file
    return muws(state)
