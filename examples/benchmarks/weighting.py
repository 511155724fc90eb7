"""Compares ways to weigh a layer's distance in a budget, on three trained networks, without training them further.

Each network gets a budget of each compression with each weighting, and the weights that the file would hold. The number
is the relative squared error of its outputs on held-out inputs, with all of the distance that unifying and pruning
cause, and with a tenth of it (after "/"), which is about what training leaves. Training decides in the end: `make
bench-size` with `--weightings` trains the first network. What a squared distance of 1 costs in a layer:

left         one over the energy that the layer keeps; the callback's
energy       one over the energy that it has
sqrt         that, times the root of the number of weights
squares      the mean squared gradient of random sums of the outputs (the diagonal of Gauss and Newton)
output       the squared error of the outputs over the squared distance, with a little noise on the layer
sensitivity  the slope of `sensitivity(model, loss, batches)`, its loss the error of the outputs

Run: make bench-weighting.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import lightning as L
import torch
from compress import denoising, retrieval
from example_data import load
from fitting import be_quiet, train
from machine import console, say_machine
from networks import ConvNet
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from lightning_muws import sensitivity
from lightning_muws.structure.budget import RECOVERY, allocate
from lightning_muws.structure.layer import Bounds
from lightning_muws.structure.micro import MicroStructure
from lightning_muws.structure.plan import Plan, make_plan
from lightning_muws.training.drop import compressed

WEIGHTINGS = ("left", "energy", "sqrt", "squares", "output", "sensitivity")
NOISE = 0.05  # of a layer's own size
Forward = Callable[[nn.Module, object], Tensor]


def classifying(seed: int) -> tuple[nn.Module, list, Forward]:
    """Return the demo's network, trained for five epochs, batches of images, and how outputs are computed."""
    data = load("fashion")
    L.seed_everything(seed, verbose=False)
    model = ConvNet()
    train(model, data, 5)
    return model.eval(), list(data.test.images[:1024].split(256)), lambda model, x: model(x)


def network(name: str) -> tuple[nn.Module, list, Forward]:
    """Return a trained network, batches of inputs, and how its outputs are computed."""
    if name == "demo":
        return classifying(0)
    if name == "FFDNet":
        model, batches, _ = denoising(0)
        return model, batches, lambda model, x: model(*x)
    model, batches, _ = retrieval(0, n_calibration=128)
    return model, batches, lambda model, x: model(**x).last_hidden_state[x["attention_mask"] > 0]


def importances(
    weighting: str, model: nn.Module, plan: Plan, batches: list, forward: Forward
) -> Mapping[str, float] | None:
    """Return what a squared distance of 1 costs in each covered weight; None for what the budget does itself."""
    weights = plan.weights(model)
    energies = {name: float(w.detach().square().sum()) for name, w in weights.items()}
    if weighting == "left":
        return None
    if weighting == "energy":
        return {name: 1 / energy for name, energy in energies.items()}
    if weighting == "sqrt":
        return {name: weights[name].numel() ** 0.5 / energy for name, energy in energies.items()}
    dense = [forward(model, x).detach() for x in batches]
    if weighting == "sensitivity":

        def loss(model: nn.Module, i: int) -> Tensor:
            return (forward(model, batches[i]) - dense[i]).square().mean()

        with torch.no_grad():
            report = sensitivity(model, loss, range(len(batches)), ratios=[5, 20])
        return report.importance()
    found = dict.fromkeys(weights, 0.0)
    generator = torch.Generator().manual_seed(0)
    if weighting == "squares":
        for x in batches:
            out = forward(model, x)
            total = (out * torch.randn(out.shape, generator=generator)).sum()
            # the outputs do not depend on MiniLM's pooling layer
            gradients = torch.autograd.grad(total, list(weights.values()), materialize_grads=True)
            for name, gradient in zip(weights, gradients, strict=True):
                found[name] += float(gradient.square().mean())
    else:
        for name, w in weights.items():
            raw = w.detach().clone()
            noise = NOISE * (energies[name] / raw.numel()) ** 0.5 * torch.randn(raw.shape, generator=generator)
            with torch.no_grad():
                w.add_(noise)
                found[name] = sum(
                    float((forward(model, x) - y).square().sum()) for x, y in zip(batches, dense, strict=True)
                ) / float(noise.square().sum())
                w.copy_(raw)
    middle = sorted(found[name] * energies[name] for name in found)[len(found) // 2]  # biases cost their energy
    # no weight is free, not even one on which the outputs do not depend
    return {name: max(value / middle, 1e-6 / energies[name]) for name, value in found.items()}


@torch.no_grad()
def error(model: nn.Module, batches: list, dense: list[Tensor], forward: Forward) -> float:
    """Return the squared error of the outputs over their squares."""
    lost = sum(float((forward(model, x) - y).square().sum()) for x, y in zip(batches, dense, strict=True))
    return lost / sum(float(y.square().sum()) for y in dense)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--networks", nargs="+", default=["demo", "FFDNet", "MiniLM"])
    options.add_argument("--weightings", nargs="+", default=WEIGHTINGS, choices=WEIGHTINGS)
    options.add_argument("--compressions", type=float, nargs="+", default=[10, 20, 50, 100])
    chosen = options.parse_args()
    be_quiet()
    say_machine()
    for name in chosen.networks:
        model, batches, forward = network(name)
        held_out, shown = batches[::2], batches[1::2]
        plan = make_plan(model, MicroStructure(), open_ratios=True)
        bounds = {key: Bounds.of(entry) for key, entry in plan.covered.items()}
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        tensors = {key: x.detach() for key, x in (parameters | buffers).items()}
        with torch.no_grad():
            dense = [forward(model, x) for x in held_out]
        table = Table("weighting", *(f"{c:g}x" for c in chosen.compressions), title=f"{name}: error of the outputs")
        for weighting in track(chosen.weightings, name, console=console):
            weights, row = importances(weighting, model, plan, shown, forward), []
            for compression in chosen.compressions:
                found = allocate(tensors, bounds, compression, weights, buffers)
                errors = []
                for recovery in (1.0, RECOVERY):
                    with compressed(model, plan.covered, found, recovery):
                        errors.append(error(model, held_out, dense, forward))
                row.append(" / ".join(f"{x:.3f}" for x in errors))
            table.add_row(weighting, *row)
        console.print(table)


if __name__ == "__main__":
    main()
