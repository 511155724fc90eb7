"""Runs resumed from every checkpoint, in unusual Trainers and beside other callbacks; nothing is left behind."""

import pickle
import subprocess
import sys

import lightning as L
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    EMAWeightAveraging,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader

import lightning_muws.pytorch_lightning
from lightning_muws import Phases, Retraining, WeightUnificationCallback
from lightning_muws.errors import SettingError
from tests.support.explicit import PHASES, Snapshot
from tests.support.modules import QUIET, STRUCTURE, Probe, TwoLayers, fit
from tests.support.strategies import same_bits

PROVIDED = "ignore:.*callbacks used to create the checkpoint need to be provided"
COVERED = ("layer.0.weight", "layer.2.weight")


class Decaying(TwoLayers):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        # not `estimated_stepping_batches`: with it Lightning forgets where in an epoch's data it was to resume
        by_step = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8 * self.trainer.max_epochs)
        return [optimizer], [{"scheduler": by_step, "interval": "step"}]


# ---- resume: from every checkpoint of a run, to the bit


class Resumable:
    """A loader that saves its position: otherwise Lightning restarts the data of the epoch when it resumes."""

    def __init__(self, n: int = 8):
        self.data, self.at = torch.randn(n, 1, 32, generator=torch.Generator().manual_seed(1)), 0

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        for i in range(self.at % len(self), len(self)):
            self.at = i + 1
            yield self.data[i]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Steady(TwoLayers):
    def train_dataloader(self):
        return Resumable()


class SteadyDecaying(Steady, Decaying):
    pass


