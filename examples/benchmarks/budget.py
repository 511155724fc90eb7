"""Compares two ways to a file of a requested size: a budget for training, and the same lossy file of a dense network.

Both networks train for the same number of epochs in all. `dense, lossy file only` has no structure: its file is written
with the same `compression`. The last column says how many times smaller our file is than the rival's at equal accuracy:
the rival's file is written in many sizes, and its curve of accuracy against size is made monotone and interpolated.
`left` is what the callback does: a squared distance costs one over the energy that a layer keeps. Other weightings are
one over the energy that it had (`energy`), that times the root of its size (`sqrt`), and the mean squared gradient
(`fisher`). `no blocks` trains the rounded values alone: nothing is pruned or unified. `auto shapes` lets each layer
choose its block shape. `--width 32` is the demo's network; with 48 it has 800,000 weights.
Accuracies are on the test set; no setting was tuned on it. Run: make bench-size.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import mean

import lightning as L
import torch
from example_data import load
from fitting import be_quiet, spread, train
from machine import console, say_machine
from networks import ConvNet
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F

from lightning_muws import MicroStructure, WeightUnificationCallback, load_compressed, save_compressed
from lightning_muws.structure.budget import allocate
from lightning_muws.training import budget

WEIGHTINGS = ("left", "energy", "sqrt", "fisher", "no blocks", "auto shapes")
STRUCTURES = {
    "no blocks": MicroStructure(prune_ratio=(0, 0), unify_ratio=(0, 0)),
    "auto shapes": MicroStructure(block_shape="auto"),
}
RIVALS = tuple(2 * 1.12**i for i in range(30))  # ratios of the rival's files: 2 to 53


def importances(model: L.LightningModule, data: L.LightningDataModule, weighting: str) -> dict[str, float]:
    """Return what a squared distance of 1 costs in each tensor, in a weighting that is not the callback's."""
    state = {name: x for name, x in model.state_dict().items() if x.is_floating_point() and x.any()}
    if weighting == "energy":
        return {name: 1 / float(x.square().sum()) for name, x in state.items()}
    if weighting == "sqrt":
        return {name: x.numel() ** 0.5 / float(x.square().sum()) for name, x in state.items()}
    squares = dict.fromkeys(state, 0.0)  # fisher: the mean squared gradient of single images
    probe = copy.deepcopy(model)
    for image, label in zip(data.train.images[:256], data.train.labels[:256], strict=True):
        probe.zero_grad()
        F.cross_entropy(probe(image[None]), label[None]).backward()
        for name, p in probe.named_parameters():
            squares[name] += float(p.grad.square().mean()) / 256
    return {name: value for name, value in squares.items() if value}


def structured(
    start: L.LightningModule, data: L.LightningDataModule, epochs: int, compression: float, weighting: str
) -> tuple[L.LightningModule, dict]:
    """Return the network trained for a size, and the grids of its weights."""
    structure = STRUCTURES.get(weighting, MicroStructure())
    model, callback = copy.deepcopy(start), WeightUnificationCallback(structure, compression=compression)
    weights = None if weighting in ("left", *STRUCTURES) else importances(start, data, weighting)
    budget.allocate = partial(allocate, importance=weights)
    train(model, data, epochs, callback)
    callback.verify()
    return model, {name: entry.grid for name, entry in callback.plan.covered.items()}


def stored(model: L.LightningModule, data: L.LightningDataModule, compression: float, grids: dict | None) -> tuple:
    """Return the ratio of a file of the network, and the accuracy of what is loaded from it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.muws"
        ratio = save_compressed(model, path, blocks=grids, compression=compression).compression_ratio
        loaded = copy.deepcopy(model).eval()
        loaded.load_state_dict(load_compressed(path))
    with torch.no_grad():
        right = (loaded(data.test.images).argmax(1) == data.test.labels).float().mean()
    return ratio, float(right)


def times_smaller(row: tuple, rivals: list[tuple]) -> float:
    """Return our ratio over the rival's at equal accuracy; infinity if none of its files is as good.

    Args:
        row: Our ratio and accuracy.
        rivals: The rival's ratios and accuracies, the smallest ratio first.
    """
    ratio, accuracy = row
    best = list(accumulate((a for _, a in reversed(rivals)), max))[::-1]  # as good as any smaller file is
    curve = [(r, b) for (r, _), b in zip(rivals, best, strict=True)]
    if accuracy > curve[0][1]:
        return math.inf
    for (r, a), (next_r, next_a) in pairwise(curve):
        if next_a < accuracy <= a:
            share = (a - accuracy) / (a - next_a)
            return ratio / (r * (next_r / r) ** share)
    return ratio / curve[-1][0]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--compressions", type=float, nargs="+", default=[10, 20, 50, 100])
    options.add_argument("--weightings", nargs="+", choices=WEIGHTINGS, default=["left"])
    options.add_argument("--width", type=int, default=32)
    options.add_argument("--first-seed", type=int, default=0)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--dense-epochs", type=int, default=5)
    options.add_argument("--epochs", type=int, default=10)
    chosen = options.parse_args()
    be_quiet()
    say_machine()
    data = load("fashion")

    dense: list[float] = []
    found: dict[tuple[float, str], list[tuple]] = {}
    for seed in track(range(chosen.first_seed, chosen.first_seed + chosen.seeds), "training", console=console):
        L.seed_everything(seed, verbose=False)
        start = ConvNet(width=chosen.width)
        train(start, data, chosen.dense_epochs)
        longer = copy.deepcopy(start)
        dense.append(train(longer, data, chosen.epochs))
        rivals = [stored(longer, data, rival, None) for rival in RIVALS]
        for compression in chosen.compressions:
            rival = stored(longer, data, compression, None)
            found.setdefault((compression, "dense, lossy file only"), []).append((*rival, 1.0))
            for weighting in chosen.weightings:
                L.seed_everything(100 + seed, verbose=False)
                model, grids = structured(start, data, chosen.epochs, compression, weighting)
                row = stored(model, data, compression, grids)
                found.setdefault((compression, f"budget, {weighting}"), []).append((*row, times_smaller(row, rivals)))
                console.print(
                    f"seed {seed}, dense {100 * dense[-1]:.2f}; {weighting}, asked for {compression:g}: "
                    f"{100 * row[1]:.2f} in a file {row[0]:.1f} times smaller"
                )

    table = Table(title=f"Test accuracy over {chosen.seeds} seeds, mean +- standard deviation (each run)")
    for header in ("requested", "how", "file ratio", "accuracy", "lost", "times smaller at equal accuracy"):
        table.add_column(header)
    table.add_row("", "dense, trained as long", "1", spread(dense), "", "")
    for (compression, how), rows in found.items():
        ratios, accuracies, smaller = ([row[i] for row in rows] for i in (0, 1, 2))
        each = " ".join(f"{ratio:.2f}" for ratio in ratios)
        lost = f"{100 * (mean(dense) - mean(accuracies)):.2f} points"
        table.add_row(f"{compression:g}", how, each, spread(accuracies), lost, " ".join(f"{x:.2f}" for x in smaller))
    console.print(table)


if __name__ == "__main__":
    main()
