"""max_drop=: the callback chooses the compression by validations that leave the run as it was, and checks it."""

import lightning as L
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.demos.boring_classes import BoringDataModule
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torchmetrics import MeanMetric, SumMetric

import lightning_muws.pytorch_lightning
from lightning_muws import MicroStructure, Phases, WeightUnificationCallback, load_compressed
from lightning_muws.cli import MuwsCLI
from lightning_muws.errors import SettingError, StateError
from tests.support.explicit import PHASES
from tests.support.modules import QUIET, TwoLayers, fit
from tests.support.strategies import same_bits, same_bytes
from tests.trainer.test_ranks import launch

PROVIDED = "ignore:.*callbacks used to create the checkpoint need to be provided"
MISSED = "ignore:.*max_drop=.* was missed"
TOO_EASY = "ignore:.*no compression did any harm"
DROP = {"max_drop": 0.08, "monitor": "val_loss"}


class Shuffled(torch.utils.data.Sampler):
    """Another order in each validation, from a generator of its own."""

    def __init__(self, n: int) -> None:
        self.n, self.generator = n, torch.Generator().manual_seed(9)

    def __iter__(self):
        return iter(torch.randperm(self.n, generator=self.generator).tolist())

    def __len__(self) -> int:
        return self.n


class Noisy(TwoLayers):
    """Repeats some of its inputs, and draws random numbers everywhere: dropout, shuffled data, a validation that draws.

    Its validation changes a buffer, and updates a metric that nothing resets.
    """

    def __init__(self) -> None:
        torch.manual_seed(7)
        super().__init__("adam")
        self.layer = nn.Sequential(
            nn.Linear(32, 96), nn.BatchNorm1d(96), nn.Tanh(), nn.Dropout(0.2), nn.Linear(96, 64), nn.Linear(64, 4)
        )
        self.mean, self.total = MeanMetric(), SumMetric()
        self.register_buffer("n_validated", torch.zeros(()))
        self.checked: list[bool] = []

    def training_step(self, batch, batch_idx):
        loss = self.distance(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def distance(self, batch):
        return (self(batch) - 3 * batch[:, :4]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.n_validated += 1
        self.checked.append(self.trainer.sanity_checking)
        assert not self.layer.training
        assert torch.rand(1) < 1
        self.mean(self.distance(batch))
        self.total(1.0)
        self.log("val_loss", self.mean, batch_size=len(batch))

    def train_dataloader(self):
        data = torch.randn(32, 32, generator=torch.Generator().manual_seed(2))
        return torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)

    def val_dataloader(self):
        data = torch.randn(16, 32, generator=torch.Generator().manual_seed(4))
        return torch.utils.data.DataLoader(data, batch_size=4, sampler=Shuffled(len(data)))


class Kept(Logger):
    """Keeps what a Trainer logs."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple] = []

    name = version = "kept"

    def log_metrics(self, metrics, step=None):
        self.logged.append((step, dict(metrics)))

    def log_hyperparams(self, *_, **__):
        pass


class Weights(L.Callback):
    """Keeps a checksum of the weights and the buffers after each batch."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(torch.stack([x.double().sum() for x in pl_module.state_dict().values()]))


@pytest.mark.filterwarnings(MISSED)
@pytest.mark.parametrize("n_sanity", [0, 2])
@pytest.mark.parametrize("phases", [PHASES, Phases(interval="step", admm_start=11, admm_end=27)])
def test_probes_leave_the_run_as_if_the_compression_had_been_given(phases, n_sanity, tmp_path):
    def run(**asked):
        module, logger, weights = Noisy(), Kept(), Weights()
        saver = ModelCheckpoint(tmp_path / str(len(asked)), monitor="val_loss", save_top_k=2)
        stop = EarlyStopping("val_loss", patience=20)
        callback = WeightUnificationCallback(phases=phases, **asked)
        options = {"logger": logger, "enable_checkpointing": True, "log_every_n_steps": 3, "val_check_interval": 0.5}
        options |= {"num_sanity_val_steps": n_sanity}
        trainer = fit(module, weights, saver, stop, callback, max_epochs=6, **options)
        return module, callback, logger, weights, saver, stop, trainer

    module, callback, logger, weights, saver, stop, trainer = run(**DROP)
    again, other, other_logger, other_weights, other_saver, other_stop, other_trainer = run(
        compression=callback.drop.compression
    )
    assert callback.plan == other.plan
    assert callback.history == other.history
    assert all(same_bytes(x, again.state_dict()[name]) for name, x in module.state_dict().items())
    assert len(weights.seen) == len(other_weights.seen) == 48
    assert all(torch.equal(a, b) for a, b in zip(weights.seen, other_weights.seen, strict=True))
    assert logger.logged == other_logger.logged
    assert saver.best_model_score == other_saver.best_model_score
    assert {name.rpartition("/")[2] for name in saver.best_k_models} == {
        name.rpartition("/")[2] for name in other_saver.best_k_models
    }
    assert stop.state_dict() == other_stop.state_dict()
    assert trainer.callback_metrics == other_trainer.callback_metrics
    assert module.checked.count(False) == again.checked.count(False) > 0
    assert module.checked.count(True) > again.checked.count(True)
    assert module.total.compute() == again.total.compute() > 0
    assert module.layer.training == again.layer.training


@pytest.mark.filterwarnings(MISSED)
def test_the_largest_compression_that_is_predicted_to_be_allowed_is_chosen_and_reported(tmp_path, capsys):
    module, path = Noisy(), tmp_path / "m.muws"
    callback = WeightUnificationCallback(phases=PHASES, save_to=path, **DROP)
    fit(module, callback, max_epochs=6)
    callback.verify()
    drop = callback.drop
    assert drop.predicted <= 0.08
    assert all(predicted > 0.08 for compression, predicted in drop.probes if compression > drop.compression)
    assert sum(x.nbytes for x in module.state_dict().values()) / path.stat().st_size >= drop.compression
    assert callback.budget.compression == drop.compression
    assert drop.is_kept == (drop.measured - drop.baseline <= 0.08)
    assert callback.report.drop == drop
    found = callback.report.to_dict()["drop"]
    assert (found["measured"], found["drop"], found["is_kept"]) == (drop.measured, drop.drop, drop.is_kept)
    assert "max_drop=0.08 of val_loss was" in " ".join(capsys.readouterr().out.split())


def test_a_drop_that_is_missed_is_said():
    class Worse(Noisy):
        def on_train_end(self):
            self.trained = True

        def distance(self, batch):
            return super().distance(batch) + 99.0 * getattr(self, "trained", False)

    callback = WeightUnificationCallback(phases=PHASES, **DROP)
    with pytest.warns(UserWarning, match=r"max_drop=0.08 of val_loss was missed: 10\d\.\d+ after \d\.\d+ is a drop of"):
        fit(Worse(), callback, max_epochs=6)
    assert callback.report.drop.is_kept is False


def test_a_metric_of_the_wrong_direction_is_said():
    class Named(Noisy):
        def validation_step(self, batch, batch_idx):
            zeros = sum((p == 0).float().sum() for p in self.layer.parameters())  # the more, the smaller the network
            self.log("val_rmse", zeros, batch_size=len(batch))

    callback = WeightUnificationCallback(phases=PHASES, max_drop=0.1, monitor="val_rmse")
    with pytest.warns(UserWarning, match=r"no compression did any harm: if val_rmse is better where it is smaller"):
        fit(Named(), callback, max_epochs=6)


class Calm(Noisy):
    """Draws no random numbers, so that a resumed run can repeat it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer[3] = nn.Identity()

    def train_dataloader(self):
        data = torch.randn(32, 32, generator=torch.Generator().manual_seed(2))
        return torch.utils.data.DataLoader(data, batch_size=4)

    val_dataloader = train_dataloader


@pytest.mark.filterwarnings(MISSED)
def test_the_metric_that_is_measured_is_that_of_the_file(tmp_path):
    module, path = Calm(), tmp_path / "m.muws"
    callback = WeightUnificationCallback(phases=PHASES, save_to=path, **DROP)
    fit(module, callback, max_epochs=6)

    def measured() -> float:
        with torch.no_grad():
            return sum(float(module.distance(batch)) for batch in list(module.val_dataloader())[:2]) / 2

    trained = module.eval() and measured()
    module.load_state_dict(load_compressed(path))
    assert callback.drop.measured == pytest.approx(trained, rel=1e-6)  # it was trained rounded
    assert callback.drop.measured == pytest.approx(measured(), rel=0.01)


class Steady(Calm):
    """Has no buffer that counts validations: the size of the file, and so its steps, would depend on the count."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n_validated", torch.zeros(()), persistent=False)


