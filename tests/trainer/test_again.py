"""A callback in several fits: the same weights under the same names go on, any other model begins again."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from lightning_muws import Phases, Retraining, WeightUnificationCallback, load_compressed
from tests.support.explicit import PHASES
from tests.support.modules import QUIET, STRUCTURE, Probe, TwoLayers, fit
from tests.support.strategies import same_bits

COVERED = ("layer.0.weight", "layer.2.weight")
PROVIDED = "ignore:.*callbacks used to create the checkpoint need to be provided"


class Journal(Callback):
    """Notes the phase of each epoch's first batch."""

    def __init__(self, callback: WeightUnificationCallback) -> None:
        self.callback, self.phases = callback, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.phases.append(self.callback.phase)


class Interrupt(Callback):
    """Stops a fit as Ctrl-C does, once."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 3:
            self.epoch = -1
            raise KeyboardInterrupt


# ---- before the structure is frozen


@pytest.mark.parametrize(
    ("phases", "admm"),
    [
        (Phases(), slice(2, 5)),
        (Phases(update_every=1), slice(2, 5)),
        (Phases("step", 0.2, 0.5, 0.1), slice(2, 5)),
        (Phases("step", 16, 40, 8), slice(2, 5)),
    ],
    ids=str,
)
def test_a_new_fit_after_an_interrupt_in_admm_has_all_phases_on_its_own_clock(phases, admm):
    callback, module = WeightUnificationCallback(STRUCTURE, phases=phases), TwoLayers()
    with pytest.raises(SystemExit):
        fit(module, callback, Interrupt(12 if isinstance(phases.admm_end, float) else 3), max_epochs=30)
    assert callback.phase == "admm"
    journal = Journal(callback)
    fit(module, callback, journal, max_epochs=10)
    expected = ["dense"] * 10
    expected[admm] = ["admm"] * (admm.stop - admm.start)
    expected[admm.stop :] = ["retraining"] * (10 - admm.stop)
    assert journal.phases == expected
    callback.verify()


def test_a_new_fit_after_an_interrupt_in_admm_is_a_fit_of_a_fresh_callback_to_the_bit():
    weights = []
    for used in (True, False):
        callback, module = WeightUnificationCallback(STRUCTURE, phases=PHASES), TwoLayers()
        module.load_state_dict(START)
        with pytest.raises(SystemExit):
            fit(module, callback, Interrupt(3), max_epochs=6)
        callback = callback if used else WeightUnificationCallback(STRUCTURE, phases=PHASES)
        fit(module, callback, max_epochs=6)
        assert [update.when for update in callback.history] == [2, 3, 4]
        weights.append(module.state_dict())
    assert all(same_bits(weights[0][name], weights[1][name]) for name in COVERED)


START = TwoLayers().state_dict()


def test_the_same_trainer_goes_on_where_it_was_interrupted():
    callback, module = WeightUnificationCallback(STRUCTURE, phases=PHASES), TwoLayers()
    journal = Journal(callback)
    options = {**QUIET, "limit_train_batches": 8, "limit_val_batches": 0}
    trainer = L.Trainer(callbacks=[callback, journal, Interrupt(3)], max_epochs=6, **options)
    with pytest.raises(SystemExit):
        trainer.fit(module)
    assert journal.phases == ["dense", *["admm"] * 3]
    n_seen = len(journal.phases)
    trainer.fit(module)
    assert journal.phases[n_seen] == "admm"
    assert journal.phases[-2:] == ["retraining"] * 2
    assert [update.when for update in callback.history] == [2, 3, 4]
    assert [update.rho for update in callback.history] == pytest.approx([1.15**i for i in range(3)])
    callback.verify()


# ---- once the structure is frozen


@pytest.mark.parametrize("phases", [PHASES, Phases("step", 4, 20, 8)], ids=str)
def test_a_second_fit_may_be_shorter_than_the_phases_of_the_first(phases):
    callback, module = WeightUnificationCallback(STRUCTURE, phases=phases), TwoLayers()
    fit(module, callback, max_epochs=5)
    kinds = {name: support.kinds.clone() for name, support in callback.supports.items()}
    probe = Probe(callback)
    fit(module, callback, probe, max_epochs=2)
    assert probe.n_checked == 2 * 8 * 2
    assert all(torch.equal(callback.supports[name].kinds, kinds[name]) for name in COVERED)


def test_shares_of_a_run_without_end_are_no_obstacle_to_a_second_fit():
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    callback, module = WeightUnificationCallback(STRUCTURE), TwoLayers()
    fit(module, callback, max_epochs=6)
    probe = Probe(callback)
    fit(module, callback, probe, Stop(), max_epochs=-1)
    assert probe.n_checked == 2 * 8 * 2


class Decaying(TwoLayers):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


@pytest.mark.filterwarnings(PROVIDED)
@pytest.mark.parametrize("retraining", [Retraining(), Retraining(schedule="cosine", lr=0.01)], ids=str)
def test_a_checkpoint_of_a_second_fit_leads_to_the_same_bits(tmp_path, retraining):
    callback, module = WeightUnificationCallback(STRUCTURE, phases=PHASES, retraining=retraining), Decaying()
    fit(module, callback, max_epochs=5)
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(module, callback, saver, max_epochs=4, enable_checkpointing=True)
    for epoch in range(3):
        resumed, again = Decaying(), WeightUnificationCallback(STRUCTURE, phases=PHASES, retraining=retraining)
        fit(resumed, again, max_epochs=4, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        for name in COVERED:
            assert same_bits(resumed.get_parameter(name).detach(), module.get_parameter(name).detach()), epoch


@pytest.mark.filterwarnings(PROVIDED)
def test_a_used_callback_takes_the_state_of_a_checkpoint(tmp_path):
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    callback, module = WeightUnificationCallback(STRUCTURE, phases=PHASES), TwoLayers()
    fit(module, callback, saver, max_epochs=6, enable_checkpointing=True)
    expected = {name: module.get_parameter(name).detach().clone() for name in COVERED}
    journal = Journal(callback)
    fit(module, callback, journal, max_epochs=6, ckpt_path=tmp_path / "epoch=2.ckpt")
    assert journal.phases == ["admm", "retraining", "retraining"]
    assert all(same_bits(module.get_parameter(name).detach(), x) for name, x in expected.items())


# ---- another model


class Bigger(L.LightningModule):
    """Holds the layers of a TwoLayers, and one more."""

    def __init__(self, inner: TwoLayers) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(4, 8)

    def training_step(self, batch, batch_idx):
        return self.head(self.inner(batch)).square().mean()

    def train_dataloader(self):
        return self.inner.train_dataloader()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def test_a_bigger_module_that_holds_the_weights_begins_again_with_all_of_its_layers(tmp_path):
    callback, module = WeightUnificationCallback(STRUCTURE, phases=PHASES, save_to=tmp_path / "m.muws"), TwoLayers()
    fit(module, callback, max_epochs=5)
    bigger, journal = Bigger(module), Journal(callback)
    fit(bigger, callback, journal, max_epochs=5)
    assert journal.phases == ["dense", "admm", "admm", "admm", "retraining"]
    assert set(callback.supports) == {f"inner.{name}" for name in COVERED} | {"head.weight"}
    assert load_compressed(tmp_path / "m.muws").keys() == bigger.state_dict().keys()


def test_a_model_that_got_another_layer_begins_again():
    callback, module = WeightUnificationCallback(STRUCTURE, phases=PHASES), TwoLayers()
    fit(module, callback, max_epochs=5)
    module.layer.append(nn.Linear(4, 8))
    journal = Journal(callback)
    fit(module, callback, journal, max_epochs=5)
    assert journal.phases[0] == "dense"
    assert set(callback.supports) == {*COVERED, "layer.3.weight"}


def test_a_model_with_another_head_begins_again():
    callback, module = WeightUnificationCallback(STRUCTURE, phases=PHASES), TwoLayers()
    fit(module, callback, max_epochs=5)
    module.layer[2] = nn.Linear(16, 4)
    journal = Journal(callback)
    fit(module, callback, journal, max_epochs=5)
    assert journal.phases[0] == "dense"


def test_a_layer_that_is_frozen_between_two_fits_keeps_its_structure():
    callback, module = WeightUnificationCallback(STRUCTURE, phases=PHASES), TwoLayers()
    fit(module, callback, max_epochs=5)
    module.layer[0].requires_grad_(False)
    before, probe = module.layer[0].weight.detach().clone(), Probe(callback)
    fit(module, callback, probe, max_epochs=2)
    assert probe.n_checked == 2 * 8 * 2
    assert same_bits(module.layer[0].weight.detach(), before)
