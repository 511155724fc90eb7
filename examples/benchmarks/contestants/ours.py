"""Our callback, asked for a size."""

from __future__ import annotations

from fitting import train

from contestants.arena import EPOCHS, Arena
from contestants.sized import muws
from lightning_muws import WeightUnificationCallback, accelerate


def blocks(arena: Arena, setting: str) -> dict:
    """Return the row of a network trained for a file that is so many times smaller."""
    model, callback = arena.start(), WeightUnificationCallback(compression=float(setting))
    train(model, arena.data, EPOCHS, callback)
    callback.verify()
    grids = {name: entry.grid for name, entry in callback.plan.covered.items()}
    file = muws(model.state_dict(), "muws, trained grid", compression=float(setting), blocks=grids)
    fast, _ = accelerate(arena.loaded(file.state), arena.data.test.images[:1])
    return arena.judged([file], route=fast)


SETTINGS = {blocks: ("10", "20", "50", "100")}
