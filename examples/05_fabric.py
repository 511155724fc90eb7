"""Compress a network in a loop of Lightning Fabric, for a size. Run: python examples/05_fabric.py

Fabric owns the devices, the precision and the backward pass. CompressionRun owns the structure: its three calls stand
around the optimizer's step, as in plain PyTorch. Make the plan after setup, from the module that was set up: Fabric may
have moved its parameters.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.nn import functional as F

from lightning_muws import (
    Budget,
    CompressionRun,
    MicroStructure,
    Phases,
    choose_steps,
    load_compressed,
    save_compressed,
)
from lightning_muws.report import make_report
from lightning_muws.structure.plan import make_plan

STEPS, BATCH_SIZE = 600, 64


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, default=Path("output"), help="folder of the file")
    options.add_argument("--compression", type=float, default=10.0, help="how many times smaller the file is")
    options.add_argument("--precision", default="32-true", help="of Fabric, such as bf16-mixed")
    chosen = options.parse_args()
    chosen.output.mkdir(parents=True, exist_ok=True)

    fabric = Fabric(accelerator="cpu", devices=1, precision=chosen.precision)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    teacher = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))  # it makes the labels
    model = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 4))
    forward, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), 1e-2))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)  # late steps change the file's size little

    budget, phases = Budget(compression=chosen.compression), Phases(interval="step")
    plan = make_plan(model, MicroStructure(block_shape=(4, 4)), open_ratios=True)
    stepper = partial(choose_steps, model)  # lets retraining see the rounded values of the file
    run = CompressionRun(plan.weights(model), plan.covered, phases, budget=budget, module=model, stepper=stepper)
    run.check_budget()  # raises at once, not in the middle, if the size cannot be reached
    timeline = phases.on(STEPS)
    for step in range(STEPS):
        inputs = torch.randn(BATCH_SIZE, 16)
        run.tick(step, timeline, [optimizer])
        optimizer.zero_grad()
        fabric.backward(F.cross_entropy(forward(inputs), teacher(inputs).argmax(1)))
        run.before_step(optimizer)
        optimizer.step()
        run.after_step(optimizer)
        schedule.step()
    run.finish()  # rounds again if the file has grown too large
    run.verify()  # raises if a weight is outside its structure, or not rounded

    plan = plan.updated(run.planned)
    make_report(model, plan, run.supports, run.constraint.primal, run.history).print()
    file = chosen.output / "fabric.muws"
    grids = {name: entry.grid for name, entry in plan.covered.items()}
    saved = save_compressed(model, file, blocks=grids, compression=chosen.compression)

    model.load_state_dict(load_compressed(file))
    with torch.no_grad():
        inputs = torch.randn(10_000, 16)
        accuracy = (model(inputs).argmax(1) == teacher(inputs).argmax(1)).float().mean()
    print(f"accuracy {accuracy:.3f} file_ratio {saved.compression_ratio:.2f}")


if __name__ == "__main__":
    main()
