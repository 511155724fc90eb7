"""What the callback's work costs beside a training step of ResNet-18 at batch 32 of 3x32x32. Run: make bench."""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import median

import torch
from machine import console, interleaved, ratios, say_machine
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_muws import Budget, MicroStructure, Phases, Retraining, choose_steps
from lightning_muws.structure.plan import make_plan
from lightning_muws.training.phases import Timeline
from lightning_muws.training.rounding import Rounding
from lightning_muws.training.run import CompressionRun

STRUCTURE = MicroStructure(prune_ratio=0.8, unify_ratio=0.1)
OTHERS = ("soft", "straight_through")
PHASES = ("plain", "ADMM", *OTHERS, "tied", "frozen", "rounded")
BOUNDS = {"CIFAR": {"ADMM": 1.03, "tied": 1.06}, "ImageNet": {"ADMM": 1.10, "tied": 1.20}}


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016)."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out))
        wide = stride != 1 or n_in != n_out
        project = [nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out)] if wide else []
        self.shortcut = nn.Sequential(*project)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.two(self.one(x)) + self.shortcut(x))


def resnet18(stem: str) -> nn.Sequential:
    """Return an 11-million-weight ResNet-18 with the ``CIFAR`` (3x3) or the ``ImageNet`` (7x7, pooled) stem."""
    first = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    if stem == "ImageNet":
        first = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    blocks = [Residual(*width) for width in (*widths, (512, 512, 1))]
    return nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def trainer(model: nn.Module, phase: str) -> tuple[Callable[[], None], CompressionRun]:
    """Return a function that trains one step in the phase, on a copy of the model, and its run."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    plan = make_plan(model, STRUCTURE)
    unified = "frozen" if phase == "frozen" else "tied"
    method = phase if phase in OTHERS else "admm"
    run = CompressionRun(plan.weights(model), plan.covered, Phases(method=method), Retraining(unified))
    if phase != "plain":
        run.tick(0, Timeline(0, 10 if phase in ("ADMM", *OTHERS) else 0, 1), [optimizer])
    if phase == "rounded":
        run.rounding = Rounding(run.constraint.supports)
        run.parameters = dict(model.named_parameters())
        run.rounding.start(run.parameters, {name: float(p.abs().max()) / 16 for name, p in run.parameters.items()})
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        run.before_step(optimizer)
        optimizer.step()
        run.after_step(optimizer)

    return step, run


def n_bytes(tensors: object) -> int:
    """Return the bytes of all tensors in nested dicts and lists."""
    if isinstance(tensors, (dict, list)):
        return sum(n_bytes(value) for value in (tensors.values() if isinstance(tensors, dict) else tensors))
    return tensors.numel() * tensors.element_size() if isinstance(tensors, Tensor) else 0


def main() -> None:
    say_machine()
    for stem, rounds in (("ImageNet", 21), ("CIFAR", 7)):
        steps = {phase: trainer(resnet18(stem), phase) for phase in PHASES}
        run = steps["ADMM"][1]
        dense = resnet18(stem)
        entries = make_plan(dense, MicroStructure(), open_ratios=True).covered
        tasks = {phase: step for phase, (step, _) in steps.items()}
        tasks["one Z/U update"] = lambda run=run: run.method.update(run.weights)
        tasks["kinds for compression=20"] = lambda dense=dense, entries=entries: Budget(20).choose(dense, entries)
        tasks["steps for compression=20"] = lambda dense=dense: choose_steps(dense, {}, 20)
        times = interleaved(tasks, rounds)
        table = Table(title=f"ResNet-18, {stem} stem, SGD with momentum; ratios to a plain step of the same round")
        for header in ("", "ms", "ratio", "least", "largest", "bound"):
            table.add_column(header, justify="right")
        for name, (middle, least, largest) in ratios(times, "plain").items():
            bound = BOUNDS[stem].get(name, 1.0 if "update" in name else 2.0 if "kinds" in name else None)
            met = "" if bound is None else f"{bound:.2f} {'met' if middle <= bound else 'MISSED'}"
            numbers = (f"{1e3 * median(times[name]):.1f}", f"{middle:.3f}", f"{least:.3f}", f"{largest:.3f}")
            table.add_row(name, *numbers, met)
        console.print(table)
    covered = sum(weight.numel() * weight.element_size() for weight in run.weights.values())
    constraint = steps["tied"][1].constraint
    held = n_bytes([vars(s) | vars(s._kept) for s in constraint.supports.values()]) + n_bytes(constraint.magnitudes)
    console.print(
        f"memory beside the {covered / 2**20:.0f} MiB of covered weights: "
        f"ADMM {n_bytes(run.method.state_dict()) / covered:.3f} x (bound 1.25), "
        f"retraining {held / covered:.3f} x (bound 0.35)"
    )


if __name__ == "__main__":
    main()
