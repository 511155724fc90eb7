"""The callback covers the weights that an optimizer holds when fit begins, and lists the weights it leaves out."""

import copy
import logging

import pytest
import torch

from lightning_muws import LayerRule, WeightUnificationCallback
from tests.support.explicit import PHASES
from tests.support.modules import STRUCTURE, Probe, TwoLayers, fit
from tests.support.strategies import same_bits

NET = {"layer.0.weight", "layer.2.weight"}
TARGET = {"target.0.weight", "target.2.weight"}


class Dqn(TwoLayers):
    """Its target network requires gradients, but no optimizer holds it: its weights are copies."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(optimizer)
        self.target = copy.deepcopy(self.layer)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            aim = self.target(batch)
        return (self.layer(batch) - aim - 1).square().mean()

    def on_train_batch_end(self, *_):
        if self.trainer.global_step % 4 == 0:
            self.target.load_state_dict(self.layer.state_dict())

    def configure_optimizers(self):
        return torch.optim.SGD(self.layer.parameters(), 0.05)


def test_weights_that_no_optimizer_holds_get_no_structure(caplog):
    callback, module = WeightUnificationCallback(STRUCTURE, phases=PHASES), Dqn()
    probe = Probe(callback)
    with caplog.at_level(logging.INFO):
        fit(module, callback, probe, max_epochs=6)
    assert set(callback.supports) == NET
    assert probe.n_checked == 2 * 8 * 2
    for name in NET:  # the last copy is of the last step
        assert same_bits(module.get_parameter(name.replace("layer", "target")).detach(), module.get_parameter(name))
    for name in TARGET:
        assert "no optimizer" in callback.plan.left_out[name].reason
    (message,) = (r.message for r in caplog.records if "get a structure" in r.message)
    assert "2 parameters with 576 of 1,192 weights get a structure" in message
    assert "target.0.weight, target.2.weight (no optimizer" in message


def test_the_network_is_the_same_as_without_a_target_that_requires_gradients():
    weights, start = [], Dqn().state_dict()
    for requires in (True, False):
        module = Dqn()
        module.load_state_dict(start)
        module.target.requires_grad_(requires)
        callback = WeightUnificationCallback(STRUCTURE, phases=PHASES)
        fit(module, callback, max_epochs=6)
        weights.append(module.state_dict())
        assert len(callback.report.layers) == 2
    assert all(same_bits(weights[0][name], x) for name, x in weights[1].items())


@pytest.mark.filterwarnings("ignore:target.*changed in training without a step")
def test_a_rule_that_names_a_weight_covers_it_without_an_optimizer():
    rules = [LayerRule("target.0.weight", structure=STRUCTURE)]
    callback = WeightUnificationCallback(STRUCTURE, rules, PHASES)
    fit(Dqn(), callback, max_epochs=6)
    assert set(callback.supports) == {*NET, "target.0.weight"}


def test_left_out_weights_are_listed_with_their_reason_and_biases_are_not(caplog):
    callback = WeightUnificationCallback(STRUCTURE, [LayerRule("layer.2.*", skip=True)], PHASES)
    with caplog.at_level(logging.INFO):
        fit(TwoLayers(), callback, max_epochs=6)
    (message,) = (r.message for r in caplog.records if "get a structure" in r.message)
    assert "left out: layer.2.weight (a rule skips it)" in message
    assert "bias" not in message


class Joining(TwoLayers):
    """Its first layer joins the optimizer in the third epoch."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.layer[2].parameters(), 0.05)

    def on_train_epoch_start(self):
        if self.current_epoch == 2:
            self.optimizers().add_param_group({"params": list(self.layer[0].parameters())})


def test_a_layer_that_joins_an_optimizer_in_mid_fit_stays_dense_with_a_warning():
    callback, module = WeightUnificationCallback(STRUCTURE, phases=PHASES), Joining()
    with pytest.warns(UserWarning, match="joined an optimizer after fit began") as found:
        fit(module, callback, max_epochs=6)
    (message,) = (str(w.message) for w in found if "joined" in str(w.message))
    assert message.startswith("layer.0.weight joined an optimizer after fit began, so it stays dense: ")
    assert set(callback.supports) == {"layer.2.weight"}
    assert (module.layer[0].weight != 0).all()
