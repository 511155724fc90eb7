"""Asks for a speedup, and compares what was predicted with what `accelerate` measures. Run: make bench-speed.

For each seed a network gets random weights, its layers are timed, and structures are chosen for each speedup. The
weights are projected without training, which changes no time. Speedups are over the best dense form of float32: as
given, batch norm folded, channels last, or prepacked by oneDNN. The fastest of these is found first; then it and the
accelerated network take turns of a tenth of a second, in which each finds the caches as its own last run left them. All
is measured at batch 1 with one thread in process time, so that other processes change little; the spread over seeds has
what is left of them.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from statistics import mean, median

import torch
from cost import resnet18
from machine import console, interleaved, ratios, say_machine
from networks import ConvNet
from rich.table import Table
from torch import Tensor, nn

from lightning_muws import Budget, MicroStructure, accelerate, layer_times
from lightning_muws.errors import SettingError
from lightning_muws.runtime.measure.network import dense_forms
from lightning_muws.runtime.rewrite.graph import fold
from lightning_muws.runtime.rewrite.observe import Example, inference
from lightning_muws.structure.plan import make_plan

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-18": (lambda: resnet18("CIFAR"), (1, 3, 32, 32)),
    "ConvNet": (ConvNet, (1, 1, 28, 28)),
}
SAMPLE_S = 0.1  # of one network in a row
BOUNDS = {("ResNet-18", 2.0): (1.8, 2.4)}  # of what is measured, at every seed


def random_network(name: str, seed: int) -> nn.Module:
    """Return the network in eval mode, with random weights and statistics of batch norms."""
    torch.manual_seed(seed)
    model = NETWORKS[name][0]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def measure(model: nn.Module, x: Tensor, rounds: int) -> tuple[float, str]:
    """Return how many times faster than its best dense form `accelerate` makes a network, and the name of that form."""
    fast, _ = accelerate(model, x)
    with inference():
        folded = copy.deepcopy(model)
        fold(folded, Example.of(x))
        forms = dense_forms(model, folded, Example.of(x))
        tasks = {form: lambda m=m, e=e: e(m) for form, (m, e) in forms.items()}
        dense = interleaved(tasks, rounds // 3, SAMPLE_S)
        best = min(dense, key=lambda form: median(dense[form]))
        times = interleaved({best: tasks[best], "accelerated": lambda: fast(x)}, rounds, SAMPLE_S)
    return ratios(times, "accelerated")[best][0], best


def rows(name: str, seed: int, speedups: list[float], rounds: int) -> list[tuple[float, ...]]:
    """Return for each speedup: itself, the prediction, the measurement, the share of zeros, the energy lost."""
    model, x = random_network(name, seed), torch.randn(NETWORKS[name][1])
    plan = make_plan(model, MicroStructure(), open_ratios=True)
    start = time.process_time()
    times = layer_times(model, x, plan.covered)
    console.print(f"{name}, seed {seed}: {time.process_time() - start:.0f} s of process time for the times of layers")
    found = []
    for speedup in speedups:
        pruned = copy.deepcopy(model).requires_grad_(False)
        try:
            allocation = Budget(speedup=speedup).allocate_time(model, plan.covered, times)
        except SettingError as error:
            console.print(str(error))
            continue
        for weight, structure in allocation.structures.items():
            parameter = pruned.get_parameter(weight)
            parameter.copy_(structure.project(parameter))
        covered = [pruned.get_parameter(weight) for weight in plan.covered]
        zeros = sum(int((w == 0).sum()) for w in covered) / sum(w.numel() for w in covered)
        gained, best = measure(pruned, x, rounds)
        console.print(f"  asked {speedup:g}, predicted {allocation.speedup:.2f}, measured {gained:.2f} over {best}")
        found.append((speedup, allocation.speedup, gained, zeros, allocation.distance / len(covered)))
    return found


def shown(values: list[float], digits: int = 2) -> str:
    """Return the mean, the least and the largest value."""
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    options.add_argument("--speedups", nargs="+", type=float, default=[1.5, 2.0, 3.0])
    options.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    options.add_argument("--rounds", type=int, default=31)
    chosen = options.parse_args()
    say_machine()
    table = Table(title=f"Budget(speedup=...) at batch 1, mean and spread of {chosen.seeds} seeds, one thread")
    for header in ("network", "asked", "predicted", "measured", "measured / asked", "zeros", "energy lost", "bound"):
        table.add_column(header, justify="right" if header != "network" else "left")
    for name in chosen.networks:
        found = [row for seed in range(chosen.seeds) for row in rows(name, seed, chosen.speedups, chosen.rounds)]
        for speedup in chosen.speedups:
            of = [list(column) for column in zip(*(row for row in found if row[0] == speedup), strict=True)]
            if not of:
                table.add_row(name, f"{speedup:g}", "not reachable")
                continue
            low, high = BOUNDS.get((name, speedup), (0.0, 0.0))
            bound = f"{low} to {high} {'met' if low <= min(of[2]) and max(of[2]) <= high else 'MISSED'}" if high else ""
            ratio = [gained / speedup for gained in of[2]]
            table.add_row(name, f"{speedup:g}", *map(shown, of[1:3]), shown(ratio), *map(shown, of[3:5]), bound)
    console.print(table)


if __name__ == "__main__":
    main()
