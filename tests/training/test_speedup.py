"""A speedup in plain torch: times are handed in, the structures follow them, and a state keeps the choice."""

import copy

import pytest
import torch
from torch import nn

from lightning_muws import Budget, CompressionRun, LayerRule, MicroStructure, NMStructure, Phases
from lightning_muws.errors import SettingError, StateError
from lightning_muws.structure.plan import make_plan
from tests.support.clocks import fake_times
from tests.support.strategies import normal, same_bits

PHASES = Phases(admm_start=1, admm_end=4, update_every=1)
TIMELINE = PHASES.on(6)
OPEN = MicroStructure()


def network(seed=0):
    made = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 4, 48), nn.Linear(48, 8))
    for i, parameter in enumerate(made.parameters()):
        parameter.data = normal(seed + i, *parameter.shape, dtype=torch.float32) * 0.1
    return made


def make(module, speedup=2.0, rules=(), with_times=True, structure=OPEN, phases=PHASES):
    plan = make_plan(module, structure, rules, open_ratios=True)
    times = fake_times(module, None, plan.covered) if with_times else None
    budget = Budget(speedup=speedup)
    return CompressionRun(plan.weights(module), plan.covered, phases, budget=budget, module=module, times=times)


def train(module, run, optimizer, epochs, seed=0):
    for epoch in epochs:
        run.tick(epoch, TIMELINE, [optimizer])
        for i in range(3):
            optimizer.zero_grad()
            module(normal(seed + 10 * epoch + i, 4, 3, 4, 4, dtype=torch.float32)).square().sum().backward()
            run.before_step(optimizer)
            optimizer.step()
            run.after_step(optimizer)


@pytest.mark.parametrize("speedup", [1.2, 2.0, 4.0])
def test_a_loop_in_plain_torch_ends_in_structures_of_the_predicted_speed(speedup):
    module = network()
    run = make(module, speedup)
    assert not run.needs_times
    train(module, run, torch.optim.SGD(module.parameters(), 0.01, momentum=0.9), range(6))
    run.verify()
    assert speedup <= run.predicted_speedup <= 1.2 * speedup
    structures = {name: entry.structure for name, entry in run.planned.items()}
    assert run.times.speedup(structures) == run.predicted_speedup
    for name, support in run.supports.items():
        entry = run.planned[name]
        assert entry.grid.block_shape == entry.structure.block_shape == support.grid.block_shape
        assert support.counts() == entry.structure.counts(entry.grid, entry.shape)


def test_one_shot_chooses_at_the_freeze():
    module = network()
    run = make(module, phases=Phases(admm_start=2, admm_end=2))
    run.tick(1, run.phases.on(6), [])
    assert run.predicted_speedup is None
    run.tick(2, run.phases.on(6), [])
    assert run.predicted_speedup >= 2
    run.verify()


def test_without_times_it_is_refused_with_how_to_get_them():
    run = make(network(), with_times=False)
    assert run.needs_times
    for act in (run.check_budget, lambda: run.tick(1, TIMELINE, [])):
        with pytest.raises(SettingError, match=r"speedup=2 needs the times of the layers: give times=layer_times\("):
            act()
        assert run.phase == "dense"
    run.times = fake_times(None, None, run.entries)
    run.tick(1, TIMELINE, [])
    assert not run.needs_times
    with pytest.raises(SettingError, match="times=5 is not allowed: give"):
        CompressionRun({}, {}, budget=Budget(speedup=2), module=network(), times=5)


def test_a_budget_of_another_kind_has_no_time_to_share_out():
    with pytest.raises(SettingError, match="compression=5 has no time to share out"):
        Budget(5).allocate_time(network(), {}, None)


@pytest.mark.parametrize("saved_at", [0, 1, 3, 4, 5])
def test_a_state_restores_the_choice_and_needs_no_times(saved_at):
    module = network()
    optimizer = torch.optim.SGD(module.parameters(), 0.01)
    run = make(module)
    train(module, run, optimizer, range(saved_at + 1))
    state, weights = copy.deepcopy((run.state_dict(), module.state_dict()))
    train(module, run, optimizer, range(saved_at + 1, 6))

    other = network(7)
    other.load_state_dict(weights)
    resumed = make(other, with_times=saved_at == 0)
    resumed.load_state_dict(state)
    assert not resumed.needs_times
    train(other, resumed, torch.optim.SGD(other.parameters(), 0.01), range(saved_at + 1, 6))
    assert resumed.planned == run.planned
    assert resumed.predicted_speedup == run.predicted_speedup
    assert all(same_bits(x, y) for x, y in zip(module.parameters(), other.parameters(), strict=True))


def test_a_state_of_another_speedup_is_refused_by_name():
    run = make(network())
    run.tick(1, TIMELINE, [])
    with pytest.raises(StateError, match=r"budget speedup is 2\.0 in the checkpoint and 3\.0 in the settings"):
        make(network(), 3.0).load_state_dict(run.state_dict())


def test_rules_hold_inside_the_speedup():
    rules = (
        LayerRule("0.*", structure=MicroStructure(prune_ratio=(0, 0))),
        LayerRule("3.*", structure=MicroStructure((4, 4), 0.75)),
        LayerRule("4.*", structure=NMStructure(2, 4)),
    )
    module = network()
    with pytest.raises(SettingError, match="speedup=2 cannot be reached on this machine"):
        make(module, 2.0, rules).check_budget()
    run = make(module, 2.0, rules[:1])
    run.tick(1, TIMELINE, [])
    assert run.planned["0.weight"].structure.is_open  # never pruned, so it stays dense
    assert run.planned["0.weight"].reason
    assert run.planned["3.weight"].structure.prune_ratio > 0


def test_a_range_limits_the_share_of_pruned_blocks():
    rules = (LayerRule("3.*", structure=MicroStructure(prune_ratio=(0.25, 0.5))),)
    for speedup in (1.3, 1.5):
        run = make(network(), speedup, rules)
        run.tick(1, TIMELINE, [])
        assert 0.25 <= run.planned["3.weight"].structure.prune_ratio <= 0.5


def test_an_auto_shape_is_chosen_by_the_times():
    run = make(network(), structure=MicroStructure("auto"))
    run.tick(1, TIMELINE, [])
    assert {entry.structure.block_shape for entry in run.entries.values()} <= {(4, 1), (2, 4)}
