"""Steps that Lightning does not announce: one warning, and the constraint still holds; old optimizers are freed."""

import gc
import re
import weakref

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_muws import Phases, Retraining, WeightUnificationCallback
from tests.support.explicit import PHASES
from tests.support.modules import STRUCTURE, Probe, TwoLayers, fit

SAID = "layer.0.weight, layer.2.weight changed in training without a step that Lightning announces, so "
IN_ADMM = re.escape(f"{SAID}no penalty pulls them")
IN_RETRAINING = re.escape(f"{SAID}they stay inside their structure, but their gradients")


class Raw(TwoLayers):
    """Steps the torch optimizer inside Lightning's."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx)["loss"])
        optimizer.step()


class Overridden(TwoLayers):
    """Steps the torch optimizer in automatic optimization."""

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        closure()
        optimizer.optimizer.step()


class InBackward(TwoLayers):
    """Steps each parameter as soon as it has its gradient; the Trainer knows of no optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.mine = {p: torch.optim.AdamW([p], 1e-2) for p in self.parameters()}
        for parameter in self.parameters():
            parameter.register_post_accumulate_grad_hook(self.step_one)

    def step_one(self, parameter):
        self.mine[parameter].step()
        parameter.grad = None

    def configure_optimizers(self):
        return None


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None.")
@pytest.mark.parametrize("unified", ["tied", "frozen"])
@pytest.mark.parametrize("kind", [Raw, Overridden, InBackward])
def test_steps_without_lightning_are_reported_once_and_held_to_the_structure(kind, unified):
    for phases, said in ((PHASES, IN_ADMM), (Phases(admm_start=2, admm_end=2), IN_RETRAINING)):
        callback = WeightUnificationCallback(STRUCTURE, phases=phases, retraining=Retraining(unified))
        probe = Probe(callback)
        with pytest.warns(UserWarning, match="Lightning announces") as found:
            fit(kind(), callback, probe, max_epochs=6)
        texts = [text for warning in found if "Lightning announces" in (text := str(warning.message))]
        assert len(texts) == 1
        assert re.match(said, texts[0])
        assert probe.n_checked == (6 - (4 if phases is PHASES else 2)) * 8 * 2
        callback.verify()


@pytest.mark.parametrize("kind", [Raw, Overridden])
def test_a_followed_optimizer_is_held_after_each_step_whoever_steps_it(kind):
    class First(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            for optimizer in trainer.optimizers if callback.phase == "retraining" and not errors else ():
                optimizer.register_step_post_hook(self.look)

        def look(self, *_):
            errors.extend(s.error(module.get_parameter(n).detach()) for n, s in callback.supports.items())

    errors, module = [], kind("adam")
    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES)
    with pytest.warns(UserWarning, match=IN_ADMM):
        fit(module, callback, First(), max_epochs=6)
    assert len(errors) == 2 * 8 * 2
    assert all(error == 0 for error in errors)


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None.")
def test_batches_of_unannounced_steps_are_counted():
    callback = WeightUnificationCallback(STRUCTURE, phases=Phases("step", 4, 20, 8))
    with pytest.warns(UserWarning, match=IN_ADMM):
        fit(InBackward(), callback, max_epochs=4)
    assert [update.when for update in callback.history] == [12, 20]


class Hookless:
    """An optimizer without torch's hooks: Lightning accepts any object that can step."""

    def __init__(self, parameters) -> None:
        self.param_groups, self.state, self.defaults = [{"params": list(parameters)}], {}, {}

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            closure()
        for parameter in self.param_groups[0]["params"]:  # by rows, which pulls the rows of a block apart
            parameter -= 0.01 * torch.nn.functional.normalize(parameter.grad, dim=-1)

    def zero_grad(self, set_to_none=True):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_an_optimizer_without_hooks_is_held_when_the_batch_ends():
    class Module(TwoLayers):
        def configure_optimizers(self):
            return Hookless(self.parameters())

    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES)
    probe = Probe(callback)
    fit(Module(), callback, probe, max_epochs=6)  # its steps are announced: nothing to warn of
    assert probe.n_checked == 2 * 8 * 2


def test_a_change_after_the_step_is_held_too_and_no_reason_to_warn():
    class Clamped(TwoLayers):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.clamp_(-0.1, 0.05)

    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES)
    probe = Probe(callback)
    fit(Clamped(), callback, probe, max_epochs=6)
    assert probe.n_checked == 2 * 8 * 2


def test_a_restarted_schedule_lets_go_of_the_optimizer_before():
    class Decaying(TwoLayers):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            made.setdefault(id(trainer.optimizers[0]), weakref.ref(trainer.optimizers[0]))

        def on_train_epoch_end(self, trainer, pl_module):
            gc.collect()
            alive.append(sum(optimizer() is not None for optimizer in made.values()))

    made, alive = {}, []
    fit(Decaying("adam"), WeightUnificationCallback(STRUCTURE, phases=PHASES), Look(), max_epochs=6)
    assert len(made) == 2
    assert alive == [1] * 6


def test_an_optimizer_created_within_a_batch_is_held_at_once():
    class Remade(TwoLayers):
        def configure_optimizers(self):  # fused: torch counts no change of a weight that it steps
            return torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.2, fused=True)

        def on_train_batch_start(self, batch, batch_idx):
            if self.current_epoch == 5 and batch_idx == 3:
                self.trainer.strategy.setup_optimizers(self.trainer)

    class Verify(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if callback.phase == "retraining":
                callback.verify()

    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES, retraining=Retraining("frozen"))
    fit(Remade(), callback, Verify(), max_epochs=6)
