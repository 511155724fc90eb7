"""A budget in plain torch: chosen once, kept through a state, met by the file, refused where it cannot be."""

import pytest
import torch
from torch import nn

from lightning_muws import (
    Budget,
    CompressionRun,
    LayerRule,
    MicroStructure,
    NMStructure,
    Phases,
    save_compressed,
)
from lightning_muws.errors import SettingError, StateError
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.plan import make_plan
from lightning_muws.training.budget import KEPT
from tests.support.strategies import normal, same_bits

PHASES = Phases(admm_start=1, admm_end=4, update_every=1)
TIMELINE = PHASES.on(6)
OPEN = MicroStructure((2, 4))
AUTO = MicroStructure("auto")


def network(seed: int = 0) -> nn.Sequential:
    made = nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.Linear(48, 40), nn.Linear(40, 8))
    for i, parameter in enumerate(made.parameters()):
        parameter.data = normal(seed + i, *parameter.shape, dtype=torch.float32) * 0.1
    return made


def make(
    module: nn.Module,
    budget: float | Budget = 12,
    rules: tuple[LayerRule, ...] = (),
    phases: Phases = PHASES,
    structure: MicroStructure = OPEN,
) -> CompressionRun:
    plan = make_plan(module, structure, rules, open_ratios=True)
    budget = budget if isinstance(budget, Budget) else Budget(budget)
    return CompressionRun(plan.weights(module), plan.covered, phases, budget=budget, module=module)


def striped(seed: int = 0) -> nn.Sequential:
    """Return a network with a layer whose rows, and one whose columns, have weights of many sizes."""
    made = nn.Sequential(nn.Linear(192, 160), nn.BatchNorm1d(160), nn.Linear(160, 128), nn.Linear(128, 8))
    for i, parameter in enumerate(made.parameters()):
        parameter.data = normal(seed + i, *parameter.shape, dtype=torch.float32) * 0.1
    made[0].weight.data *= 3 ** normal(seed, 160, 12, dtype=torch.float32).repeat_interleave(16, 1)
    made[2].weight.data *= 3 ** normal(seed, 8, 160, dtype=torch.float32).repeat_interleave(16, 0)
    return made


def step(module: nn.Module, run: CompressionRun, seed: int) -> None:
    for parameter in module.parameters():
        parameter.data += 0.01 * normal(seed, *parameter.shape, dtype=torch.float32)
    if run.constraint:
        run.constraint.enforce(run.weights)


@pytest.mark.parametrize("wrong", [1, 0, -3, float("nan"), float("inf"), True, "20", None, [20]])
def test_a_budget_that_is_none_is_refused(wrong):
    with pytest.raises(SettingError, match=r"compression=.* is not allowed: give a finite number above 1"):
        Budget(wrong)


@pytest.mark.parametrize("wrong", [1, 0, float("nan"), True, "2"])
def test_a_speedup_that_is_none_is_refused(wrong):
    with pytest.raises(SettingError, match=r"speedup=.* is not allowed: give a finite number above 1, such as 2"):
        Budget(speedup=wrong)


@pytest.mark.parametrize("wrong", [0, 1, float("nan"), True, "0.3"])
def test_a_relative_error_that_is_none_is_refused(wrong):
    with pytest.raises(SettingError, match=r"max_relative_error=.* is not allowed: give a number above 0 and below 1"):
        Budget(max_relative_error=wrong)


def test_a_budget_has_exactly_one_value():
    assert Budget(20) == Budget(compression=20)
    with pytest.raises(SettingError, match="compression=20 and speedup=2 contradict each other: give one of compr"):
        Budget(20, speedup=2)
    with pytest.raises(SettingError, match=r"speedup=2 and max_relative_error=0.3 contradict each other"):
        Budget(speedup=2, max_relative_error=0.3)
    with pytest.raises(SettingError, match=r"compression=None is not allowed.* in its place a speedup or a max_rel"):
        Budget()
    assert str(Budget(max_relative_error=0.25)) == "max_relative_error=0.25"


