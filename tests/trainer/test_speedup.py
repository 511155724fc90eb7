"""speedup=: the callback chooses shapes and ratios from times, measured once and the same on all ranks."""

import random

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_muws import LayerRule, MicroStructure, Phases, WeightUnificationCallback, accelerate, load_compressed
from lightning_muws.errors import MuwsError, SettingError, StateError
from lightning_muws.trainer import measuring
from lightning_muws.training.budget import KEPT
from tests.support.clocks import fake_times
from tests.support.explicit import PHASES
from tests.support.modules import Probe, TwoLayers, fit
from tests.support.strategies import same_bits, same_bytes
from tests.trainer.test_ranks import launch

PROVIDED = "ignore:.*callbacks used to create the checkpoint need to be provided"


class Net(TwoLayers):
    """A small convolutional network, whose forward takes the first part of a batch."""

    def __init__(self) -> None:
        super().__init__("adam")
        torch.manual_seed(0)  # how coarse its choices are depends on its weights
        self.layer = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 9, 24), nn.Linear(24, 4),
        )  # fmt: skip

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        return {"loss": self.loss(self(batch[0]))}

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self(batch[0])), on_epoch=True, batch_size=len(batch[0]))

    def train_dataloader(self):
        images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(2))
        data = torch.utils.data.TensorDataset(images, torch.zeros(32, dtype=torch.long))
        return torch.utils.data.DataLoader(data, batch_size=4)

    def val_dataloader(self):
        return torch.utils.data.DataLoader([(torch.ones(1, 8, 8), 0)] * 8, batch_size=4)


class Timer:
    """Counts its calls and keeps what it was given."""

    def __init__(self, speed=1.0) -> None:
        self.examples, self.speed = [], speed

    def __call__(self, module, example_input, entries, say):
        self.examples.append(example_input)
        return fake_times(module, example_input, entries, say, speed=self.speed)


def callback(timer=None, speedup=2.0, phases=PHASES, **settings):
    made = WeightUnificationCallback(speedup=speedup, phases=phases, **settings)
    made.timer = timer or Timer()
    return made


@pytest.mark.parametrize("speedup", [1.2, 2, 3.5])
@pytest.mark.parametrize("phases", [PHASES, Phases(admm_start=1, admm_end=1), Phases(interval="step", admm_start=4)])
def test_the_network_is_predicted_to_be_as_fast_as_requested(speedup, phases, tmp_path, capsys):
    module, ours, timer = Net(), None, Timer()
    ours = callback(timer, speedup, phases, save_to=tmp_path / "m.muws")
    probe = Probe(ours)
    fit(module, ours, probe, max_epochs=6)
    ours.verify()
    assert probe.n_checked > 0
    assert len(timer.examples) == 1
    assert speedup <= ours.report.predicted_speedup <= 1.1 * speedup
    assert f"Predicted: {ours.report.predicted_speedup:.2f} times as fast" in " ".join(capsys.readouterr().out.split())
    chosen = {name: entry.structure for name, entry in ours.plan.covered.items()}
    times = fake_times(None, None, {e.name: e for e in ours.plan.entries if len(e.shape) > 1})
    assert times.speedup(chosen) == pytest.approx(ours.report.predicted_speedup)
    for layer in ours.report.layers:
        entry = ours.plan.covered[layer.name]
        assert entry.grid.block_shape == entry.structure.block_shape == layer.block_shape
        assert layer.block_shape in {(4, 1), (2, 4)}
        assert list(entry.structure.counts(entry.grid, entry.shape).values()) == [
            layer.n_dense, layer.n_unified, layer.n_pruned,
        ]  # fmt: skip
        assert layer.n_pruned > 0
    state = load_compressed(tmp_path / "m.muws")
    assert all(same_bits(x, module.state_dict()[name]) for name, x in state.items())


def test_layers_that_gain_nothing_stay_dense_and_the_plan_has_the_reason():
    class First(Timer):
        def __call__(self, module, example_input, entries, say):
            times = super().__call__(module, example_input, entries, say)
            del times.layers["layer.7.weight"]  # not reached
            return times

    ours = callback(First(), 1.5)
    fit(Net(), ours, max_epochs=6)
    assert ours.plan.left_out["layer.7.weight"].reason == KEPT
    ours.verify()


@pytest.mark.filterwarnings(PROVIDED)
def test_every_checkpoint_leads_to_the_same_bits_whatever_the_clock_says_then(tmp_path):
    module, ours = Net(), callback()
    saver = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
    fit(module, ours, saver, max_epochs=6, enable_checkpointing=True)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 6
    for path in paths:
        chosen = (
            torch.load(path, weights_only=True)["callbacks"]["WeightUnificationCallback"]["run"]["phase"] != "dense"
        )
        timer = Timer(speed=3.0 if chosen else 1.0)
        resumed, again = Net(), callback(timer)
        fit(resumed, again, max_epochs=6, ckpt_path=path)
        assert len(timer.examples) == (not chosen)  # a choice that was made is not made again
        assert again.plan == ours.plan
        assert again.report.predicted_speedup == ours.report.predicted_speedup
        assert all(same_bytes(x, resumed.state_dict()[name]) for name, x in module.state_dict().items()), path


