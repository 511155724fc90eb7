"""Rounding in retraining: what is shown, what is kept, and that it trains as a straight-through estimator does."""

import copy
import functools
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_muws import (
    Budget,
    CompressionRun,
    MicroStructure,
    Phases,
    Retraining,
    choose_steps,
    load_compressed,
    save_compressed,
)
from lightning_muws.errors import SettingError, StateError
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.plan import make_plan
from lightning_muws.training.rounding import Rounding
from tests.support.strategies import normal, same_bits, same_bytes, structures, weights

PHASES = Phases(admm_start=0, admm_end=2, update_every=1, round_start=4)
LENGTH = 8
TIED, EIGHT = Retraining(), Budget(8)


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    made = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 192), nn.Tanh(), nn.Linear(192, 8)).to(dtype)
    for i, parameter in enumerate(made.parameters()):
        parameter.data = normal(seed + i, *parameter.shape, dtype=dtype) * 0.1
    return made


def make(module: nn.Module, stepper="default", retraining=TIED, budget=EIGHT):
    plan = make_plan(module, MicroStructure(), open_ratios=True)
    stepper = functools.partial(choose_steps, module) if stepper == "default" else stepper
    run = CompressionRun(
        plan.weights(module), plan.covered, PHASES, retraining, budget=budget, module=module, stepper=stepper
    )
    run.check_budget()
    return run


def train(module: nn.Module, run: CompressionRun, optimizer: torch.optim.Optimizer, epochs: range) -> None:
    for epoch in epochs:
        run.tick(epoch, PHASES.on(LENGTH), [optimizer])
        for seed in range(4):
            x = normal(100 * epoch + seed, 16, 64, dtype=module[0].weight.dtype)
            optimizer.zero_grad()
            (module(x) - x[:, :8]).square().mean().backward()
            run.before_step(optimizer)
            optimizer.step()
            run.after_step(optimizer)
    if epochs.stop == LENGTH:
        run.finish()


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), 3e-3)


@given(weights(dtypes=(torch.float32, torch.float64)), structures(), st.floats(0.05, 3.0))
@settings(max_examples=100, deadline=None)
def test_a_support_rounds_to_multiples_and_keeps_its_structure(weight, structure, step):
    step, grid = float(torch.tensor(step)), BlockGrid(structure.block_shape)
    support, magnitudes = structure.nearest(weight, grid)
    inside = support.place(weight, magnitudes)
    rounded = support.round_(inside.clone(), step)
    assert support.error(rounded) == 0
    steps = rounded / step
    torch.testing.assert_close(steps, steps.round(), rtol=1e-5, atol=1e-5)
    assert not (rounded.signbit() & (rounded == 0)).any()
    # brute force: no other multiple is nearer, but that a magnitude above 0 keeps a step
    nearest = (inside / step).round() * step
    in_unified = grid.merge(
        (support.kinds.flatten() == Kind.UNIFIED)[:, None].expand(-1, grid.block_numel).to(weight.dtype),
        torch.zeros_like(weight),
    ).bool()
    lifted = in_unified & (inside != 0) & (nearest == 0)
    torch.testing.assert_close(rounded[~lifted], nearest[~lifted], rtol=1e-5, atol=1e-6 * step)
    torch.testing.assert_close(rounded[lifted].abs(), torch.full_like(rounded[lifted], step))


