"""An optimizer that maximizes climbs the gradient: the penalty pulls towards the structure all the same."""

import pytest
import torch
from torch import nn

from lightning_muws import CompressionRun, MicroStructure, Penalty, Phases, Retraining
from lightning_muws.structure.plan import make_plan
from tests.support.strategies import normal, same_bits

STRUCTURE = MicroStructure((2, 2), prune_ratio=0.5, unify_ratio=0.25)
PHASES = Phases(admm_start=0, admm_end=20, update_every=1)
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, 0.05, momentum=0.9),
    "adam": lambda groups: torch.optim.Adam(groups, 0.02),
    "adamw": lambda groups: torch.optim.AdamW(groups, 0.02, weight_decay=0.1),
}


def two_layers():
    layers = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 4, bias=False)).double()
    for seed, layer in enumerate(layers):
        layer.weight.data.copy_(normal(seed, *layer.weight.shape))
    return layers


def train(optimizer, climbing, until=24):
    """Train two layers with separate losses; of those named in ``climbing`` the negated loss is maximized."""
    layers = two_layers()
    groups = [{"params": [layer.weight], "maximize": i in climbing} for i, layer in enumerate(layers)]
    opt, plan = OPTIMIZERS[optimizer](groups), make_plan(layers, STRUCTURE)
    run = CompressionRun(plan.weights(layers), plan.covered, PHASES, Retraining(), Penalty(0.5, 1.1, relative=False))
    for step in range(until):
        run.tick(step, PHASES.on(30), [opt])
        for _ in range(10):
            opt.zero_grad()
            for i, layer in enumerate(layers):
                loss = 0.1 * (layer.weight - normal(10 + i, *layer.weight.shape)).square().sum()
                (-loss if i in climbing else loss).backward()
            run.before_step(opt)
            opt.step()
            run.after_step(opt)
    return layers, run


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("climbing", [{0}, {1}, {0, 1}])
def test_maximizing_the_negated_loss_takes_the_same_path_to_the_bit(optimizer, climbing):
    layers, run = train(optimizer, set())
    others, climber = train(optimizer, climbing)
    for a, b in zip(layers.parameters(), others.parameters(), strict=True):
        assert same_bits(a.detach(), b.detach())
    assert climber.history == run.history
    assert climber.history[-1].primal < 0.5 * climber.history[0].primal


def test_the_gradient_to_climb_is_that_of_the_loss_minus_the_penalty():
    _, run = train("sgd", {0}, until=5)
    for optimizer, sign in ((torch.optim.SGD(run.weights.values(), 0.1, maximize=True), -1), (None, 1)):
        optimizer = optimizer or torch.optim.SGD(run.weights.values(), 0.1)
        for name, weight in run.weights.items():
            w = weight.detach().clone().requires_grad_()
            loss = (w.sin()).sum()
            penalty = run.method.rho / 2 * (w - run.method.z(name) + run.method.u(name)).square().sum()
            (explicit,) = torch.autograd.grad(loss + sign * penalty, w)
            weight.grad = weight.detach().cos()
            run.before_step(optimizer)
            torch.testing.assert_close(weight.grad, explicit)