@pytest.mark.filterwarnings(PROVIDED, MISSED)
def test_every_checkpoint_leads_to_the_same_bits_and_probes_only_once(tmp_path):
    module, ours = Steady(), WeightUnificationCallback(phases=PHASES, **DROP)
    saver = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
    fit(module, ours, saver, max_epochs=6, enable_checkpointing=True)
    for epoch in range(6):
        resumed, again = Steady(), WeightUnificationCallback(phases=PHASES, **DROP)
        fit(resumed, again, max_epochs=6, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert again.drop == ours.drop, epoch
        assert again.plan == ours.plan
        for name in ("layer.0.weight", "layer.4.weight", "layer.5.weight", "layer.0.bias"):
            assert same_bits(module.get_parameter(name).detach(), resumed.get_parameter(name).detach()), (epoch, name)
        if epoch:
            assert resumed.checked.count(True) <= 4  # the drop is measured at the end, nothing is chosen again


@pytest.mark.filterwarnings(PROVIDED, MISSED)
def test_a_checkpoint_of_another_drop_is_refused_by_name(tmp_path):
    saver = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
    fit(Noisy(), WeightUnificationCallback(phases=PHASES, **DROP), saver, max_epochs=6, enable_checkpointing=True)
    for other in ({"max_drop": 0.4, "monitor": "val_loss"}, {"max_drop": 0.08, "monitor": "-val_loss"}):
        with pytest.raises(
            StateError, match=r"the checkpoint has max_drop=0.08 of monitor='val_loss', and the settings"
        ):
            fit(Noisy(), WeightUnificationCallback(**other), max_epochs=7, ckpt_path=tmp_path / "epoch=2.ckpt")
    with pytest.raises(StateError, match="budget"):
        fit(
            Noisy(),
            WeightUnificationCallback(compression=3.0, phases=PHASES),
            max_epochs=7,
            ckpt_path=tmp_path / "epoch=2.ckpt",
        )


@pytest.mark.filterwarnings(MISSED, "ignore:training ended in the dense phase")
def test_a_run_that_ends_before_the_method_chooses_too():
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    callback = WeightUnificationCallback(phases=PHASES, **DROP)
    fit(Noisy(), callback, Stop(), max_epochs=6)
    callback.verify()
    assert callback.drop.measured is not None


@pytest.mark.filterwarnings(MISSED)
def test_a_second_fit_of_the_model_keeps_the_choice_and_another_model_is_probed_again():
    callback, module = WeightUnificationCallback(phases=PHASES, **DROP), Noisy()
    fit(module, callback, max_epochs=6)
    first = callback.drop
    fit(module, callback, max_epochs=2)
    assert (callback.drop.baseline, callback.drop.probes) == (first.baseline, first.probes)
    other = Noisy()
    with torch.no_grad():
        other.layer[0].weight.mul_(2)
    fit(other, callback, max_epochs=6)
    assert callback.drop.baseline != first.baseline


def test_weights_are_raw_again_if_a_probe_fails():
    class Failing(Noisy):
        def on_validation_start(self):
            if self.trainer.sanity_checking and self.trainer.global_step == 8:
                self.n_probes = getattr(self, "n_probes", 0) + 1
                if self.n_probes == 2:
                    assert any(not same_bytes(self.raw[n], p.detach()) for n, p in self.named_parameters())
                    raise RuntimeError("out of memory")
                self.raw = {name: p.detach().clone() for name, p in self.named_parameters()}

    module = Failing()
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(module, WeightUnificationCallback(phases=PHASES, **DROP), max_epochs=6)
    assert all(same_bytes(module.raw[name], p.detach()) for name, p in module.named_parameters())


@pytest.mark.filterwarnings(MISSED)
@pytest.mark.parametrize("kind", [TQDMProgressBar, RichProgressBar])
def test_progress_bars_and_averages_do_not_take_part(kind):
    callback = WeightUnificationCallback(phases=PHASES, **DROP)
    average = WeightAveraging()
    trainer = fit(Noisy(), kind(), average, callback, max_epochs=6, enable_progress_bar=True, num_sanity_val_steps=0)
    assert callback.drop.measured is not None
    assert {kind, WeightAveraging} <= {type(x) for x in trainer.callbacks}


@pytest.mark.filterwarnings(MISSED)
def test_the_metric_of_one_of_several_dataloaders_can_be_monitored():
    class Several(Noisy):
        def val_dataloader(self):
            return [super().val_dataloader(), super().val_dataloader()]

        def validation_step(self, batch, batch_idx, dataloader_idx):
            self.log("val_loss", self.distance(batch) * (1 + dataloader_idx), batch_size=len(batch))

    callback = WeightUnificationCallback(phases=PHASES, max_drop=0.08, monitor="val_loss/dataloader_idx_1")
    fit(Several(), callback, max_epochs=6)
    assert callback.drop.measured is not None
    with pytest.raises(SettingError, match=r"logs val_loss/dataloader_idx_0, val_loss/dataloader_idx_1; name"):
        fit(Several(), WeightUnificationCallback(phases=PHASES, **DROP), max_epochs=6)


@pytest.mark.parametrize("n_sanity", [0, 2])
def test_what_cannot_be_monitored_is_refused_before_the_first_batch(n_sanity):
    weights = Weights()

    def refused(module, match, **options):
        callback = WeightUnificationCallback(phases=PHASES, **{**DROP, **options.pop("asked", {})})
        with pytest.raises(SettingError, match=match):
            fit(module, weights, callback, max_epochs=6, num_sanity_val_steps=n_sanity, **options)
        assert not weights.seen

    none = "max_drop needs a validation, and this fit has none: give the module a validation_step"
    refused(Noisy(), none, limit_val_batches=0)
    unknown = r"monitor='val_accuracy' is unknown: the validation logs val_loss; name one of them, or log it in"
    refused(Noisy(), unknown, asked={"monitor": "val_accuracy"})

    class Silent(Noisy):
        def validation_step(self, batch, batch_idx):
            pass

    refused(Silent(), "monitor='val_loss' is unknown: the validation logs no metric")

    class Small(TwoLayers):
        def __init__(self):
            super().__init__("adam", 8)

    refused(Small(), "max_drop=0.08 needs a network that can be made at least 2 x smaller: compression=2 cannot be")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_drop": 0.01}, "monitor='' is not allowed: with max_drop, give the name of a metric"),
        ({"monitor": "val_loss"}, "monitor='val_loss' is not allowed: it is for max_drop, so give max_drop too"),
        ({"max_drop": -1, "monitor": "a"}, "max_drop=-1 is not allowed: give how much the metric may drop"),
        (
            {"max_drop": 0.01, "monitor": "a", "compression": 20},
            "max_drop=0.01 and compression=20 contradict each other",
        ),
        (
            {"max_drop": 0.01, "monitor": "a", "structure": MicroStructure(prune_ratio=0.5)},
            "max_drop=0.01 chooses the ratios of each weight, and structure=",
        ),
    ],
)
@pytest.mark.parametrize(
    "kind", [WeightUnificationCallback, lightning_muws.pytorch_lightning.WeightUnificationCallback]
)
def test_settings_that_contradict_each_other_are_refused(kind, given, says):
    with pytest.raises(SettingError) as refused:
        kind(**given)
    assert says in str(refused.value)


