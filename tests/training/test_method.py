"""A second training method, as a stranger would write it: one class, one row in the table."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_muws import MicroStructure, Penalty, Phases, Retraining, WeightUnificationCallback
from lightning_muws.errors import SettingError, StateError
from lightning_muws.structure.plan import make_plan
from lightning_muws.structure.sharded import norm
from lightning_muws.training.method import Method
from lightning_muws.training.methods import METHODS
from lightning_muws.training.residuals import Residuals
from lightning_muws.training.run import CompressionRun
from tests.support.modules import Probe, TwoLayers, fit
from tests.support.strategies import normal, same_bits

STRUCTURE = MicroStructure((2, 4), prune_ratio=0.5, unify_ratio=0.25)
TIMES = {"admm_start": 1, "admm_end": 4, "update_every": 1}
PENALTY = Penalty(rho=0.2, rho_growth=2.0, relative=False)


class Shrink(Method):
    """Soft shrinkage: after each step, ``W = (W + rho * project(W)) / (1 + rho)``."""

    def __init__(self, entries, penalty):
        self.entries, self.penalty, self.rho = entries, penalty, penalty.rho

    def start(self, weights):
        self.update(weights, due=0)

    @torch.no_grad()
    def after_step(self, weights):
        for name, weight in weights.items():
            weight.lerp_(self._project(name, weight), self.rho / (1 + self.rho))

    def update(self, weights, due=1):
        self.rho = self.penalty.grown(self.rho, due)
        projected = {name: self._project(name, weight) for name, weight in weights.items()}
        return {n: Residuals(norm(w.detach() - projected[n]) / norm(w.detach())) for n, w in weights.items()}

    def _project(self, name, weight):
        return self.entries[name].structure.project(weight, self.entries[name].grid, name)


@pytest.fixture(autouse=True)
def row(monkeypatch):
    monkeypatch.setitem(METHODS, "shrink", Shrink)


def train(layer, run, optimizer, epochs):
    for epoch in epochs:
        run.tick(epoch, run.phases.on(6), [optimizer])
        for seed in range(4):
            optimizer.zero_grad()
            layer(normal(seed, 8, 16)).square().mean().backward()
            run.before_step(optimizer)
            optimizer.step()
            run.after_step(optimizer)


def a_run():
    layer = nn.Linear(16, 8, dtype=torch.float64)
    layer.weight.data.copy_(normal(0, 8, 16))
    layer.bias.data.zero_()
    plan = make_plan(layer, STRUCTURE)
    run = CompressionRun(plan.weights(layer), plan.covered, Phases(**TIMES, method="shrink"), Retraining(), PENALTY)
    return layer, run, torch.optim.SGD(layer.parameters(), 0.05, momentum=0.9)


def test_a_second_method_runs_through_the_run_that_knows_only_the_protocol():
    layer, run, optimizer = a_run()
    phases = []
    for epoch in range(6):
        train(layer, run, optimizer, [epoch])
        phases.append(run.phase)
    assert phases == ["dense", "shrink", "shrink", "shrink", "retraining", "retraining"]
    run.verify()
    assert [u.rho for u in run.history] == [0.2, 0.4, 0.8]
    residuals = [u.primal for u in run.history]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < 0.5 * residuals[0]


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_a_second_method_resumes_bit_for_bit(stop, tmp_path):
    layer, run, optimizer = a_run()
    train(layer, run, optimizer, range(stop))
    torch.save([layer.state_dict(), optimizer.state_dict(), run.state_dict()], tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again, resumed, other = a_run()
    for thing, state in zip((again, other, resumed), saved, strict=True):
        thing.load_state_dict(state)
    train(layer, run, optimizer, range(stop, 6))
    train(again, resumed, other, range(stop, 6))
    assert same_bits(layer.weight.detach(), again.weight.detach())
    assert resumed.history == run.history


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_a_second_method_runs_through_a_real_trainer_and_resumes_bit_for_bit(tmp_path):
    def callback():
        return WeightUnificationCallback(STRUCTURE, phases=Phases(**TIMES, method="shrink"), penalty=PENALTY)

    module, whole = TwoLayers("adam"), callback()
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(module, whole, Probe(whole), saving, max_epochs=6, enable_checkpointing=True)
    assert whole.phase == "retraining"
    assert [u.when for u in whole.history] == [2, 3, 4]
    whole.verify()

    phases = []
    for path in sorted(tmp_path.glob("*.ckpt"))[:5]:
        phases.append(torch.load(path, weights_only=True)["callbacks"]["WeightUnificationCallback"]["run"]["phase"])
        again, resumed = TwoLayers("adam"), callback()
        fit(again, resumed, max_epochs=6, ckpt_path=path)
        resumed.verify()
        assert resumed.history == whole.history
        for a, b in zip(module.parameters(), again.parameters(), strict=True):
            assert same_bits(a.detach(), b.detach()), path
    assert phases == ["dense", "shrink", "shrink", "shrink", "retraining"]


def test_an_unknown_method_is_refused():
    methods = "'auto', 'admm', 'soft', 'straight_through', 'shrink' or 'one_shot'"
    with pytest.raises(SettingError, match=f"method='amdm' is not allowed: give {methods}, or several"):
        Phases(method="amdm")


@pytest.mark.parametrize("method", ["admm", "soft", "straight_through", "soft+straight_through"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named_at_the_freeze_and_no_weight_changes(method, value):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    plan = make_plan(model, MicroStructure((4, 4), 0.5, 0.25))
    phases = Phases(admm_start=0, admm_end=2, update_every=1, method=method)
    run, optimizer = CompressionRun(plan.weights(model), plan.covered, phases), torch.optim.SGD(model.parameters(), 0.1)
    run.tick(0, phases.on(4), [optimizer])
    model[1].weight.data[0, 0] = value
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(StateError, match=r"1\.weight holds 1 values of 256 that are NaN or Inf"):
        run.tick(2, phases.on(4), [optimizer])
    assert all(same_bits(a, b.detach()) for a, b in zip(before, model.parameters(), strict=True))