RUNS = {
    "restarted schedule": (SteadyDecaying, PHASES, Retraining(), {}),
    "module's schedule, frozen": (SteadyDecaying, PHASES, Retraining("frozen", "module"), {}),
    "cosine with a rate": (Steady, PHASES, Retraining(schedule="cosine", lr=0.01), {}),
    "constant": (SteadyDecaying, PHASES, Retraining(schedule="constant", lr=0.01), {}),
    "accumulate 2": (SteadyDecaying, PHASES, Retraining(), {"accumulate_grad_batches": 2}),
    "accumulate 3": (Steady, PHASES, Retraining(), {"accumulate_grad_batches": 3}),  # the last window has two batches
    "updates within epochs": (Steady, Phases(admm_start=0, admm_end=3, update_every=0.125), Retraining(), {}),
    "share of steps": (Steady, Phases("step", 0.1, 0.5, 5), Retraining(schedule="cosine"), {}),
    "steps": (SteadyDecaying, Phases("step", 6, 26, 5), Retraining(), {}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings(PROVIDED)
@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("name", RUNS)
def test_every_checkpoint_leads_to_the_same_bits(tmp_path, name):
    kind, phases, retraining, options = RUNS[name]
    batch = ModelCheckpoint(tmp_path / "batch", "{step}", save_top_k=-1, every_n_train_steps=3)
    last = ModelCheckpoint(tmp_path / "last", "{step}", save_top_k=-1, every_n_train_steps=4)  # an epoch's last batch
    validation = ModelCheckpoint(tmp_path / "validation", "{step}", monitor="val_loss", save_top_k=-1)
    epoch = ModelCheckpoint(tmp_path / "epoch", "{step}", save_top_k=-1, save_on_train_epoch_end=True)

    class Middle(Callback):
        def on_validation_batch_start(self, trainer, *_):
            if not trainer.sanity_checking:
                trainer.save_checkpoint(tmp_path / f"middle-{trainer.global_step}.ckpt")

    module = kind("adam")
    options = {"max_epochs": 6, "enable_checkpointing": True, **options}
    run = WeightUnificationCallback(STRUCTURE, phases=phases, retraining=retraining)
    fit(module, run, batch, last, validation, epoch, Middle(), **options)
    paths = sorted(tmp_path.rglob("*.ckpt"))
    assert len(paths) > 20
    differ, seen = [], set()
    for path in paths:
        saved = torch.load(path, weights_only=True)
        seen.add(assert_belongs_to_its_phase(saved, run))
        if saved["epoch"] == 6 or saved["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"] == 6:
            continue
        resumed, again = kind("adam"), WeightUnificationCallback(STRUCTURE, phases=phases, retraining=retraining)
        fit(resumed, again, ckpt_path=path, **{**options, "enable_checkpointing": False})
        again.verify()
        pairs = zip(module.parameters(), resumed.parameters(), strict=True)
        if not all(same_bits(a.detach(), b.detach()) for a, b in pairs) or again.history != run.history:
            differ.append(path.relative_to(tmp_path).as_posix())
    assert not differ
    assert seen >= {"admm", "retraining"}


def assert_belongs_to_its_phase(saved: dict, run: WeightUnificationCallback) -> str:
    """Check that weights are inside their structure in retraining and raw before; return the phase."""
    phase = saved["callbacks"]["WeightUnificationCallback"]["run"]["phase"]
    for name, support in run.supports.items():
        weight = saved["state_dict"][name]
        assert support.error(weight) == 0 if phase == "retraining" else (weight != 0).all(), (phase, name)
    return phase


@pytest.mark.filterwarnings(PROVIDED, "ignore:.*was called without a model", "ignore:.*no last checkpoint available")
def test_a_run_ended_by_an_exception_resumes_to_the_same_bits(tmp_path):
    class Fail(Callback):
        def on_validation_batch_start(self, trainer, *_):
            if trainer.current_epoch == 2:
                raise RuntimeError("stop")

    module = TwoLayers("adam")
    start = module.state_dict()
    start = {name: x.clone() for name, x in start.items()}
    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES)
    fit(module, callback, max_epochs=6)
    failing = TwoLayers("adam")
    failing.load_state_dict(start)
    callbacks = WeightUnificationCallback(STRUCTURE, phases=PHASES), Fail(), OnExceptionCheckpoint(tmp_path)
    with pytest.raises(RuntimeError, match="stop"):
        fit(failing, *callbacks, max_epochs=6, num_sanity_val_steps=0, enable_checkpointing=True)
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert assert_belongs_to_its_phase(saved, callback) == "admm"
    resumed = TwoLayers("adam")
    fit(
        resumed,
        WeightUnificationCallback(STRUCTURE, phases=PHASES),
        ckpt_path=tmp_path / "on_exception.ckpt",
        max_epochs=6,
    )
    for a, b in zip(module.parameters(), resumed.parameters(), strict=True):
        assert same_bits(a.detach(), b.detach())


def test_checkpoints_load_without_this_package(tmp_path):
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(
        TwoLayers(), WeightUnificationCallback(STRUCTURE, phases=PHASES), saver, max_epochs=6, enable_checkpointing=True
    )
    code = (
        "import sys, torch\n"
        "sys.modules['lightning_muws'] = None\n"
        "for path in sys.argv[1:]:\n"
        "    assert 'WeightUnificationCallback' in torch.load(path, weights_only=True)['callbacks']\n"
    )
    paths = [str(path) for path in tmp_path.glob("*.ckpt")]
    assert len(paths) == 6
    subprocess.run([sys.executable, "-c", code, *paths], check=True)  # noqa: S603  our own code


def test_weights_alone_continue_inside_their_structure(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_weights_only=True)
    first, module = WeightUnificationCallback(STRUCTURE, phases=PHASES), TwoLayers()
    fit(module, first, saver, max_epochs=6, enable_checkpointing=True)
    again, resumed = WeightUnificationCallback(STRUCTURE, phases=Phases(admm_start=0, admm_end=0)), TwoLayers()
    resumed.load_state_dict(torch.load(saver.best_model_path, weights_only=True)["state_dict"])
    probe = Probe(again)
    fit(resumed, again, probe, max_epochs=3)
    assert probe.n_checked == 3 * 8 * 2
    assert again.history[0].primal == 0
    for name, support in first.supports.items():
        assert torch.equal(again.supports[name].kinds, support.kinds)


@pytest.mark.filterwarnings(PROVIDED)
def test_a_state_of_other_rules_is_refused(tmp_path):
    from lightning_muws import LayerRule, MicroStructure, MuwsError

    saver = ModelCheckpoint(tmp_path)
    fit(
        TwoLayers(), WeightUnificationCallback(STRUCTURE, phases=PHASES), saver, max_epochs=6, enable_checkpointing=True
    )
    other = WeightUnificationCallback(STRUCTURE, [LayerRule(COVERED[1], skip=True)], PHASES)
    with pytest.raises(
        MuwsError, match=r"does not fit the settings: the checkpoint has layer\.2\.weight, the settings"
    ):
        fit(TwoLayers(), other, ckpt_path=saver.best_model_path, max_epochs=8)
    other = WeightUnificationCallback(MicroStructure((4, 4), 0.5), phases=PHASES)
    with pytest.raises(
        MuwsError, match=r"does not fit.*layer\.0\.weight grid block_shape is \[2, 4\] in the checkpoint and \[4, 4\]"
    ):
        fit(TwoLayers(), other, ckpt_path=saver.best_model_path, max_epochs=8)


# ---- odd Trainers


class Iterable(torch.utils.data.IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.randn(32, generator=generator)


class Streaming(TwoLayers):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(Iterable())


@pytest.mark.parametrize("length", [{"max_steps": 30}, {"max_steps": 30, "max_epochs": -1}])
def test_pretraining_on_a_stream_counts_steps(length):
    callback = WeightUnificationCallback(STRUCTURE, phases=Phases("step", 0.2, 0.6, 3))
    fit(Streaming(), callback, **length, limit_train_batches=1.0, val_check_interval=10)
    assert [update.when for update in callback.history] == [9, 12, 15, 18]
    callback.verify()


@pytest.mark.filterwarnings("ignore:.*`max_epochs` was not set")
def test_a_run_without_end_needs_whole_numbers():
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 5

    with pytest.raises(
        SettingError, match="is a share of the run's length, and this run has no end: give admm_end as a whole number"
    ):
        fit(TwoLayers(), WeightUnificationCallback(STRUCTURE, phases=Phases(admm_start=0, admm_end=0.5)), max_epochs=-1)
    callback = WeightUnificationCallback(STRUCTURE, phases=Phases(admm_start=0, admm_end=4))
    fit(TwoLayers(), callback, Stop(), max_epochs=-1)
    callback.verify()
    assert callback.history[-1].when == 4


@pytest.mark.parametrize("n", [1, 3])
def test_fast_dev_run(n):
    callback = WeightUnificationCallback(STRUCTURE)
    with pytest.warns(UserWarning, match="projected without retraining"):
        fit(TwoLayers(), callback, fast_dev_run=n)
    callback.verify()


def test_max_steps_inside_admm():
    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES)
    with pytest.warns(UserWarning, match="training ended in the admm phase"):
        fit(TwoLayers(), callback, max_epochs=9, max_steps=20)
    callback.verify()


@pytest.mark.filterwarnings("ignore:.*overfit_batches.*", "ignore:You requested to overfit")
@pytest.mark.parametrize("options", [{"overfit_batches": 2}, {"check_val_every_n_epoch": 2}, {"val_check_interval": 3}])
def test_other_lengths_and_checks(options):
    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES)
    probe = Probe(callback)
    fit(TwoLayers(), callback, probe, max_epochs=6, **options)
    assert probe.n_checked > 0


