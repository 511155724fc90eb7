"""A state fits the settings that it depends on, or is refused by name; what it does not depend on may change."""

import io
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_muws import CompressionRun, MicroStructure, Penalty, Phases, Retraining
from lightning_muws.errors import StateError
from lightning_muws.structure.plan import make_plan
from lightning_muws.training.record import record
from lightning_muws.training.run import STATE_VERSION
from tests.support.strategies import normal, same_bits

STRUCTURE = MicroStructure((4, 4), prune_ratio=0.5, unify_ratio=0.25)
PHASES = Phases(admm_start=1, admm_end=3, update_every=1)
PENALTY = Penalty(rho=0.1, rho_growth=2.0, relative=False)
DENSE, ADMM, RETRAINING = 1, 2, 4  # epochs trained


def a_run(structure=STRUCTURE, phases=PHASES, retraining=Retraining(), penalty=PENALTY, shape=(20, 20), kind=nn.Linear):  # noqa: B008
    layer = kind(*reversed(shape), bias=False, **({"kernel_size": 1} if kind is not nn.Linear else {}))
    layer.weight.data.copy_(normal(0, *layer.weight.shape))
    plan = make_plan(layer, structure)
    return layer, CompressionRun(plan.weights(layer), plan.covered, phases, retraining, penalty)


def train(layer, run, epochs, length=6):
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for epoch in epochs:
        run.tick(epoch, run.phases.on(length), [optimizer])
        for seed in range(3):
            layer.weight.grad = normal(seed + 10 * epoch, *layer.weight.shape).to(layer.weight.dtype)
            run.before_step(optimizer)
            optimizer.step()
            run.after_step(optimizer)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def saved(n_epochs, **settings):
    layer, run = a_run(**settings)
    train(layer, run, range(n_epochs))
    return through_a_file(layer.state_dict()), through_a_file(run.state_dict())


@pytest.mark.parametrize("n_epochs", [ADMM, RETRAINING])
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"structure": MicroStructure((4, 4), 0.25, 0.25)}, r"structure prune_ratio is 0\.5 .* and 0\.25 in the sett"),
        ({"structure": MicroStructure((4, 4), 0.5, 0.5)}, r"structure unify_ratio is 0\.25 in .* and 0\.5 in the sett"),
        ({"structure": MicroStructure((4, 4), 0.5, 0.25, "shared")}, r"structure signs is 'free' in .* and 'shared'"),
        # as many blocks of another shape, 5 x 5 of them in the checkpoint
        (
            {"structure": MicroStructure((4, 4), 0.5, 0.25), "shape": (23, 20)},
            r"weight shape is \[20, 20\] .*\[23, 20\]",
        ),
        ({"kind": nn.ConvTranspose2d}, r"weight grid out_axis is 0 in the checkpoint and 1 in the settings"),
    ],
)
def test_a_state_of_another_structure_is_refused_by_name(n_epochs, settings, says):
    _, state = saved(n_epochs)
    _, run = a_run(**settings)
    with pytest.raises(StateError, match=says):
        run.load_state_dict(state)
    assert run.phase == "dense"
    assert run.history == []


@pytest.mark.parametrize("n_epochs", [ADMM, RETRAINING])
def test_blocks_of_another_shape_are_refused_though_there_are_as_many(n_epochs):
    _, state = saved(n_epochs, shape=(20, 20))
    _, run = a_run(structure=MicroStructure((5, 4), 0.5, 0.25), shape=(25, 20))
    assert run.entries["weight"].n_blocks == 25
    with pytest.raises(
        StateError, match=r"grid block_shape is \[4, 4\] in the checkpoint and \[5, 4\] in the settings"
    ):
        run.load_state_dict(state)


def test_blocks_of_another_shape_on_the_same_weight_are_refused():
    _, state = saved(RETRAINING, shape=(23, 20))  # 4x4 and 4x5 ... 5x4: 4 rows of blocks of 5 fit in 23 rows
    _, run = a_run(structure=MicroStructure((4, 5), 0.5, 0.25), shape=(23, 20))
    with pytest.raises(StateError, match=r"grid block_shape is \[4, 4\] in the checkpoint and \[4, 5\]"):
        run.load_state_dict(state)


def test_frozen_magnitudes_do_not_become_tied_ones_on_resuming():
    _, state = saved(RETRAINING, retraining=Retraining("frozen"))
    _, run = a_run(retraining=Retraining("tied"))
    with pytest.raises(
        StateError, match=r"retraining\.unified is 'frozen' in the checkpoint and 'tied' in the settings"
    ):
        run.load_state_dict(state)


def test_another_method_or_clock_is_refused_while_the_method_runs():
    _, state = saved(ADMM)
    _, run = a_run(phases=Phases("step", admm_start=1, admm_end=3))
    with pytest.raises(StateError, match=r"phases\.interval is 'epoch' in the checkpoint and 'step' in the settings"):
        run.load_state_dict(state)
    state["settings"]["phases.method"] = "other"
    for method in ("admm", "auto"):
        match = rf"phases\.method is 'other' in the checkpoint and '{method}' in the settings"
        with pytest.raises(StateError, match=match):
            a_run(phases=replace(PHASES, method=method))[1].load_state_dict(state)


