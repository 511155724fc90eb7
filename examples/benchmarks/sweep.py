"""The trials behind the defaults of Phases: rho, its growth, and where ADMM begins and ends. Run: make sweep.

Half of Fashion-MNIST's training images, 90 % of the blocks pruned and 5 % unified, the first convolution left out, one
seed unless --seeds says more: hints, not results. Accuracies are of the test set.
"""

from __future__ import annotations

import argparse
import copy
from itertools import product

import lightning as L
from admm_or_one_shot import RULES, be_quiet, spread, train
from datasets import load
from machine import console, say_machine
from networks import ConvNet
from rich.progress import track
from rich.table import Table

from lightning_muws import MicroStructure, Phases, Retraining, WeightUnificationCallback

STRUCTURE = MicroStructure(prune_ratio=0.9, unify_ratio=0.05)
RHOS = ((3e-3, 2.0), (1e-2, 1.5), (3e-2, 1.5), (1e-1, 1.3))
PRETRAINED = {"one-shot": Phases(admm_start=0, admm_end=0)} | {
    f"end {end}, rho {rho}, growth {growth}": Phases(admm_end=end, rho=rho, rho_growth=growth)
    for end, (rho, growth) in product((0.3, 0.4, 0.5, 0.6), RHOS)
}
SCRATCH = {"dense": None} | {
    f"start {start}, end {end}": Phases(admm_start=start, admm_end=end)
    for start, end in ((0.4, 0.4), (0, 0.4), (0, 0.6), (0.2, 0.5), (0.2, 0.6), (0.4, 0.7))
}
ALONE = {f"end {end}, schedule left alone": Phases(admm_end=end) for end in (0.3, 0.4)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--only", choices=["pretrained", "alone", "scratch"], nargs="*")
    chosen = options.parse_args()
    be_quiet()
    say_machine()
    data = load("fashion", n_train=30_000)
    wanted = chosen.only or ["pretrained", "alone", "scratch"]
    trials = {"pretrained": PRETRAINED, "alone": ALONE, "scratch": SCRATCH}
    jobs = [(part, name, phases) for part in wanted for name, phases in trials[part].items()]
    found: dict[tuple[str, str], list[float]] = {(part, name): [] for part, name, _ in jobs}
    for seed in range(chosen.seeds):
        L.seed_everything(seed, verbose=False)
        dense = ConvNet()
        untrained = copy.deepcopy(dense)
        console.print(f"seed {seed}: dense after 6 epochs {train(dense, data, 6):.4f}")
        for part, name, phases in track(jobs, f"seed {seed}", console=console):
            L.seed_everything(100 + seed, verbose=False)
            retraining = Retraining(schedule="module" if part == "alone" else "restart")
            callbacks = [WeightUnificationCallback(STRUCTURE, RULES, phases, retraining)] if phases else []
            module, epochs = (untrained, 16) if part == "scratch" else (dense, 10)
            found[part, name].append(train(copy.deepcopy(module), data, epochs, *callbacks))
            last = f"{callbacks[0].history[-1].primal:.3f}" if callbacks else ""
            console.print(f"{part}: {name}: {found[part, name][-1]:.4f} primal residual at the projection {last}")
    table = Table(title="Test accuracy")
    for header in ("begins", "phases", "accuracy"):
        table.add_column(header)
    for (part, name), values in found.items():
        table.add_row(part, name, spread(values))
    console.print(table)


if __name__ == "__main__":
    main()