@pytest.mark.parametrize(
    "options",
    [
        {"detect_anomaly": True}, {"inference_mode": False}, {"profiler": "simple"},
        {"reload_dataloaders_every_n_epochs": 1}, {"num_sanity_val_steps": -1}, {"max_time": "00:01:00:00"},
        {"check_val_every_n_epoch": None, "val_check_interval": 5},
    ],
    ids=str,
)  # fmt: skip
def test_what_else_people_give_a_trainer(options):
    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES)
    probe = Probe(callback)
    fit(TwoLayers(), callback, probe, max_epochs=6, **options)
    assert probe.n_checked == 2 * 8 * 2


def test_barebones():
    callback, module = WeightUnificationCallback(STRUCTURE, phases=PHASES), BoringModel()
    probe = Probe(callback)
    trainer = L.Trainer(
        barebones=True, accelerator="cpu", max_epochs=6, limit_train_batches=8, callbacks=[callback, probe]
    )
    trainer.fit(module)
    assert probe.n_checked == 2 * 8


def test_a_module_may_bring_the_callback():
    class Brings(TwoLayers):
        def configure_callbacks(self):
            return [callback]

    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES)
    fit(Brings(), max_epochs=6)
    callback.verify()


@pytest.mark.parametrize("schedule", ["restart", "module"])
def test_a_schedule_that_waits_for_a_plateau(schedule):
    class Plateau(TwoLayers):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}

    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES, retraining=Retraining(schedule=schedule))
    trainer = fit(Plateau(), callback, max_epochs=8)
    # never better by the threshold, so halved after each epoch that a scheduler sees
    n_halved = 4 if schedule == "restart" else 8
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.05 * 0.5**n_halved


def test_no_batches_leave_all_as_it_was():
    module = TwoLayers()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES)
    fit(module, callback, max_epochs=5, limit_train_batches=0)
    assert callback.phase == "dense"
    assert all(same_bits(p.detach(), before[name]) for name, p in module.named_parameters())


def test_several_train_loaders():
    class Several(TwoLayers):
        def train_dataloader(self):
            return CombinedLoader({"a": super().train_dataloader(), "b": super().train_dataloader()}, "max_size_cycle")

        def training_step(self, batch, batch_idx):
            return (
                super().training_step(batch["a"], batch_idx)["loss"]
                + super().training_step(batch["b"], batch_idx)["loss"]
            )

    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES)
    fit(Several(), callback, max_epochs=6)
    callback.verify()