class Other(pytorch_lightning.LightningModule):
    """A module of the other namespace."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(32, 96), nn.Tanh(), nn.Linear(96, 64), nn.Linear(64, 4))

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch).square().mean())

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(32, 32), batch_size=8)

    val_dataloader = train_dataloader

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


@pytest.mark.filterwarnings(MISSED, TOO_EASY)
def test_pytorch_lightning_probes_too():
    callback = lightning_muws.pytorch_lightning.WeightUnificationCallback(phases=PHASES, **DROP)
    pytorch_lightning.Trainer(max_epochs=6, callbacks=[callback], **QUIET).fit(Other())
    callback.verify()
    assert callback.drop.measured is not None


class Flat(TwoLayers):
    def __init__(self) -> None:
        super().__init__("sgd", 256)


@pytest.mark.filterwarnings(MISSED, TOO_EASY)
@pytest.mark.parametrize("in_yaml", [False, True])
def test_two_flags_are_enough(in_yaml, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main.py"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6.6 calls what jsonargparse renamed
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    words = ["fit", "--trainer.accelerator=cpu", "--trainer.max_epochs=6", "--trainer.limit_train_batches=4"]
    words += [f"--trainer.{name}=false" for name in off]
    if in_yaml:
        (tmp_path / "config.yaml").write_text("compress: {max_drop: 0.1, monitor: -val_loss}\n")
        words += ["--config", str(tmp_path / "config.yaml")]
    else:
        words += ["--compress.max_drop", "0.1", "--compress.monitor", "val_loss"]
    MuwsCLI(
        Flat, BoringDataModule, args=[*words, f"--compress.save_to={tmp_path / 'm.muws'}"], save_config_callback=None
    )
    assert (tmp_path / "m.muws").stat().st_size < 256 * 36 * 4 / 2


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_choose_the_same_from_the_mean_of_their_metrics(strategy, tmp_path):
    one, two = launch("tests.support.drop_worker", tmp_path, STRATEGY=strategy)
    assert one["last"] != two["last"]
    assert one["drop"] == two["drop"]
    assert one["plan"] == two["plan"]
    assert "open" not in one["plan"]
    assert all(same_bits(x, two["final"][name]) for name, x in one["final"].items())
    assert one["file_ratio"] >= one["drop"]["compression"]
