"""A timer for tests: times of layers that no clock measured, which follow the number of blocks that are left."""

from math import prod

from lightning_muws.structure.speed import Curve, LayerTimes, NetworkTimes

SHARES = (0.25, 0.5, 0.75, 1.0)


def fake_times(module, example_input, entries, say=lambda line: None, per_weight=1e-6, speed=1.0):
    """Return times in which a weight takes ``per_weight`` seconds, and the rest of the network a tenth of all."""
    layers, total = {}, 0.0
    for name, entry in entries.items():
        seconds = speed * per_weight * prod(entry.shape)
        total += seconds
        curves = tuple(
            Curve(shape, SHARES, tuple(seconds * (factor * (1 - share) + 0.01) for share in SHARES))
            for shape, factor in (((4, 1), 1.0), ((2, 4), 0.9))
        )
        layers[name] = LayerTimes(seconds, curves)
    say("measured")
    return NetworkTimes(1.1 * total, 0.1 * total, layers)