def test_a_keyboard_interrupt_projects_nothing():
    class Interrupt(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.current_epoch == 2:
                raise KeyboardInterrupt

    module, callback = TwoLayers(), WeightUnificationCallback(STRUCTURE, phases=PHASES)
    with pytest.raises(SystemExit):
        fit(module, callback, Interrupt(), max_epochs=6)
    assert callback.phase == "admm"
    assert (module.layer[0].weight != 0).all()


@pytest.mark.filterwarnings(PROVIDED)
def test_validating_alone_then_fitting_begins_dense(tmp_path):
    saver, callback = ModelCheckpoint(tmp_path), WeightUnificationCallback(STRUCTURE, phases=PHASES)
    fit(TwoLayers(), callback, saver, max_epochs=6, enable_checkpointing=True)
    callback, module = WeightUnificationCallback(STRUCTURE, phases=PHASES), TwoLayers()
    trainer = L.Trainer(callbacks=[callback], max_epochs=5, limit_train_batches=4, **QUIET)
    for verb in (trainer.validate, trainer.test, trainer.predict):
        verb(module, ckpt_path=saver.best_model_path, weights_only=True)
        assert callback.phase == "dense"
    phases = []

    class Note(Callback):
        def on_train_batch_start(self, *_):
            phases.append(callback.phase)

    trainer = L.Trainer(callbacks=[callback, Note()], max_epochs=5, limit_train_batches=4, **QUIET)
    trainer.fit(module)
    assert phases[0] == "dense"
    assert phases[-1] == "retraining"


@pytest.mark.filterwarnings("ignore")
def test_finders_as_callbacks_and_tuners(tmp_path):
    class Tuned(TwoLayers):
        def __init__(self):
            super().__init__()
            self.lr, self.batch_size = 0.01, 2

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.randn(64, 32), batch_size=self.batch_size)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.lr)

    options = {"default_root_dir": tmp_path, "limit_train_batches": 1.0}
    finders = LearningRateFinder(num_training_steps=8), BatchSizeFinder(max_trials=2, init_val=2)
    callback, module = WeightUnificationCallback(STRUCTURE, phases=PHASES), Tuned()
    probe = Probe(callback)
    fit(module, *finders, callback, probe, max_epochs=6, enable_checkpointing=True, **options)
    assert probe.n_checked > 0
    assert [update.when for update in callback.history] == [2, 3, 4]
    callback, module = WeightUnificationCallback(STRUCTURE, phases=PHASES), Tuned()
    trainer = L.Trainer(callbacks=[callback], max_epochs=6, **QUIET | {"default_root_dir": tmp_path})
    Tuner(trainer).lr_find(module, num_training=8)
    Tuner(trainer).scale_batch_size(module, max_trials=2, init_val=2)
    trainer.fit(module)
    callback.verify()
    assert [update.when for update in callback.history] == [2, 3, 4]


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_part_is_saved_under_its_own_names_in_the_middle_of_a_validation(tmp_path):
    class Compiled(TwoLayers):
        def __init__(self):
            super().__init__()
            self.layer = torch.compile(self.layer, backend="aot_eager")

    class Save(Callback):
        def on_validation_batch_start(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / f"{callback.phase}.ckpt")

    callback, module, raw = WeightUnificationCallback(STRUCTURE, phases=PHASES), Compiled(), Snapshot()
    fit(module, callback, raw, Save(), max_epochs=5)
    saved = torch.load(tmp_path / "admm.ckpt", weights_only=True)["state_dict"]
    assert list(saved) == list(module.state_dict())
    for name in ("layer._orig_mod.0.weight", "layer._orig_mod.2.weight"):
        assert same_bits(saved[name], raw.weights[name])
    resumed, again = Compiled(), WeightUnificationCallback(STRUCTURE, phases=PHASES)
    fit(resumed, again, max_epochs=5, ckpt_path=tmp_path / "admm.ckpt")
    again.verify()


# ---- beside other callbacks


def test_layers_that_are_frozen_at_the_start_stay_out_of_it():
    class Frozen(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.layer[0])

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 2:
                self.unfreeze_and_add_param_group(pl_module.layer[0], optimizer)

    class OfTrained(TwoLayers):
        def configure_optimizers(self):
            return torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), 0.05)

    callback, module = WeightUnificationCallback(STRUCTURE, phases=PHASES), OfTrained()
    fit(module, callback, Frozen(), max_epochs=6)
    assert list(callback.supports) == [COVERED[1]]
    assert callback.plan.left_out[COVERED[0]].reason == "not trained (requires_grad=False)"
    assert (module.layer[0].weight != 0).all()