@pytest.mark.filterwarnings(PROVIDED)
def test_a_checkpoint_of_another_speedup_is_refused_by_name(tmp_path):
    saver = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
    fit(Net(), callback(), saver, max_epochs=6, enable_checkpointing=True)
    with pytest.raises(StateError, match=r"budget speedup is 2\.0 in the checkpoint and 3 in the settings"):
        fit(Net(), callback(speedup=3), max_epochs=7, ckpt_path=tmp_path / "epoch=3.ckpt")


def test_a_second_fit_goes_on_with_the_choice_of_the_first():
    module, timer = Net(), Timer()
    ours = callback(timer)
    fit(module, ours, max_epochs=6)
    plan = ours.plan
    fit(module, ours, max_epochs=2)
    assert ours.plan == plan
    assert len(timer.examples) == 1
    fit(Net(), ours, max_epochs=6)  # another model: measured again
    assert len(timer.examples) == 2


def test_a_run_that_ends_in_its_dense_phase_gets_the_speed_too():
    ours = callback(phases=Phases(admm_start=2, admm_end=4))
    with pytest.warns(UserWarning, match="training ended in the dense phase"):
        fit(Net(), StopEarly(), ours, max_epochs=6)
    assert ours.report.predicted_speedup >= 2
    ours.verify()