def test_a_relative_error_chooses_structures_once_and_the_weights_stay_that_near():
    module = network()
    rules = (LayerRule("0.*", structure=MicroStructure((1, 8), prune_ratio=0.5)),)
    run = make(module, Budget(max_relative_error=0.5), rules)
    run.check_budget()
    run.tick(1, TIMELINE, [])
    assert run.entries["0.weight"].structure == rules[0].structure
    entry, w = run.entries["2.weight"], module[2].weight.detach().clone()
    assert entry.structure.unify_ratio > 0.1
    moved = entry.structure.project(w, entry.grid) - w
    assert moved.norm() <= (1 + entry.structure.prune_ratio) ** 0.5 * 0.5 * w.norm()
    chosen = dict(run.entries)
    for epoch in range(2, 6):
        step(module, run, epoch)
        run.tick(epoch, TIMELINE, [])
    assert run.entries == chosen
    run.verify()
    with pytest.raises(StateError, match=r"budget max_relative_error is 0.5 in the checkpoint and 0.4 in the settings"):
        make(network(), Budget(max_relative_error=0.4), rules).load_state_dict(run.state_dict())


def test_auto_gives_each_weight_a_shape_and_the_file_has_the_size(tmp_path):
    module = striped()
    run = make(module, 14, phases=Phases(admm_start=0, admm_end=0), structure=AUTO)
    run.check_budget()
    run.tick(0, run.phases.on(6), [])
    run.verify()
    shapes = {name: entry.grid.block_shape for name, entry in run.entries.items()}
    assert all(entry.structure.block_shape == shapes[name] for name, entry in run.entries.items())
    assert shapes["0.weight"][0] < shapes["0.weight"][1]
    assert shapes["2.weight"][0] > shapes["2.weight"][1]
    blocks = {name: entry.grid for name, entry in run.entries.items()}
    report = save_compressed(module, tmp_path / "m.muws", blocks=blocks, compression=14)
    assert report.compression_ratio >= 14


def test_auto_reaches_what_the_first_shapes_do_not():
    module, first = striped(), MicroStructure((4, 4), unify_ratio=(0.9, 1.0))
    beyond = 1.01 * Budget(5).allocate(module, make_plan(module, first, open_ratios=True).covered).reachable[1]
    with pytest.raises(SettingError, match="cannot be reached"):
        make(module, beyond, structure=first).check_budget()
    make(module, beyond, structure=MicroStructure("auto", unify_ratio=(0.9, 1.0))).check_budget()


def test_a_range_holds_through_the_run():
    module = striped()
    run = make(module, 16, (LayerRule("2.*", structure=MicroStructure(prune_ratio=(0, 0))),))
    for epoch in range(6):
        run.tick(epoch, TIMELINE, [])
    assert run.entries["2.weight"].structure.prune_ratio == 0
    assert run.entries["2.weight"].structure.unify_ratio > 0.5
    assert run.entries["0.weight"].structure.prune_ratio > 0.3
    assert run.supports["2.weight"].counts()[Kind.PRUNED] == 0


def test_what_a_bound_makes_unreachable_is_refused_by_the_check_at_the_start():
    module, bound = striped(), MicroStructure(prune_ratio=(0, 0), unify_ratio=(0.9, 1.0))  # a sign for each weight
    with pytest.raises(SettingError, match=r"compression=40 cannot be reached.* allows [\d.]+ to 2[\d.]+, so ask"):
        make(module, 40, structure=bound).check_budget()
    make(module, 14, structure=bound).check_budget()
    make(module, 40).check_budget()


def test_set_ratios_get_the_nearest_shape_without_a_budget():
    module, structure = striped(), MicroStructure("auto", prune_ratio=0.5)
    plan = make_plan(module, structure)
    assert {entry.grid.block_shape for entry in plan.covered.values()} == {(4, 4)}
    run = CompressionRun(plan.weights(module), plan.covered, PHASES)
    run.tick(1, TIMELINE, [])
    shapes = {name: entry.grid.block_shape for name, entry in run.entries.items()}
    assert (shapes["0.weight"], shapes["2.weight"]) == ((1, 16), (16, 1))
    for name, entry in run.entries.items():
        assert entry.structure == MicroStructure(shapes[name], prune_ratio=0.5)
    state = run.state_dict()
    again = CompressionRun(plan.weights(module), plan.covered, PHASES)
    again.load_state_dict(state)
    assert again.entries == run.entries
    for epoch in range(2, 6):
        step(module, run, epoch)
        run.tick(epoch, TIMELINE, [])
    run.verify()


