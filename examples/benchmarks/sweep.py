"""The trials behind the defaults of Phases and Penalty: when ADMM runs, how often it updates, how hard it pulls.

Run: make sweep.

Half of Fashion-MNIST's training images, 90 % of the blocks pruned and 5 % unified, first and last layer left out;
from a dense network (10 epochs, with the module's schedule restarted for retraining, or left alone) and from scratch
(16 epochs). One seed unless --seeds says more: hints, not results. Accuracies are of the test set.
"""

from __future__ import annotations

import argparse
import copy

import lightning as L
from example_data import load
from fitting import RULES, be_quiet, spread, train
from machine import console, say_machine
from networks import ConvNet
from rich.progress import track
from rich.table import Table

from lightning_muws import MicroStructure, Penalty, Phases, Retraining, WeightUnificationCallback

STRUCTURE = MicroStructure(prune_ratio=0.9, unify_ratio=0.05)
ONE_SHOT = {
    "one-shot": (Phases(admm_start=0, admm_end=0), Penalty()),
    "one-shot, after 3 more dense epochs": (Phases(admm_start=0.3, admm_end=0.3), Penalty()),
}
PRETRAINED = {
    **ONE_SHOT,
    "the defaults": (Phases(), Penalty()),
    "updates at epochs, rho 3 growing by 1.5": (Phases(update_every=1), Penalty(rho=3.0, rho_growth=1.5)),
    **{f"{n} updates": (Phases(update_every=1 / n), Penalty(rho_growth=33 ** (1 / n))) for n in (12, 50)},
    **{
        f"rho from {first} to {last}": (Phases(), Penalty(rho=first, rho_growth=(last / first) ** 0.04))
        for first, last in ((0.1, 3.0), (0.3, 10.0), (3.0, 100.0))
    },
    **{
        f"ADMM from {start} until {end}": (Phases(admm_start=start, admm_end=end), Penalty())
        for start, end in ((0.0, 0.2), (0.0, 0.3), (0.0, 0.4), (0.3, 0.5))
    },
}
ALONE = {"the defaults": (Phases(), Penalty())}
SCRATCH = {
    "dense": None,
    "one-shot, after 0.3 of the run": (Phases(admm_start=0.3, admm_end=0.3), Penalty()),
    "the defaults": (Phases(), Penalty()),
    **{
        f"ADMM from {start} until {end}": (Phases(admm_start=start, admm_end=end), Penalty())
        for start, end in ((0.0, 0.3), (0.0, 0.5), (0.2, 0.4), (0.3, 0.5))
    },
}


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
    jobs = [(part, name, settings) for part in wanted for name, settings in trials[part].items()]
    found: dict[tuple[str, str], list[float]] = {(part, name): [] for part, name, _ in jobs}
    for seed in range(chosen.seeds):
        L.seed_everything(seed, verbose=False)
        dense = ConvNet()
        untrained = copy.deepcopy(dense)
        console.print(f"seed {seed}: dense after 6 epochs {train(dense, data, 6):.4f}")
        for part, name, settings in track(jobs, f"seed {seed}", console=console):
            L.seed_everything(100 + seed, verbose=False)
            retraining = Retraining(schedule="module" if part == "alone" else "restart")
            callbacks = []
            if settings:
                phases, penalty = settings
                callbacks = [WeightUnificationCallback(STRUCTURE, RULES, phases, retraining, penalty)]
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