class StopEarly(L.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        trainer.should_stop = True


def test_rules_hold():
    fixed = MicroStructure((4, 4), prune_ratio=0.5)
    rules = [
        LayerRule("layer.0.*", skip=True),
        LayerRule("layer.6.*", structure=fixed),
    ]
    ours = callback(speedup=1.3, rules=rules)
    fit(Net(), ours, max_epochs=6)
    assert "layer.0.weight" in ours.plan.left_out
    assert ours.plan.covered["layer.6.weight"].structure == fixed


# The input that is timed


def test_the_example_of_the_module_comes_first():
    for example in (torch.ones(3, 1, 8, 8), (torch.ones(3, 1, 8, 8),), {"x": torch.ones(3, 1, 8, 8)}):
        module, timer = Net(), Timer()
        module.example_input_array = example
        fit(module, callback(timer), max_epochs=6)
        assert type(timer.examples[0]) is type(example)


def test_without_one_it_is_the_first_sample_of_the_training_data():
    module, timer = Net(), Timer()
    fit(module, callback(timer), max_epochs=6)
    ((found,),) = timer.examples
    assert torch.equal(found, module.train_dataloader().dataset[0][0][None])


class ByName(Net):
    """Takes a batch by keyword, as networks of Hugging Face do."""

    def forward(self, x, label=None):
        return super().forward(x)

    def training_step(self, batch, batch_idx):
        return {"loss": self.loss(self(**batch))}

    validation_step = None

    def train_dataloader(self):
        data = [{"x": torch.ones(1, 8, 8) * i, "label": i} for i in range(32)]
        return torch.utils.data.DataLoader(data, batch_size=4)


class Whole(Net):
    """Has a dataset of whole batches, and a forward that takes all parts of one."""

    def forward(self, x, y):
        return super().forward(x) + y[:, None]

    def training_step(self, batch, batch_idx):
        return {"loss": self.loss(self(*batch))}

    validation_step = None

    def train_dataloader(self):
        return torch.utils.data.DataLoader([(torch.ones(4, 1, 8, 8), torch.ones(4))] * 8, batch_size=None)


@pytest.mark.filterwarnings("ignore:.*have no `validation_step`")
def test_batches_by_name_and_whole_batches_are_cut_to_one_sample():
    timer = Timer()
    fit(ByName(), callback(timer), max_epochs=6)
    assert timer.examples[0].keys() == {"x", "label"}
    assert timer.examples[0]["x"].shape == (1, 1, 8, 8)
    timer = Timer()
    fit(Whole(), callback(timer), max_epochs=6)
    assert [tuple(x.shape) for x in timer.examples[0]] == [(1, 1, 8, 8), (1,)]


class Manual(Net):
    """Steps by itself and clips between."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(self(batch[0])))
        self.clip_gradients(optimizer, 1.0, "norm")
        optimizer.step()


def test_a_module_that_steps_by_itself_is_timed_too():
    ours = callback()
    fit(Manual(), ours, max_epochs=6)
    ours.verify()
    assert ours.report.predicted_speedup >= 2


class Streamed(Net):
    def train_dataloader(self):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter([(torch.ones(1, 8, 8), 0)] * 32)

        return torch.utils.data.DataLoader(Stream(), batch_size=4)


class Deaf(Net):
    def forward(self, x):
        if not self.training:
            raise RuntimeError("no")
        return super().forward(x)

    def validation_step(self, *_):
        pass


class Broken(Net):
    def train_dataloader(self):
        class Data(torch.utils.data.Dataset):
            def __len__(self):
                return 32

            def __getitem__(self, index):
                if index == 0:
                    raise KeyError("no such file")
                return torch.ones(1, 8, 8), 0

        return torch.utils.data.DataLoader(Data(), batch_size=4, sampler=range(1, 32))


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Streamed, "the training data has no first sample to time the layers with"),
        (Deaf, "forward takes no part of a training sample"),
        (Broken, r"the first sample of the training data cannot be read \(KeyError\('no such file'\)\)"),
    ],
)
def test_without_an_input_fit_is_refused_with_what_to_do(module, why):
    made = module()
    before = {name: x.clone() for name, x in made.state_dict().items()}
    with pytest.raises(SettingError, match=f"{why}.*set example_input_array in the LightningModule"):
        fit(made, callback(), max_epochs=6, num_sanity_val_steps=0)
    assert all(same_bytes(x, before[name]) for name, x in made.state_dict().items())


def test_looking_for_an_input_changes_neither_the_module_nor_random_numbers():
    class Noisy(Net):
        def train_dataloader(self):
            class Data(torch.utils.data.Dataset):
                def __len__(self):
                    return 32

                def __getitem__(self, index):
                    return torch.randn(1, 8, 8) + random.random(), 0  # noqa: S311

            return torch.utils.data.DataLoader(Data(), batch_size=4, shuffle=True)

    finals = []
    for with_example in (False, True):
        torch.manual_seed(0)
        module = Noisy()
        if with_example:
            module.example_input_array = torch.ones(1, 1, 8, 8)
        fit(module, callback(), max_epochs=6)
        finals.append(module.state_dict())
    assert all(same_bytes(x, finals[1][name]) for name, x in finals[0].items())


# Refusals


@pytest.mark.parametrize("wrong", [1, 0.5, -1, float("nan"), float("inf"), True, "2"])
def test_a_speedup_that_is_none_is_refused(wrong):
    with pytest.raises(SettingError, match=r"speedup=.* is not allowed: give a finite number above 1, such as 2"):
        WeightUnificationCallback(speedup=wrong)


def test_what_cannot_be_reached_is_refused_at_the_start_of_fit():
    module = Net()
    before = {name: x.clone() for name, x in module.state_dict().items()}
    with pytest.raises(SettingError, match=r"speedup=900 cannot be reached on this machine.*allow 1 to [\d.]+, so ask"):
        fit(module, callback(speedup=900), max_epochs=6, num_sanity_val_steps=0)
    assert all(same_bytes(x, before[name]) for name, x in module.state_dict().items())


def test_a_timer_that_fails_says_what_it_said():
    def broken(*_):
        raise MuwsError("no clock")

    with pytest.raises(MuwsError, match="no clock"):
        fit(Net(), callback(broken), max_epochs=6)


def test_sharded_weights_are_refused_before_anything_is_timed(monkeypatch):
    monkeypatch.setattr(measuring, "is_sharded", lambda parameter: True)
    timer = Timer()
    with pytest.raises(
        SettingError, match=r"speedup cannot be measured with sharded weights, such as layer\.0\.weight"
    ):
        fit(Net(), callback(timer), max_epochs=6)
    assert timer.examples == []


@pytest.mark.slow
def test_real_times_lead_to_a_network_that_accelerate_takes():
    torch.manual_seed(0)
    module, ours = Net(), WeightUnificationCallback(speedup=1.01, phases=PHASES)
    try:
        fit(module, ours, max_epochs=6)
    except SettingError as error:  # so small a network may gain nothing here
        assert "cannot be reached on this machine" in str(error)  # noqa: PT017
        return
    ours.verify()
    x = torch.ones(1, 1, 8, 8)
    fast, _ = accelerate(module.layer.eval(), x)
    torch.testing.assert_close(fast(x), module.layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_ranks_agree_although_their_clocks_differ(tmp_path):
    one, two = launch("tests.support.speedup_worker", tmp_path)
    assert one["plan"] == two["plan"]
    assert "open" not in one["plan"]
    assert one["predicted"] == two["predicted"] >= 2
    assert (one["timed"], two["timed"]) == (1, 0)  # the first rank measures for all
    for name, x in one["final"].items():
        assert same_bits(x, two["final"][name]), name
    assert one["refused"] == two["refused"]
    assert "cannot be reached on this machine" in one["refused"]
    assert one["failed"].startswith("ValueError: no clock here")
    assert two["failed"].startswith("SettingError: no clock here")