def test_it_trains_as_a_module_that_rounds_in_its_forward_pass():
    ours = network(dtype=torch.float64)
    steps = {name: 0.01 * (1 + i) for i, (name, _) in enumerate(ours.named_parameters())}
    exact = {name: p.detach().clone().requires_grad_() for name, p in ours.named_parameters()}
    parameters, rounding = dict(ours.named_parameters()), Rounding({})
    rounding.start(parameters, steps)
    first = {name: p.detach().clone() for name, p in parameters.items()}
    optimizers = [torch.optim.SGD(p, 0.1, momentum=0.5) for p in (list(parameters.values()), list(exact.values()))]
    for seed in range(30):
        x = normal(seed, 16, 64)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (ours(x) - x[:, :8]).square().mean().backward()
        shown = {n: p + ((p / steps[n]).round() * steps[n] - p).detach() for n, p in exact.items()}  # straight through
        out = torch.func.functional_call(ours, shown, (x,))
        (out - x[:, :8]).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        rounding.after_step(parameters)
    for name, p in exact.items():
        torch.testing.assert_close(rounding._exact[name], p.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(parameters[name].detach(), (p.detach() / steps[name]).round() * steps[name])
    moved = [name for name, p in parameters.items() if not torch.equal(p, first[name])]
    assert {"0.weight", "2.weight", "4.weight"} <= set(moved)


def test_what_no_step_changed_keeps_every_bit_and_restore_undoes_rounding():
    module = network()
    before, parameters = {n: p.detach().clone() for n, p in module.named_parameters()}, dict(module.named_parameters())
    rounding = Rounding({})
    rounding.start(parameters, dict.fromkeys(list(parameters)[1:], 0.05))
    shown = {name: p.detach().clone() for name, p in parameters.items()}
    assert same_bits(shown["0.weight"], before["0.weight"])  # it has no step
    for _ in range(3):
        rounding.after_step(parameters)
        rounding.verify(parameters)
    assert all(same_bits(p.detach(), shown[name]) for name, p in parameters.items())
    rounding.restore(parameters)
    assert all(same_bits(p.detach(), before[name]) for name, p in parameters.items())


@pytest.mark.parametrize(("dtype", "compression"), [(torch.float32, 8), (torch.bfloat16, 4)])
def test_the_file_holds_the_trained_parameters_without_loss_and_has_the_size(dtype, compression, tmp_path):
    module = network(dtype=dtype)
    run, optimizer = make(module, budget=Budget(compression)), adam(module)
    train(module, run, optimizer, range(LENGTH))
    run.verify()
    assert run.rounding.steps.keys() >= {"0.weight", "2.weight", "4.weight"}
    grids = {name: entry.grid for name, entry in run.entries.items()}
    saved = save_compressed(
        module, tmp_path / "m.muws", blocks=grids, compression=compression, steps=run.rounding.steps
    )
    assert compression <= saved.compression_ratio <= 1.2 * compression
    loaded = load_compressed(tmp_path / "m.muws")
    assert all(same_bytes(x, loaded[name]) for name, x in module.state_dict().items())
    with torch.no_grad():
        module[2].bias[0] += run.rounding.steps["2.bias"] / 3
    with pytest.raises(StateError, match=r"2.bias is not what the file would hold, whole multiples of"):
        run.verify()
    run.settle(["2.bias"])
    run.verify()


def test_a_state_goes_on_with_the_same_bits():
    module = network()
    run, optimizer = make(module), adam(module)
    train(module, run, optimizer, range(6))
    assert run.rounding
    again = network()
    other, its = make(again), adam(again)
    again.load_state_dict(module.state_dict())
    state = run.state_dict()
    torch.save(state, buffer := io.BytesIO())
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    its.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(module, run, optimizer, range(6, LENGTH))
    train(again, other, its, range(6, LENGTH))
    assert all(same_bits(p, again.get_parameter(name)) for name, p in module.named_parameters())
    assert run.rounding.steps == other.rounding.steps


@pytest.mark.parametrize(
    "options",
    [
        {"stepper": None},
        {"retraining": Retraining(unified="frozen")},
        {"budget": Budget(max_relative_error=0.5)},
    ],
)
def test_nothing_is_rounded_where_nothing_chooses_steps_or_magnitudes_are_frozen(options):
    module = network()
    run = make(module, **options)
    train(module, run, adam(module), range(LENGTH))
    assert run.rounding is None
    run.verify()


def test_an_optimizer_that_keeps_points_is_not_rounded():
    module = network()
    run, optimizer = make(module), torch.optim.ASGD(module.parameters(), 1e-2)
    train(module, run, optimizer, range(LENGTH))
    assert run.rounding is None
    run.verify()


def test_a_budget_prunes_more_and_unifies_less_where_rounding_is_trained():
    kinds = []
    for round_start in (1.0, 0.5):
        module = network()
        run = make(module)
        run.tick(0, Phases(admm_start=0, admm_end=2, update_every=1, round_start=round_start).on(LENGTH), [])
        structures = [entry.structure for entry in run.planned.values()]
        kinds.append((sum(s.prune_ratio for s in structures), sum(s.unify_ratio for s in structures)))
    assert kinds[0][1] > kinds[1][1]


def test_steps_that_no_file_has_are_refused():
    with pytest.raises(SettingError, match="compression=5000 cannot be reached"):
        choose_steps(network(), compression=5000)
    with pytest.raises(SettingError, match="compression=1 is not allowed"):
        choose_steps(network(), compression=1)