def test_a_rule_with_set_ratios_and_auto_gets_a_shape_inside_the_budget():
    rule = LayerRule("2.*", structure=MicroStructure("auto", prune_ratio=0.25, unify_ratio=0.5))
    run = make(striped(), 14, (rule,))
    run.tick(1, TIMELINE, [])
    entry = run.entries["2.weight"]
    assert entry.structure.quotas(entry.n_blocks) == rule.structure.quotas(entry.n_blocks)
    assert entry.grid.block_shape == entry.structure.block_shape
    assert entry.grid.block_shape[0] > entry.grid.block_shape[1]


def test_a_weight_of_zeros_keeps_what_was_given():
    module = striped()
    module[0].weight.data.zero_()
    rule = LayerRule("0.*", structure=MicroStructure("auto", prune_ratio=0.25))
    run = make(module, 10, (rule,), structure=AUTO)
    run.tick(1, TIMELINE, [])
    assert run.entries["0.weight"].structure == MicroStructure((4, 4), prune_ratio=0.25)
    run = make(module, 10, structure=AUTO)
    run.tick(1, TIMELINE, [])
    assert run.planned["0.weight"].reason == KEPT
    assert run.planned["0.weight"].structure == MicroStructure((4, 4))


def test_a_budget_needs_the_module_and_is_a_budget():
    module = network()
    plan = make_plan(module, OPEN, open_ratios=True)
    with pytest.raises(SettingError, match="module=None is not allowed"):
        CompressionRun(plan.weights(module), plan.covered, budget=Budget(5))
    with pytest.raises(SettingError, match="budget=5 is not allowed: give a Budget, such as"):
        CompressionRun(plan.weights(module), plan.covered, budget=5, module=module)


def test_structures_are_chosen_when_the_method_starts_and_never_again():
    module = network()
    run, before = make(module), dict(make(network()).entries)
    run.tick(0, TIMELINE, [])
    assert run.phase == "dense"
    assert run.entries == before
    run.tick(1, TIMELINE, [])
    chosen = dict(run.entries)
    assert chosen != before
    for epoch in range(2, 6):
        step(module, run, epoch)
        run.tick(epoch, TIMELINE, [])
        assert run.entries == chosen
    run.verify()
    for name, support in run.supports.items():
        entry = chosen[name]
        assert support.counts() == entry.structure.counts(entry.grid, entry.shape)


@pytest.mark.parametrize("start", [0, 1])
def test_one_shot_chooses_at_the_freeze_and_the_file_has_the_size(start, tmp_path):
    module = network()
    run = make(module, 14, phases=Phases(admm_start=start, admm_end=start))
    run.tick(start, run.phases.on(6), [])
    assert run.phase == "retraining"
    run.verify()
    blocks = {name: entry.grid for name, entry in run.entries.items()}
    report = save_compressed(module, tmp_path / "m.muws", blocks=blocks, compression=14)
    assert report.compression_ratio >= 14
    counts = {tensor.name: tensor.counts for tensor in report.tensors}
    for name, entry in run.entries.items():
        expected = entry.structure.counts(entry.grid, entry.shape)
        assert counts[name] == tuple(expected[kind] for kind in (Kind.DENSE, Kind.UNIFIED, Kind.PRUNED))


def test_rules_hold_inside_the_budget():
    fixed, n_of_m = MicroStructure((1, 8), prune_ratio=0.5), NMStructure(1, 4)
    rules = (LayerRule("0.*", structure=fixed), LayerRule("2.*", structure=n_of_m), LayerRule("1.*", skip=True))
    run = make(network(), 6, rules)
    run.tick(1, TIMELINE, [])
    planned = run.planned
    assert planned["0.weight"].structure == fixed
    assert planned["2.weight"].structure == n_of_m
    assert planned["3.weight"].structure.block_shape == (2, 4)
    shape = (LayerRule("0.*", structure=MicroStructure((4, 4), signs="shared")),)
    run = make(network(), 14, shape)
    run.tick(1, TIMELINE, [])
    structure = run.planned["0.weight"].structure
    assert (structure.block_shape, structure.signs) == ((4, 4), "shared")
    assert not structure.is_open