def test_weights_of_other_names_are_refused_by_name():
    _, state = saved(ADMM)
    state["settings"]["old"] = state["settings"].pop("weight")
    with pytest.raises(StateError, match="the checkpoint has old, the settings have not; the settings have weight"):
        a_run()[1].load_state_dict(state)


@pytest.mark.parametrize("version", [1, 2, None, STATE_VERSION + 1])
def test_a_state_of_another_version_is_refused(version):
    _, state = saved(ADMM)
    state["version"] = version
    with pytest.raises(StateError, match=f"state has version {version}, and this lightning_muws reads version 3"):
        a_run()[1].load_state_dict(state)


@pytest.mark.parametrize("n_epochs", [DENSE, ADMM, RETRAINING])
def test_the_same_settings_go_on_to_the_same_bits(n_epochs):
    layer, run = a_run()
    train(layer, run, range(6))
    weights, state = saved(n_epochs)
    again, resumed = a_run()
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(again, resumed, range(n_epochs, 6))
    assert same_bits(layer.weight.detach(), again.weight.detach())
    assert resumed.history == run.history


def test_a_dense_run_depends_on_nothing_and_takes_new_settings():
    weights, state = saved(DENSE)
    new = MicroStructure((2, 2), 0.25, 0.25, "shared")
    layer, run = a_run(structure=new, retraining=Retraining("frozen"), phases=Phases("step", 1, 3, update_every=1))
    layer.load_state_dict(weights)
    run.load_state_dict(state)
    train(layer, run, range(1, 5))
    run.verify()
    assert run.supports["weight"].grid.block_shape == (2, 2)


@pytest.mark.parametrize("end", [2, 5])
def test_the_end_of_admm_may_change_on_resuming(end):
    weights, state = saved(ADMM)
    layer, run = a_run(phases=Phases(admm_start=0, admm_end=end, update_every=1))
    layer.load_state_dict(weights)
    run.load_state_dict(state)
    train(layer, run, range(2, 6))
    assert run.history[-1].when == end
    run.verify()


def test_rho_goes_on_from_the_state_under_new_growth_and_bound():
    weights, state = saved(ADMM)
    for penalty, grown in (
        (Penalty(1e-3, 3.0, rho_max=2.0, relative=False), 0.3),
        (Penalty(1e-3, 1.0, rho_max=0.05, relative=False), 0.05),
    ):
        layer, run = a_run(penalty=penalty)
        layer.load_state_dict(weights)
        run.load_state_dict(state)
        assert run.method.rho == 0.1
        run.tick(2, run.phases.on(6), [])
        assert run.method.rho == pytest.approx(grown)


def test_a_bound_below_the_rho_of_the_state_keeps_the_unscaled_dual():
    weights, state = saved(ADMM)
    duals = []
    for penalty in (PENALTY, Penalty(1e-3, 1.0, rho_max=0.05, relative=False)):
        layer, run = a_run(penalty=penalty)
        layer.load_state_dict(weights)
        run.load_state_dict(state)
        layer.weight.data.add_(normal(7, 20, 20).float(), alpha=0.1)
        run.tick(2, run.phases.on(6), [])
        duals.append(run.method.rho * run.method.u("weight"))
    torch.testing.assert_close(*duals)


@pytest.mark.parametrize("n_epochs", [ADMM, RETRAINING])
@pytest.mark.parametrize("retraining", [Retraining("frozen", "cosine", 0.1), Retraining("frozen", "module")])
def test_the_schedule_and_the_rate_of_retraining_may_change(n_epochs, retraining):
    weights, state = saved(n_epochs, retraining=Retraining("frozen"))
    layer, run = a_run(retraining=retraining)
    layer.load_state_dict(weights)
    run.load_state_dict(state)
    train(layer, run, range(n_epochs, 6))
    run.verify()


@pytest.mark.parametrize("unified", ["tied", "frozen"])
@pytest.mark.parametrize("n_epochs", [ADMM, RETRAINING])
def test_a_state_is_loaded_into_weights_of_another_precision(n_epochs, unified):
    weights, state = saved(n_epochs, retraining=Retraining(unified))
    layer, run = a_run(retraining=Retraining(unified))
    layer.bfloat16().load_state_dict(weights)
    run.weights = dict(layer.named_parameters())
    run.load_state_dict(state)
    train(layer, run, range(n_epochs, 6))
    run.verify()


def test_the_record_of_a_plan_is_plain():
    def leaves(x):
        return (
            [y for value in (x.values() if isinstance(x, dict) else x) for y in leaves(value)]
            if isinstance(x, (dict, list))
            else [x]
        )

    _, run = a_run()
    assert {type(x) for x in leaves(record(run.entries))} <= {str, int, float, bool}
