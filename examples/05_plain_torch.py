"""Compress a network in a training loop of plain PyTorch, without Lightning. Run: python examples/05_plain_torch.py

CompressionRun needs three calls in the loop: tick when a step begins, before_step when the gradients are complete, and
after_step when the optimizer has stepped. Its budget chooses the kinds of all blocks for the size of the file; to set
ratios yourself, leave the budget out and give them to MicroStructure.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
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
    chosen = options.parse_args()
    chosen.output.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))  # it makes the labels
    model = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)  # late steps change the file's size little

    budget = Budget(compression=chosen.compression)
    phases = Phases(interval="step")  # the method starts and ends at its default shares of the steps
    plan = make_plan(model, MicroStructure(block_shape=(4, 4)), open_ratios=True)
    stepper = partial(choose_steps, model)  # lets retraining see the rounded values of the file
    run = CompressionRun(plan.weights(model), plan.covered, phases, budget=budget, module=model, stepper=stepper)
    run.check_budget()  # raises at once, not in the middle, if the size cannot be reached
    timeline = phases.on(STEPS)
    for step in range(STEPS):
        inputs = torch.randn(BATCH_SIZE, 16)
        run.tick(step, timeline, [optimizer])
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), teacher(inputs).argmax(1)).backward()
        run.before_step(optimizer)
        optimizer.step()
        run.after_step(optimizer)
        schedule.step()
    run.finish()  # rounds again if the file has grown too large
    run.verify()  # raises if a weight is outside its structure, or not rounded

    plan = plan.updated(run.planned)
    make_report(model, plan, run.supports, run.constraint.primal, run.history).print()
    file = chosen.output / "plain.muws"
    grids = {name: entry.grid for name, entry in plan.covered.items()}
    saved = save_compressed(model, file, blocks=grids, compression=chosen.compression)

    model.load_state_dict(load_compressed(file))
    with torch.no_grad():
        inputs = torch.randn(10_000, 16)
        accuracy = (model(inputs).argmax(1) == teacher(inputs).argmax(1)).float().mean()
    print(f"accuracy {accuracy:.3f} file_ratio {saved.compression_ratio:.2f}")


if __name__ == "__main__":
    main()