@pytest.mark.parametrize("unified", ["tied", "frozen"])
@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_are_inside_the_structure(unified, first):
    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES, retraining=Retraining(unified))
    average = EMAWeightAveraging(decay=0.7)
    callbacks = [average, callback] if first else [callback, average]
    module = TwoLayers()
    fit(module, *callbacks, max_epochs=7)  # a warning would say that weights had to be projected back
    callback.verify()


def test_a_rate_monitor_follows_the_schedules(tmp_path):
    for retraining in (Retraining(), Retraining(schedule="cosine", lr=0.01), Retraining(schedule="constant")):
        for kind in (TwoLayers, Decaying):
            callback = WeightUnificationCallback(STRUCTURE, phases=PHASES, retraining=retraining)
            logger = CSVLogger(tmp_path)
            fit(kind(), callback, LearningRateMonitor("step"), max_epochs=6, logger=logger, log_every_n_steps=2)
            callback.verify()


def test_two_of_us_are_refused():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `WeightUnificationCallback`"):
        fit(TwoLayers(), WeightUnificationCallback(STRUCTURE), WeightUnificationCallback(STRUCTURE), max_epochs=5)


def test_the_order_of_callbacks_changes_no_weight():
    results, start = [], TwoLayers().state_dict()
    for first in (True, False):
        module, callback = TwoLayers(), WeightUnificationCallback(STRUCTURE, phases=PHASES)
        module.load_state_dict(start)
        others = [Probe(callback), EMAWeightAveraging(decay=0.5)]
        fit(module, *([callback, *others] if first else [*others, callback]), max_epochs=6)
        results.append(module)
    for a, b in zip(*(m.parameters() for m in results), strict=True):
        assert same_bits(a.detach(), b.detach())


# ---- nothing is left behind


def test_nothing_is_left_behind():
    module, plain = TwoLayers(), TwoLayers()
    fit(plain, max_epochs=6)
    ids = {name: id(p) for name, p in module.named_parameters()}
    kinds = [type(part) for part in module.modules()]
    trainer = fit(module, WeightUnificationCallback(STRUCTURE, phases=PHASES), max_epochs=6)
    assert {name: id(p) for name, p in module.named_parameters()} == ids
    assert list(module.state_dict()) == list(plain.state_dict())
    assert [type(part) for part in module.modules()] == kinds
    assert set(module.__dict__) == set(plain.__dict__)
    for part, other in zip(module.modules(), plain.modules(), strict=True):
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_parameters", "_buffers"):
            assert list(getattr(part, name)) == list(getattr(other, name))
    for optimizer in trainer.optimizers:
        assert not optimizer._optimizer_step_post_hooks
        assert not optimizer._optimizer_step_pre_hooks


def test_the_callback_pickles_before_and_after_fit():
    callback, module = WeightUnificationCallback(STRUCTURE, phases=PHASES), TwoLayers()
    before = pickle.loads(pickle.dumps(callback))  # noqa: S301  our own
    assert (before.structure, before.phases) == (callback.structure, callback.phases)
    fit(module, callback, max_epochs=6)
    after = pickle.loads(pickle.dumps(callback))  # noqa: S301  our own
    after.verify()
    assert after.report == callback.report


# ---- the two namespaces


class OtherNamespace(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(32, 16)

    def training_step(self, batch):
        return self.layer(batch).square().mean()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(64, 32), batch_size=4)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


@pytest.mark.parametrize("schedule", ["restart", "cosine"])
def test_pytorch_lightning_has_its_own_callback(schedule):
    kind = lightning_muws.pytorch_lightning.WeightUnificationCallback
    callback = kind(STRUCTURE, phases=PHASES, retraining=Retraining(schedule=schedule))
    assert callback.state_key == WeightUnificationCallback(STRUCTURE).state_key
    trainer = pytorch_lightning.Trainer(max_epochs=6, callbacks=[callback], **QUIET)
    trainer.fit(OtherNamespace())
    callback.verify()


def test_mixing_the_namespaces_says_which_import_to_change():
    trainer = pytorch_lightning.Trainer(max_epochs=6, callbacks=[WeightUnificationCallback(STRUCTURE)], **QUIET)
    with pytest.raises(SettingError, match=r"from lightning_muws\.pytorch_lightning import WeightUnificationCallback"):
        trainer.fit(OtherNamespace())
    other = lightning_muws.pytorch_lightning.WeightUnificationCallback(STRUCTURE)
    with pytest.raises(SettingError, match="from lightning_muws import WeightUnificationCallback"):
        fit(TwoLayers(), other, max_epochs=5)
