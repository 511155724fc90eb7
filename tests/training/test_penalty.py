"""How rho is scaled and changed: laws of relative penalties and of residual balancing."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_muws import CompressionRun, MicroStructure, Penalty, Phases
from lightning_muws.errors import SettingError
from lightning_muws.structure.plan import make_plan
from lightning_muws.training.admm import Admm
from lightning_muws.training.penalty import FAR
from lightning_muws.training.residuals import total
from tests.support.strategies import normal, same_bits

JOINT = MicroStructure((2, 2), prune_ratio=0.5, unify_ratio=0.25)
RELATIVE = Penalty(2.0, 1.3, rho_max=50.0, relative=True)


def network(scales: tuple[float, float] = (1.0, 1.0)) -> nn.Sequential:
    made = nn.Sequential(nn.Linear(12, 8, bias=False), nn.Tanh(), nn.Linear(8, 6, bias=False))
    for i, (layer, scale) in enumerate(zip((made[0], made[2]), scales, strict=True)):
        layer.weight.data = scale * normal(i, *layer.weight.shape, dtype=torch.float32)
    return made


def loss(module: nn.Sequential, scales: tuple[float, float], step: int) -> torch.Tensor:
    """Return the loss of the network whose weights are divided by the scales again: it does not depend on them."""
    x = normal(100 + step, 16, 12, dtype=torch.float32)
    hidden = torch.tanh(x @ (module[0].weight / scales[0]).T)
    return (hidden @ (module[2].weight / scales[1]).T - x[:, :6]).square().mean()


def trajectory(penalty: Penalty, scales: tuple[float, float], optimizer: str) -> list[torch.Tensor]:
    """Return W, Z and U of both layers after each update, divided by the scales."""
    module = network(scales)
    plan = make_plan(module, JOINT)
    weights = plan.weights(module)
    groups = {
        "sgd": [{"params": [w], "lr": 0.05 * c**2} for w, c in zip(weights.values(), scales, strict=True)],
        "adam": [
            {"params": [w], "lr": 0.01 * c, "eps": 2.0**-20 / c} for w, c in zip(weights.values(), scales, strict=True)
        ],
    }[optimizer]
    steps = torch.optim.SGD(groups, 0.1, momentum=0.5) if optimizer == "sgd" else torch.optim.Adam(groups)
    admm, found = Admm(plan.covered, penalty), []
    admm.start(weights)
    for step in range(12):
        steps.zero_grad()
        loss(module, scales, step).backward()
        admm.before_step(weights)
        steps.step()
        if step % 3 == 2:
            admm.update(weights)
            for (name, w), c in zip(weights.items(), scales, strict=True):
                found += [w.detach() / c, admm.z(name) / c, admm.u(name) / c]
    return found


@pytest.mark.parametrize("balance", ["none", "network", "weight"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@given(st.tuples(st.integers(-12, 12), st.integers(-12, 12)))
@settings(max_examples=10, deadline=None)
def test_a_layer_scaled_by_a_power_of_two_has_a_scaled_trajectory_to_the_bit(balance, optimizer, exponents):
    penalty = replace(RELATIVE, balance="weight" if balance == "network" else balance)
    scales = 2.0 ** exponents[0], 2.0 ** exponents[1]
    if balance == "network":  # the residual of the network weighs its layers by their size, so all get one scale
        penalty, scales = replace(RELATIVE, balance="network"), (scales[0], scales[0])
    truth, found = trajectory(penalty, (1.0, 1.0), optimizer), trajectory(penalty, scales, optimizer)
    assert all(torch.equal(x, y) for x, y in zip(truth, found, strict=True))
    assert any(not torch.equal(x, y) for x, y in zip(truth[:3], truth[-6:-3], strict=True))


def test_an_absolute_penalty_follows_no_such_law():
    penalty = Penalty(0.1, rho_max=10.0, relative=False)
    truth, found = trajectory(penalty, (1.0, 1.0), "sgd"), trajectory(penalty, (4.0, 1.0), "sgd")
    assert not all(torch.equal(x, y) for x, y in zip(truth, found, strict=True))


def test_a_relative_penalty_does_not_depend_on_the_number_of_weights():
    # the same relative distance costs the same in a layer of 16 blocks and in one of 1024
    block, moved = normal(0, 4, 4), 0.1 * normal(1, 4, 4)
    costs = []
    for n in (4, 32):
        layer = nn.Linear(4 * n, 4 * n, bias=False, dtype=torch.float64)
        layer.weight.data = block.repeat(n, n)
        plan = make_plan(layer, MicroStructure((4, 4), unify_ratio=1.0))
        admm, weights = Admm(plan.covered, Penalty(0.5, relative=True)), {"weight": layer.weight}
        admm.start(weights)
        layer.weight.data += moved.repeat(n, n)
        costs.append(float(admm.penalty(weights)))
    assert costs[0] == pytest.approx(costs[1], rel=1e-12)
    distance = (block + moved - MicroStructure((4, 4), unify_ratio=1.0).project(block)).norm() / block.norm()
    assert costs[0] == pytest.approx(0.5 / 2 * float(distance) ** 2)


@pytest.mark.parametrize(
    "penalty", [RELATIVE, replace(RELATIVE, balance="weight"), Penalty(0.1, balance="network", relative=False)]
)
def test_the_added_gradient_is_that_of_the_penalty(penalty):
    module = network().double()
    plan = make_plan(module, JOINT)
    weights, admm = plan.weights(module), Admm(plan.covered, penalty)
    admm.start(weights)
    for step in range(3):
        for i, w in enumerate(weights.values()):
            w.data += 0.1 * normal(step * 2 + i, *w.shape)
        admm.update(weights)
    admm.before_step(weights)
    for name, w in weights.items():
        anchor = (admm.z(name) - admm.u(name)).detach()
        x = w.detach().clone().requires_grad_()
        given_ = admm.penalty({name: x})
        pull = 2 * float(given_) / float((x.detach() - anchor).square().sum())
        torch.testing.assert_close(w.grad, pull * (x - anchor).detach())


@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.integers(1, 3))
def test_rho_changes_only_where_one_residual_is_ten_times_the_other(rho, primal, dual, n_updates):
    penalty = Penalty(rho, 2.0, rho_max=1e9, balance="network", relative=False)
    found = penalty.balanced(rho, primal, dual, n_updates)
    if primal > FAR * rho * dual:
        assert found == rho * 2.0**n_updates
    elif rho * dual > FAR * primal:
        assert found == rho / 2.0**n_updates
    else:
        assert found == rho
    assert replace(penalty, rho_max=rho).balanced(rho, primal, 0.0) == rho


def rhos(admm: Admm) -> dict[str, float]:
    return admm.state_dict()["rho"]


@pytest.mark.parametrize("balance", ["network", "weight"])
@pytest.mark.parametrize(("rho", "moves"), [(1e-4, (0.01, 1.0)), (1e4, (0.01, 0.01)), (1e4, (1.0, 1e-5))])
def test_the_unscaled_dual_does_not_change_where_rho_does(balance, rho, moves):
    duals, found, residuals = [], [], {}
    for growth in (1.0, 4.0):
        module = network()
        plan = make_plan(module, JOINT)
        weights, admm = (
            plan.weights(module),
            Admm(plan.covered, Penalty(rho, growth, rho_max=1e6, balance=balance, relative=False)),
        )
        admm.start(weights)
        for i, (w, move) in enumerate(zip(weights.values(), moves, strict=True)):
            w.data += move * normal(7 + i, *w.shape, dtype=torch.float32)
        residuals = admm.update(weights)
        found.append(rhos(admm))
        duals.append([found[-1][name] * admm.u(name) for name in weights])
    assert found[0] != found[1]
    for one, two in zip(*duals, strict=True):
        torch.testing.assert_close(one, two)
    penalty = Penalty(rho, 4.0, rho_max=1e6, balance=balance, relative=False)
    overall = total(residuals, weights)
    for name, r in residuals.items():
        judged = r if balance == "weight" else overall
        assert found[1][name] == penalty.balanced(rho, judged.primal, judged.dual)


BALANCED = [Penalty(0.1, relative=True, balance="weight"), Penalty(0.01, 2.0, balance="network", relative=False)]


@pytest.mark.parametrize("penalty", [*BALANCED, RELATIVE])
def test_a_resumed_run_has_the_same_bits(penalty):
    phases = Phases(admm_start=0, admm_end=6, update_every=1)

    def make(module: nn.Sequential) -> tuple[CompressionRun, torch.optim.Optimizer]:
        plan = make_plan(module, JOINT)
        run = CompressionRun(plan.weights(module), plan.covered, phases, penalty=penalty)
        return run, torch.optim.SGD(module.parameters(), 0.05)

    def epoch(module: nn.Sequential, run: CompressionRun, optimizer: torch.optim.Optimizer, now: int) -> None:
        run.tick(now, phases.on(8), [optimizer])
        optimizer.zero_grad()
        loss(module, (1.0, 1.0), now).backward()
        run.before_step(optimizer)
        optimizer.step()
        run.after_step(optimizer)

    module = network()
    run, optimizer = make(module)
    saved = None
    for now in range(8):
        epoch(module, run, optimizer, now)
        if now == 3:
            saved = copy.deepcopy(run.state_dict()), {name: x.clone() for name, x in module.state_dict().items()}
    other = network((3.0, 3.0))  # other norms: what is relative to them comes from the state
    resumed, optimizer = make(other)
    other.load_state_dict(saved[1])
    resumed.load_state_dict(saved[0])
    for now in range(4, 8):
        epoch(other, resumed, optimizer, now)
    assert resumed.history == run.history
    assert all(same_bits(x, y) for x, y in zip(module.parameters(), other.parameters(), strict=True))


def test_a_weight_of_zeros_is_pulled_as_by_an_absolute_penalty():
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.data.zero_()
    plan = make_plan(layer, JOINT)
    admm, weights = Admm(plan.covered, Penalty(0.5, relative=True)), {"weight": layer.weight}
    admm.start(weights)
    layer.weight.data.fill_(1.0)
    assert float(admm.penalty(weights)) == 0.25 * 16
    assert math.isfinite(admm.update(weights)["weight"].primal)


@pytest.mark.parametrize("wrong", [1, "yes", None])
def test_relative_is_a_switch(wrong):
    with pytest.raises(SettingError, match=r"relative=.* is not allowed: give True or False"):
        Penalty(relative=wrong)