def test_a_weight_that_the_budget_keeps_dense_is_not_covered_and_the_plan_has_the_reason():
    module = network()
    plan = make_plan(module, OPEN, open_ratios=True)
    assert "open" in str(plan)
    run = make(module, 1.5)
    run.tick(1, TIMELINE, [])
    plan = plan.updated(run.planned)
    assert {entry.reason for entry in plan.entries if len(entry.shape) == 2} == {KEPT}
    assert KEPT in str(plan)
    assert "open" not in str(plan)
    assert run.weights == run.entries == {}
    assert run.metrics()["penalty"] == 0
    for epoch in range(2, 6):
        run.tick(epoch, TIMELINE, [torch.optim.SGD(module.parameters(), 0.1)])
    run.verify()


@pytest.mark.parametrize("structure", [OPEN, AUTO, MicroStructure("auto", prune_ratio=(0, 0.25))])
@pytest.mark.parametrize("saved_at", [0, 1, 2, 4, 5])
def test_a_state_restores_the_choice_and_chooses_nothing_again(saved_at, structure):
    module = striped()
    run = make(module, structure=structure)
    for epoch in range(saved_at + 1):
        run.tick(epoch, TIMELINE, [])
        step(module, run, epoch)
    state, weights = run.state_dict(), {name: x.clone() for name, x in module.state_dict().items()}
    for epoch in range(saved_at + 1, 6):
        run.tick(epoch, TIMELINE, [])
        step(module, run, epoch)

    other = striped(7)
    resumed = make(other, structure=structure)
    resumed.tick(1, TIMELINE, [])  # a choice that the state replaces
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert (resumed.entries == run.entries) == (saved_at > 0)
    for epoch in range(saved_at + 1, 6):
        resumed.tick(epoch, TIMELINE, [])
        step(other, resumed, epoch)
    assert resumed.entries == run.entries
    assert resumed.fingerprint() == run.fingerprint()
    assert all(entry.grid.block_shape == entry.structure.block_shape for entry in run.entries.values())
    assert all(same_bits(x, y) for x, y in zip(module.parameters(), other.parameters(), strict=True))


def test_a_state_of_another_budget_is_refused_by_name():
    run = make(network())
    run.tick(1, TIMELINE, [])
    with pytest.raises(StateError, match="budget compression is 12 in the checkpoint and 10 in the settings"):
        make(network(), 10).load_state_dict(run.state_dict())
    module = network()
    plan = make_plan(module, OPEN, open_ratios=True)
    with pytest.raises(StateError, match="the checkpoint has budget"):
        CompressionRun(plan.weights(module), plan.covered, PHASES).load_state_dict(run.state_dict())


def test_the_fingerprint_has_the_counts():
    one, two = make(network(), 12), make(network(), 10)
    assert one.fingerprint() == two.fingerprint()
    for run in (one, two):
        run.tick(1, TIMELINE, [])
        run.method = None  # what remains is what was chosen
    assert one.fingerprint() != two.fingerprint()


def test_the_values_of_buffers_choose_nothing():
    one, two = network(), network()
    two[1].running_mean.fill_(3.0)
    two[1].running_var.fill_(float("nan"))
    runs = [make(one), make(two)]
    for run in runs:
        run.tick(1, TIMELINE, [])
    assert runs[0].entries == runs[1].entries


def test_what_cannot_be_reached_is_refused_with_the_range_before_anything_changes():
    module = network()
    run = make(module, 5000)
    for check in (run.check_budget, lambda: run.tick(1, TIMELINE, [])):
        with pytest.raises(SettingError, match=r"compression=5000 cannot be reached.* allows [\d.]+ to [\d.]+"):
            check()
        assert run.phase == "dense"
    make(module, 12).check_budget()


def test_a_weight_with_nan_is_refused_by_name():
    module = network()
    module[2].weight.data[0, 0] = float("nan")
    run = make(module)
    with pytest.raises(StateError, match=r"2\.weight has NaN or Inf"):
        run.tick(1, TIMELINE, [])
    assert run.phase == "dense"
