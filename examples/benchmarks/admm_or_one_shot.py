"""Compares the callback's ADMM with one-shot projection and retraining, at the same total epochs. Run: make bench.

Both start from the same dense network of each seed and train for the same number of epochs with the same optimizer and
schedule; one-shot is the same callback with `Phases(admm_start=0, admm_end=0)`. The dense row continues from that network for
as many epochs. Accuracies are of the test set.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import warnings
from statistics import mean, stdev

import lightning as L
from datasets import Images, load
from machine import console, say_machine
from networks import ConvNet
from rich.progress import track
from rich.table import Table

from lightning_muws import LayerRule, MicroStructure, Phases, WeightUnificationCallback

METHODS = {"ADMM": Phases(), "one-shot": Phases(admm_start=0, admm_end=0)}
STRUCTURES = {
    "90 % pruned, 5 % unified": MicroStructure(prune_ratio=0.9, unify_ratio=0.05),
    "95 % pruned, 2.5 % unified": MicroStructure(prune_ratio=0.95, unify_ratio=0.025),
}
RULES = (LayerRule("features.0.*", skip=True), LayerRule("classifier.2.*", skip=True))  # as is customary


def be_quiet() -> None:
    """Leave the terminal to progress and tables."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def train(module: L.LightningModule, data: Images, epochs: int, *callbacks: L.Callback) -> float:
    """Fit without a word and return the test accuracy."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", limit_val_batches=0, **quiet)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(module, data)
        return trainer.test(module, data, verbose=False)[0]["test_accuracy"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--dense-epochs", type=int, default=5)
    options.add_argument("--epochs", type=int, default=10)
    chosen = options.parse_args()
    be_quiet()
    say_machine()
    data = load("fashion")

    dense: list[float] = []
    found: dict[tuple[str, str], list[float]] = {(s, m): [] for s in STRUCTURES for m in METHODS}
    jobs = [(seed, s, m) for seed in range(chosen.seeds) for s in STRUCTURES for m in METHODS]
    module = ConvNet()
    for seed, structure, method in track(jobs, "training", console=console):
        if len(dense) <= seed:
            L.seed_everything(seed, verbose=False)
            module = ConvNet()
            train(module, data, chosen.dense_epochs)
            dense.append(train(copy.deepcopy(module), data, chosen.epochs))
        L.seed_everything(100 + seed, verbose=False)
        callback = WeightUnificationCallback(STRUCTURES[structure], RULES, METHODS[method])
        found[structure, method].append(train(copy.deepcopy(module), data, chosen.epochs, callback))
        callback.verify()

    table = Table(title=f"Test accuracy over {chosen.seeds} seeds, mean +- standard deviation (each run)")
    for header in ("structure", *METHODS, "ADMM is better by"):
        table.add_column(header)
    table.add_row("dense, trained as long in all", spread(dense), "", "")
    for structure in STRUCTURES:
        admm, one_shot = (found[structure, method] for method in METHODS)
        table.add_row(structure, spread(admm), spread(one_shot), f"{100 * (mean(admm) - mean(one_shot)):+.2f} points")
    console.print(table)


def spread(values: list[float]) -> str:
    each = " ".join(f"{100 * value:.2f}" for value in values)
    return f"{100 * mean(values):.2f} +- {100 * (stdev(values) if len(values) > 1 else 0):.2f} ({each})"


if __name__ == "__main__":
    main()
