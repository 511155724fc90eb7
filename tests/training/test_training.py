"""Training in plain torch: ADMM against its closed form, the constraint, the phases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_muws import LayerRule, MicroStructure, Penalty, Phases, Retraining
from lightning_muws.errors import SettingError, StateError
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.plan import make_plan
from lightning_muws.training.admm import Admm
from lightning_muws.training.constraint import Constraint
from lightning_muws.training.phases import Timeline
from lightning_muws.training.run import CompressionRun
from tests.support.modules import OPTIMIZERS
from tests.support.strategies import normal, same_bits

JOINT = MicroStructure((2, 2), prune_ratio=0.5, unify_ratio=0.25)


def a_layer(structure: MicroStructure, seed: int = 0, dtype: torch.dtype = torch.float64):
    layer = nn.Linear(6, 8, bias=False, dtype=dtype)
    layer.weight.data.copy_(normal(seed, 8, 6))
    return layer, make_plan(layer, structure)


# ---- ADMM


def test_admm_solves_a_quadratic_with_a_linear_set():
    # Every block one value: a subspace, so min 1/2 (w - a)' H (w - a) over it has a closed form by its basis B.
    layer, plan = a_layer(MicroStructure((2, 2), unify_ratio=1.0, signs="shared"))
    a, root = normal(1, 48), normal(2, 48, 48)
    h = root @ root.T / 48 + torch.eye(48, dtype=torch.float64)
    grid = plan.covered["weight"].grid
    units = torch.eye(12, dtype=torch.float64)[:, :, None].expand(12, 12, 4)
    basis = torch.stack([grid.merge(unit, layer.weight.detach()).flatten() for unit in units]).T
    closed = basis @ torch.linalg.solve(basis.T @ h @ basis, basis.T @ h @ a)

    admm, weights = Admm(plan.covered, Penalty(1.0, rho_growth=1.0, relative=False)), {"weight": layer.weight}
    admm.start(weights)
    for _ in range(400):
        v = (admm.z("weight") - admm.u("weight")).flatten()
        with torch.no_grad():  # the exact W-step
            w = torch.linalg.solve(h + admm.rho * torch.eye(48, dtype=torch.float64), h @ a + admm.rho * v)
            layer.weight.copy_(w.view(8, 6))
        residuals = admm.update(weights)["weight"]
    torch.testing.assert_close(layer.weight.detach().flatten(), closed, atol=1e-9, rtol=0)
    torch.testing.assert_close(admm.z("weight").flatten(), closed, atol=1e-9, rtol=0)
    # rho * U is the multiplier: it balances the gradient of f at the solution
    torch.testing.assert_close(admm.rho * admm.u("weight").flatten(), -(h @ (closed - a)), atol=1e-8, rtol=0)
    assert residuals.primal < 1e-9
    assert residuals.dual < 1e-9


def test_admm_moves_a_fixed_choice_to_the_projection():
    layer, plan = a_layer(MicroStructure((2, 2), prune_ratio=0.5))
    a = layer.weight.detach().clone()
    admm, weights = Admm(plan.covered, Penalty(0.5, 1.1, rho_max=5.0, relative=False)), {"weight": layer.weight}
    admm.start(weights)
    for _ in range(300):
        with torch.no_grad():
            layer.weight.copy_((a + admm.rho * (admm.z("weight") - admm.u("weight"))) / (1 + admm.rho))
        admm.update(weights)
    torch.testing.assert_close(layer.weight.detach(), plan.covered["weight"].structure.project(a))


@given(st.integers(0, 10**6), st.sampled_from(["free", "shared"]), st.sampled_from([1.0, 1.7]))
def test_keeping_v_alone_is_keeping_z_and_u(seed, signs, growth):
    layer, plan = a_layer(MicroStructure((2, 2), 0.4, 0.3, signs), seed)
    structure, rho, weights = plan.covered["weight"].structure, 0.1, {"weight": layer.weight}
    admm = Admm(plan.covered, Penalty(rho, growth, rho_max=0.3, relative=False))
    admm.start(weights)
    z, u = structure.project(layer.weight.detach()), torch.zeros(8, 6, dtype=torch.float64)
    for step in range(5):
        with torch.no_grad():
            layer.weight.add_(normal(seed + step + 1, 8, 6), alpha=0.3)
        w, z_old = layer.weight.detach(), z
        z = structure.project(w + u)
        u = u + w - z
        new_rho = min(rho * growth, 0.3)
        u, rho = u * (rho / new_rho), new_rho
        residuals = admm.update(weights)["weight"]
        torch.testing.assert_close(admm.z("weight"), z)
        torch.testing.assert_close(admm.u("weight"), u, atol=1e-12, rtol=1e-9)
        assert admm.rho == pytest.approx(rho)
        assert residuals.primal == pytest.approx(float((w - z).norm() / w.norm()))
        assert residuals.dual == pytest.approx(float((z - z_old).norm() / w.norm()))


def test_growing_rho_keeps_the_unscaled_dual():
    duals = []
    for growth in (1.0, 3.0):
        layer, plan = a_layer(JOINT)
        admm = Admm(plan.covered, Penalty(0.1, growth, relative=False))
        admm.start({"weight": layer.weight})
        with torch.no_grad():
            layer.weight.add_(normal(5, 8, 6))
        admm.update({"weight": layer.weight})
        duals.append(admm.rho * admm.u("weight"))
    torch.testing.assert_close(*duals)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_penalty_gradient_is_the_gradient_of_the_penalty(dtype):
    layer, plan = a_layer(JOINT, dtype=dtype)
    admm, weights = Admm(plan.covered, Penalty(0.3, rho_growth=1.0, relative=False)), {"weight": layer.weight}
    admm.start(weights)
    with torch.no_grad():
        layer.weight.add_(normal(1, 8, 6).to(dtype), alpha=1e-2)
    w = layer.weight.detach().double().requires_grad_()
    penalty = 0.3 / 2 * (w - admm.z("weight").double() + admm.u("weight").double()).square().sum()
    penalty.backward()
    torch.testing.assert_close(admm.penalty(weights).item(), penalty.item(), rtol=1e-5, atol=0)
    layer.weight.grad = normal(2, 8, 6).to(dtype)
    expected = (layer.weight.grad.double() + 0.5 * w.grad).to(dtype)
    admm.before_step(weights, scale=0.5)
    torch.testing.assert_close(layer.weight.grad, expected)


def test_a_bf16_weight_near_its_structure_gets_the_small_difference():
    # rho * W and rho * V are each a hundred times larger than what is left: rounded one by one they would drown it
    layer, plan = a_layer(JOINT, dtype=torch.bfloat16)
    layer.weight.data = JOINT.project(layer.weight.data)
    admm, weights = Admm(plan.covered, Penalty(0.3, rho_growth=1.0, relative=False)), {"weight": layer.weight}
    admm.start(weights)
    with torch.no_grad():
        layer.weight.mul_(1 + 0.02 * normal(1, 8, 6).sign().bfloat16())
    admm.before_step(weights)
    truth = 0.3 * (layer.weight.detach().double() - admm.z("weight").double() + admm.u("weight").double())
    assert truth.norm() < 0.03 * 0.3 * layer.weight.double().norm()
    assert (layer.weight.grad.double() - truth).norm() < 4e-3 * truth.norm()


def test_a_weight_without_a_gradient_gets_one():
    layer, plan = a_layer(JOINT)
    admm = Admm(plan.covered, Penalty(0.3, rho_growth=1.0, relative=False))
    admm.start({"weight": layer.weight})
    admm.before_step({"weight": layer.weight})
    expected = 0.3 * (layer.weight.detach() - JOINT.project(layer.weight.detach()))
    torch.testing.assert_close(layer.weight.grad, expected)


def test_non_contiguous_weights_and_gradients_work():
    layer = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    plan = make_plan(layer, JOINT)
    admm = Admm(plan.covered, Penalty(0.3, rho_growth=1.0, relative=False))
    admm.start({"weight": layer.weight})
    with torch.no_grad():
        layer.weight.add_(1.0)
    layer.weight.grad = torch.zeros(8, 8, 3, 3)
    admm.before_step({"weight": layer.weight})
    torch.testing.assert_close(layer.weight.grad, 0.3 * (layer.weight.detach() - admm.z("weight")))


def test_nan_is_refused_at_an_update_by_name():
    layer, plan = a_layer(JOINT)
    admm = Admm(plan.covered, Penalty(0.3, rho_growth=1.0, relative=False))
    admm.start({"weight": layer.weight})
    layer.weight.data[0, 0] = math.nan
    with pytest.raises(StateError, match="weight holds 1 values of 48 that are NaN"):
        admm.update({"weight": layer.weight})


def test_admm_goes_on_from_its_state():
    layer, plan = a_layer(JOINT)
    weights, admm = {"weight": layer.weight}, Admm(plan.covered, Penalty(0.1, 1.5, relative=False))
    admm.start(weights)
    layer.weight.data.add_(normal(1, 8, 6))
    admm.update(weights)
    again = Admm(plan.covered, Penalty(0.1, 1.5, relative=False))
    again.load_state_dict(admm.state_dict(), weights)
    layer.weight.data.add_(normal(2, 8, 6))
    assert admm.update(weights) == again.update(weights)
    assert same_bits(admm.z("weight"), again.z("weight"))
    assert same_bits(admm.u("weight"), again.u("weight"))


def test_a_state_of_another_model_is_refused():
    layer, plan = a_layer(JOINT)
    run = CompressionRun(plan.weights(layer), plan.covered, Phases(admm_start=0, admm_end=2))
    run.tick(0, Timeline(0, 2, 1), [])
    other = nn.Linear(8, 8)
    plan = make_plan(other, JOINT)
    with pytest.raises(StateError, match=r"weight shape is \[8, 6\] in the checkpoint and \[8, 8\] in the settings"):
        CompressionRun(plan.weights(other), plan.covered).load_state_dict(run.state_dict())


# ---- the constraint


@pytest.mark.parametrize("unified", ["tied", "frozen"])
@pytest.mark.parametrize("signs", ["free", "shared"])
@pytest.mark.parametrize("block_shape", [(2, 2), (3, 1)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_optimizer_stays_inside_to_the_bit(unified, signs, block_shape, optimizer, dtype):
    structure = MicroStructure(block_shape, 0.4, 0.3, signs)
    layer, plan = a_layer(structure, dtype=dtype)
    target, opt = normal(9, 16, 8).to(dtype), OPTIMIZERS[optimizer](layer.parameters())
    run = CompressionRun(
        plan.weights(layer),
        plan.covered,
        Phases(admm_start=2, admm_end=6),
        Retraining(unified),
        Penalty(0.1, relative=False),
    )
    x, frozen = normal(8, 16, 6).to(dtype), None
    for step in range(14):
        run.tick(step, Timeline(2, 6, 1), [opt])
        if run.supports and frozen is None:
            frozen = layer.weight.detach().clone()
        opt.zero_grad()
        (layer(x) - target).square().mean().backward()
        run.before_step(opt)
        opt.step()
        run.after_step(opt)
        if step >= 6:
            run.verify()
            assert run.supports["weight"].error(layer.weight.detach()) == 0.0
    support, grid = run.supports["weight"], plan.covered["weight"].grid
    moved = grid.split(layer.weight.detach()) != grid.split(frozen)
    kinds = support.kinds.flatten()
    assert moved[kinds == Kind.DENSE].any()
    assert moved[kinds == Kind.UNIFIED].any() == (unified == "tied")
    assert not moved[kinds == Kind.PRUNED].any()


def test_enforce_changes_no_bit_of_a_weight_that_fulfils_it():
    layer, plan = a_layer(MicroStructure((3, 3), 0.0, 1.0))
    constraint = Constraint.freeze({"weight": layer.weight}, plan.covered)
    before = layer.weight.detach().clone()
    constraint.enforce({"weight": layer.weight})
    assert same_bits(layer.weight.detach(), before)


def test_gradients_that_are_nan_do_not_reach_pruned_weights():
    layer, plan = a_layer(JOINT)
    constraint = Constraint.freeze({"weight": layer.weight}, plan.covered)
    layer.weight.grad = torch.full((8, 6), math.nan, dtype=torch.float64)
    constraint.project_gradients({"weight": layer.weight})
    blocks = plan.covered["weight"].grid.split(layer.weight.grad)
    assert (blocks[constraint.supports["weight"].kinds.flatten() == Kind.PRUNED] == 0).all()


@pytest.mark.parametrize("unified", ["tied", "frozen"])
def test_verify_names_a_weight_that_left_its_structure(unified):
    layer, plan = a_layer(JOINT)
    constraint = Constraint.freeze({"weight": layer.weight}, plan.covered, unified)
    constraint.verify({"weight": layer.weight})
    pruned = (layer.weight == 0).nonzero()[0]
    layer.weight.data[tuple(pruned)] = 1e-30
    with pytest.raises(StateError, match=r"weight is 1\.0e-30 away from its structure"):
        constraint.verify({"weight": layer.weight})


def test_verify_sees_frozen_blocks_that_moved_together():
    layer, plan = a_layer(JOINT)
    constraint = Constraint.freeze({"weight": layer.weight}, plan.covered, "frozen")
    layer.weight.data.mul_(0.5)
    with pytest.raises(StateError, match="unified blocks that moved"):
        constraint.verify({"weight": layer.weight})


def test_old_momentum_does_not_lead_out_of_the_structure():
    layer, plan = a_layer(JOINT)
    opt = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    layer.weight.grad = normal(3, 8, 6)
    opt.step()
    constraint = Constraint.freeze({"weight": layer.weight}, plan.covered)
    constraint.project_moments({"weight": layer.weight}, opt)
    support = constraint.supports["weight"]
    assert support.error(opt.state[layer.weight]["momentum_buffer"]) == 0


# ---- the phases


def test_times_are_counts_or_shares():
    assert Phases(admm_start=2, admm_end=5, update_every=1, round_start=1.0).on(10) == Timeline(2, 5, 1)
    assert Phases(admm_start=0.2, admm_end=0.6, update_every=0.25, round_start=1.0).on(20) == Timeline(4, 12, 2)
    assert Phases(admm_start=2, admm_end=5, update_every=0.5, round_start=1.0).on(None) == Timeline(2, 5, 1.5)
    assert Phases(admm_end=0.6, update_every=1, round_start=1.0).on(1) == Timeline(0, 1, 1)
    assert Phases(admm_start=0.1, admm_end=0.2, update_every=1, round_start=1.0).on(3) == Timeline(0, 1, 1)
    assert Phases(admm_start=0, admm_end=7, update_every=1, round_start=1.0).on(3, clip=True) == Timeline(0, 3, 1)
    assert Phases("step", 0, 10, update_every=0.25, round_start=1.0).on(20) == Timeline(0, 10, 2)
    assert Phases("step", 0, 10, update_every=0.01, round_start=1.0).on(20) == Timeline(0, 10, 1)
    assert Phases(admm_start=2, admm_end=2, update_every=0.25, round_start=1.0).on(20).every > 0


def test_updates_fall_on_the_beginnings_between_start_and_end():
    timeline = Timeline(2, 9, 3)
    assert [now for now in range(12) if timeline.due(now, now - 1)] == [5, 8]


def test_rho_grows_by_the_same_factor_where_batches_are_rare():
    timeline, last, rho = Timeline(0, 4, 0.25), 0.0, 1.0
    for now in (0.0, 0.5, 1.0, 2.0, 3.0):
        rho, last = rho * 2 ** timeline.due(now, last), now
    assert rho == 2**12


@pytest.mark.parametrize("n_batches", [3, 7, 10])
def test_shares_of_epochs_fall_on_batches(n_batches):
    timeline, last, found = Timeline(1, 3, 1 / 3), 1.0, []
    for batch in range(n_batches, 4 * n_batches):
        now = batch / n_batches
        if timeline.due(now, last):
            last = now
            found.append(batch)
    assert found == [math.ceil(n_batches * (1 + k / 3) - 1e-6) for k in range(1, 6)]


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        ({"interval": "hour"}, "interval='hour' is not allowed"),
        ({"admm_start": -1}, "admm_start=-1 is not allowed"),
        ({"admm_end": 1.5}, "admm_end=1.5 is not allowed: a float is a share"),
        ({"admm_end": math.inf}, "admm_end=inf"),
        ({"admm_start": 5, "admm_end": 3}, "admm_end=3 comes before admm_start=5"),
        ({"update_every": 0}, "update_every=0 is not allowed"),
    ],
)
def test_wrong_phases_are_refused(given_, says):
    with pytest.raises(SettingError, match=says):
        Phases(**given_)


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        ({"rho": 0}, "rho=0 is not allowed"),
        ({"rho": 2.0, "rho_max": 1.0}, "rho=2.0 is not allowed"),
        ({"rho_growth": 0.5}, "rho_growth=0.5 is not allowed"),
        ({"rho": math.nan}, "rho=nan"),
    ],
)
def test_a_wrong_penalty_is_refused(given_, says):
    with pytest.raises(SettingError, match=says):
        Penalty(**given_)


def test_phases_longer_than_the_run_are_refused():
    with pytest.raises(SettingError, match=r"admm_end=8 is after the end of the run, which is 5 epochs long"):
        Phases(admm_end=8).on(5)
    with pytest.raises(SettingError, match=r"admm_start=0\.2 in a run of 20 epochs: raise admm_end or lower"):
        Phases(admm_end=2).on(20)
    with pytest.raises(SettingError, match=r"admm_end=0\.6 is a share of the run's length, and this run has no end"):
        Phases(admm_start=0, admm_end=0.6).on(None)


def test_wrong_retraining_is_refused():
    with pytest.raises(SettingError, match="unified='loose' is not allowed"):
        Retraining(unified="loose")
    with pytest.raises(SettingError, match="schedule='linear' is not allowed"):
        Retraining(schedule="linear")
    with pytest.raises(SettingError, match=r"lr=-0\.1 is not allowed"):
        Retraining(lr=-0.1)


def test_settings_are_frozen_and_can_be_made_without_arguments():
    for kind in (MicroStructure, LayerRule, Penalty, Phases, Retraining):
        made = kind()
        assert made == kind()
        with pytest.raises(AttributeError):
            made.new = 1


def test_a_run_verifies_only_when_frozen():
    layer, plan = a_layer(JOINT)
    run = CompressionRun(plan.weights(layer), plan.covered, Phases(), Retraining())
    with pytest.raises(StateError, match="in its dense phase"):
        run.verify()


def test_projected_weights_are_shown_all_or_none():
    network = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8)).double()
    plan = make_plan(network, JOINT)
    run = CompressionRun(plan.weights(network), plan.covered, Phases(), Retraining())
    raw = {name: weight.detach().clone() for name, weight in run.weights.items()}
    run.show_projected()
    for name, weight in run.weights.items():
        assert same_bits(weight.detach(), JOINT.project(raw[name]))
        assert same_bits(run.raw[name], raw[name])
    run.show_raw()
    assert all(same_bits(weight.detach(), raw[name]) for name, weight in run.weights.items())
    network[1].weight.data[0, 0] = raw["1.weight"][0, 0] = math.nan
    with pytest.raises(StateError, match=r"1\.weight holds 1 values"):
        run.show_projected()
    assert all(same_bits(weight.detach(), raw[name]) for name, weight in run.weights.items())
    assert run.raw == {}


# ---- weights that are not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_verify_and_check_finite_name_a_weight_with_nan_or_inf_in_retraining(bad):
    layer, plan = a_layer(JOINT)
    run = CompressionRun(plan.weights(layer), plan.covered, Phases(admm_start=0, admm_end=0), Retraining())
    run.tick(0, Timeline(0, 0, 1), [])
    run.check_finite()
    layer.weight.data[:2, :2] = bad
    for check in (run.check_finite, run.verify):
        with pytest.raises(
            StateError, match="weight holds 4 values of 48 that are NaN or Inf: lower the learning rate"
        ):
            check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_finite_weights_pass_check_finite(dtype):
    layer, plan = a_layer(JOINT, dtype=dtype)
    run = CompressionRun(plan.weights(layer), plan.covered, Phases(), Retraining())
    layer.weight.data.fill_(torch.finfo(dtype).max)
    run.check_finite()
