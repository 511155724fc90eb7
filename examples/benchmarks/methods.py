"""Compares the training methods of `Phases(method=...)` with each other, at the same total epochs.

All start from the same dense network of each seed and train for the same number of epochs with the same optimizer and
schedules. The dense row trains that network for as many epochs without the callback. Accuracies are of the test set.
Rows with a compression let the callback choose ratios, and round in retraining as the file does; the other rows have
the same ratios in every layer but the first and the last, and no rounding.
Run: make bench-methods.
"""

from __future__ import annotations

import argparse
import copy
from statistics import mean

import lightning as L
from example_data import load
from fitting import RULES, be_quiet, spread, train
from machine import console, say_machine
from networks import ConvNet
from rich.progress import track
from rich.table import Table

from lightning_muws import MicroStructure, Phases, WeightUnificationCallback

METHODS = ("admm", "soft", "straight_through", "straight_through+admm", "one_shot")
TARGETS = {
    "90/5": {"structure": MicroStructure(prune_ratio=0.9, unify_ratio=0.05), "rules": RULES},
    "95/2.5": {"structure": MicroStructure(prune_ratio=0.95, unify_ratio=0.025), "rules": RULES},
    "50x": {"compression": 50},
    "100x": {"compression": 100},
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--methods", nargs="+", default=METHODS)
    options.add_argument("--targets", nargs="+", default=["90/5", "95/2.5", "50x"], choices=TARGETS)
    options.add_argument("--dense-epochs", type=int, default=5)
    options.add_argument("--epochs", type=int, default=10)
    chosen = options.parse_args()
    be_quiet()
    say_machine()
    data = load("fashion")

    dense: dict[int, float] = {}
    found: dict[tuple[str, str], list[float]] = {(t, m): [] for t in chosen.targets for m in chosen.methods}
    module = ConvNet()
    jobs = [(seed, target, method) for seed in chosen.seeds for target, method in found]
    for seed, target, method in track(jobs, "training", console=console):
        if seed not in dense:
            L.seed_everything(seed, verbose=False)
            module = ConvNet()
            train(module, data, chosen.dense_epochs)
            dense[seed] = train(copy.deepcopy(module), data, chosen.epochs)
        L.seed_everything(100 + seed, verbose=False)
        callback = WeightUnificationCallback(**TARGETS[target], phases=Phases(method=method))
        found[target, method].append(train(copy.deepcopy(module), data, chosen.epochs, callback))
        callback.verify()
        console.print(f"{target} {method} seed {seed}: {100 * found[target, method][-1]:.2f}")

    table = Table("target", "method", "accuracy", "to the first method, points", title="Mean +- deviation (each seed)")
    table.add_row("dense", "trained as long in all", spread(list(dense.values())), "")
    for (target, method), values in found.items():
        better = 100 * (mean(values) - mean(found[target, chosen.methods[0]]))
        table.add_row(target, method, spread(values), f"{better:+.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
