"""Optimizers that keep points beside the weights: they are held to the structure like weights, not like gradients."""

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_muws import CompressionRun, MicroStructure, Penalty, Phases, Retraining
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.plan import make_plan
from tests.support.strategies import normal, same_bits

STRUCTURE = MicroStructure((2, 2), prune_ratio=0.4, unify_ratio=0.3)
PHASES = Phases(admm_start=1, admm_end=6, update_every=1)


class ScheduleFree(Optimizer):
    """Schedule-free SGD (Defazio et al. 2024, arXiv:2405.15682, equations 2 to 4): state ``z``, weights y or x."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            for y in group["params"]:
                z = self.state[y].setdefault("z", y.detach().clone())
                grad = y.grad + group["weight_decay"] * y
                y.lerp_(z, 1 / group["k"])
                y.add_(grad, alpha=group["lr"] * (group["momentum"] * (1 - 1 / group["k"]) - 1))
                z.sub_(group["lr"] * grad)

    @torch.no_grad()
    def show_average(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.lerp_(self.state[p]["z"], 1 - 1 / group["momentum"])


OPTIMIZERS = {
    "schedule-free": lambda p: ScheduleFree(p, 0.05),
    "schedule-free with decay": lambda p: ScheduleFree(p, 0.05, weight_decay=0.5),
    "ASGD": lambda p: torch.optim.ASGD(p, 0.05, t0=3),
    "ASGD with decay": lambda p: torch.optim.ASGD(p, 0.05, t0=3, weight_decay=0.5),
}


def train(optimizer, unified, dtype, steps=14):
    layer = nn.Linear(6, 8, bias=False, dtype=dtype)
    layer.weight.data.copy_(normal(0, 8, 6))
    plan, opt = make_plan(layer, STRUCTURE), OPTIMIZERS[optimizer](layer.parameters())
    run = CompressionRun(plan.weights(layer), plan.covered, PHASES, Retraining(unified), Penalty(0.1, relative=False))
    magnitudes = None
    for step in range(steps):
        run.tick(step, PHASES.on(20), [opt])
        if run.supports and magnitudes is None:
            magnitudes = run.supports["weight"].first(layer.weight)
        opt.zero_grad()
        (layer(normal(8, 16, 6).to(dtype)) - normal(9, 16, 8).to(dtype)).square().mean().backward()
        run.before_step(opt)
        opt.step()
        run.after_step(opt)
    return layer, run, opt, magnitudes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unified", ["tied", "frozen"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_points_of_an_optimizer_are_inside_the_structure_to_the_bit(optimizer, unified, dtype):
    layer, run, opt, magnitudes = train(optimizer, unified, dtype)
    support, state = run.supports["weight"], opt.state[layer.weight]
    point = state["ax" if "ASGD" in optimizer else "z"]
    assert support.error(point) == 0
    blocks = support.grid.split(point)[support.kinds.flatten() == Kind.UNIFIED]
    assert (blocks != 0).all()
    if unified == "frozen":
        assert same_bits(support.first(point), magnitudes)


@pytest.mark.parametrize("unified", ["tied", "frozen"])
@pytest.mark.parametrize("optimizer", ["schedule-free", "schedule-free with decay"])
def test_the_averaged_network_of_a_schedule_free_optimizer_is_inside_the_structure(optimizer, unified):
    layer, run, opt, magnitudes = train(optimizer, unified, torch.float64)
    opt.show_average()
    support = run.supports["weight"]
    assert support.error(layer.weight.detach()) < 1e-15
    if unified == "frozen":
        assert same_bits(support.first(layer.weight), magnitudes)


def test_dense_weights_of_a_point_are_left_alone_at_the_projection():
    layer, run, opt, _ = train("schedule-free", "frozen", torch.float64, steps=6)
    before = opt.state[layer.weight]["z"].clone()
    run.freeze(6, [opt])
    support = run.supports["weight"]
    dense = support.kinds.flatten() == Kind.DENSE
    blocks = [support.grid.split(x)[dense] for x in (before, opt.state[layer.weight]["z"])]
    assert same_bits(*blocks)
