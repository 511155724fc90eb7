"""Compares two ways to a file of a requested size: a budget for training, and the same lossy file of a dense network.

Both networks train for the same number of epochs in all. `dense, lossy file only` has no structure: its file is written
with the same `compression`. Accuracies are on the test set; no setting was tuned on it. Run: make bench-size.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from statistics import mean

import lightning as L
import torch
from admm_or_one_shot import be_quiet, spread, train
from datasets import load
from machine import console, say_machine
from networks import ConvNet
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F

from lightning_muws import LayerRule, MicroStructure, WeightUnificationCallback, load_compressed, save_compressed
from lightning_muws.structure.budget import Bounds, allocate
from lightning_muws.structure.plan import make_plan

SPLIT = MicroStructure(prune_ratio=0.5)  # only to find out which weights can be cut, and how


def importances(model: L.LightningModule, data: L.LightningDataModule, weighting: str) -> dict[str, float]:
    """Return what a squared distance of 1 costs in each tensor, in one of three weightings."""
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
    """Return the network trained with the allocation of a budget, and the grids of its weights."""
    model, plan = copy.deepcopy(start), make_plan(start, SPLIT)
    bounds = {name: Bounds(entry.grid) for name, entry in plan.covered.items()}
    state = {name: x for name, x in model.state_dict().items() if x.is_floating_point()}
    found = allocate(state, bounds, compression, importances(start, data, weighting))
    rules = [LayerRule(name, structure=structure) for name, structure in found.structures.items()]
    callback = WeightUnificationCallback(SPLIT, rules)
    train(model, data, epochs, callback)
    callback.verify()
    return model, {name: bound.grid for name, bound in bounds.items()}


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


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--compressions", type=float, nargs="+", default=[10, 20, 50, 100])
    options.add_argument("--weightings", nargs="+", choices=("energy", "sqrt", "fisher"), default=["energy"])
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--dense-epochs", type=int, default=5)
    options.add_argument("--epochs", type=int, default=10)
    chosen = options.parse_args()
    be_quiet()
    say_machine()
    data = load("fashion")

    dense: list[float] = []
    found: dict[tuple[float, str], list[tuple]] = {}
    for seed in track(range(chosen.seeds), "training", console=console):
        L.seed_everything(seed, verbose=False)
        start = ConvNet()
        train(start, data, chosen.dense_epochs)
        longer = copy.deepcopy(start)
        dense.append(train(longer, data, chosen.epochs))
        for compression in chosen.compressions:
            rival = stored(longer, data, compression, None)
            found.setdefault((compression, "dense, lossy file only"), []).append(rival)
            for weighting in chosen.weightings:
                L.seed_everything(100 + seed, verbose=False)
                model, grids = structured(start, data, chosen.epochs, compression, weighting)
                row = stored(model, data, compression, grids)
                found.setdefault((compression, f"budget, {weighting}"), []).append(row)

    table = Table(title=f"Test accuracy over {chosen.seeds} seeds, mean +- standard deviation (each run)")
    for header in ("requested", "how", "file ratio", "accuracy", "lost"):
        table.add_column(header)
    table.add_row("", "dense, trained as long", "1", spread(dense), "")
    for (compression, how), rows in found.items():
        ratios, accuracies = ([row[i] for row in rows] for i in (0, 1))
        each = " ".join(f"{ratio:.2f}" for ratio in ratios)
        lost = f"{100 * (mean(dense) - mean(accuracies)):.2f} points"
        table.add_row(f"{compression:g}", how, each, spread(accuracies), lost)
    console.print(table)


if __name__ == "__main__":
    main()
