"""Rounding in retraining, in real Trainers: the file holds what the Trainer trained, and every mode keeps it so."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

from lightning_muws import Phases, WeightUnificationCallback, load_compressed
from lightning_muws.errors import StateError
from tests.support.explicit import PHASES
from tests.support.modules import fit
from tests.support.strategies import same_bytes
from tests.trainer.test_compression import PROVIDED, Wide, raw_bytes

SMALL = {"compression": 12, "phases": PHASES}


class NoNorm(Wide):
    """Without buffers, so that the file holds all of it without loss."""

    def __init__(self, optimizer: str = "adam") -> None:
        super().__init__(optimizer)
        self.layer = torch.nn.Sequential(
            torch.nn.Linear(32, 384), torch.nn.Tanh(), torch.nn.Linear(384, 160), torch.nn.Linear(160, 4)
        )


class Manual(NoNorm):
    """Steps two optimizers by hand, one of them only every second batch, and clips."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        loss = self.loss(self(batch))
        self.manual_backward(loss)
        self.clip_gradients(first, gradient_clip_val=0.5)
        first.step()
        first.zero_grad()
        if batch_idx % 2:
            second.step()
            second.zero_grad()
        return loss

    def configure_optimizers(self):
        return [torch.optim.Adam(self.layer[0].parameters(), 1e-2), torch.optim.SGD(self.layer[2:].parameters(), 0.05)]


class Watch(L.Callback):
    """Checks after each batch that every rounded parameter is a whole multiple of its step."""

    def __init__(self, callback) -> None:
        self.callback, self.n_checked, self.shown = callback, 0, []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        rounding = self.callback._run.rounding
        for name, step in rounding.steps.items() if rounding else ():
            steps = pl_module.get_parameter(name).detach().double() / step
            assert (steps - steps.round()).abs().max() < 1e-3, name
            self.n_checked += 1

    def on_train_batch_start(self, trainer, pl_module, *_) -> None:
        if self.callback._run.rounding:
            self.shown.append(pl_module.layer[0].weight.detach().clone())


MODES = {
    "plain": (NoNorm, {}),
    "sgd": (lambda: NoNorm("sgd"), {}),
    "accumulation and clipping": (NoNorm, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}),
    "manual": (Manual, {}),
    "bf16-mixed": (NoNorm, {"precision": "bf16-mixed"}),
    "steps": (NoNorm, {"phases": Phases("step", 4, 16, 4, round_start=0.6)}),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_file_holds_what_the_trainer_trained(mode, tmp_path):
    make, options = MODES[mode]
    module, path = make(), tmp_path / "m.muws"
    options = dict(options)
    callback = WeightUnificationCallback(**SMALL | {"phases": options.pop("phases", PHASES)}, save_to=path)
    watch = Watch(callback)
    fit(module, callback, watch, max_epochs=6, **options)
    callback.verify()
    assert watch.n_checked > 0
    assert any(not torch.equal(a, b) for a, b in zip(watch.shown, watch.shown[1:], strict=False))  # it still trains
    loaded = load_compressed(path)
    assert all(same_bytes(x, loaded[name]) for name, x in module.state_dict().items())
    assert 12 <= raw_bytes(module) / path.stat().st_size <= 12 * 1.2


@pytest.mark.filterwarnings(PROVIDED)
def test_every_checkpoint_leads_to_the_same_bits_and_the_same_file(tmp_path):
    module, ours = NoNorm(), WeightUnificationCallback(**SMALL, save_to=tmp_path / "m.muws")
    saver = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
    fit(module, ours, saver, max_epochs=6, enable_checkpointing=True)
    paths = sorted(tmp_path.glob("*.ckpt"))
    rounded = 0
    for i, path in enumerate(paths):
        resumed, again = NoNorm(), WeightUnificationCallback(**SMALL, save_to=tmp_path / f"{i}.muws")
        fit(resumed, again, max_epochs=6, ckpt_path=path)
        assert all(same_bytes(x, resumed.state_dict()[name]) for name, x in module.state_dict().items()), path
        assert (tmp_path / f"{i}.muws").read_bytes() == (tmp_path / "m.muws").read_bytes()
        state = torch.load(path, weights_only=True)["callbacks"]
        rounded += any("rounding" in s.get("run", {}) for s in state.values() if isinstance(s, dict))
    assert rounded == 2


def test_a_second_fit_goes_on_with_rounded_weights(tmp_path):
    module, path = NoNorm(), tmp_path / "m.muws"
    callback = WeightUnificationCallback(**SMALL, save_to=path)
    fit(module, callback, max_epochs=6)
    first = {name: x.clone() for name, x in module.state_dict().items()}
    fit(module, callback, max_epochs=3)
    callback.verify()
    assert any(not torch.equal(x, first[name]) for name, x in module.state_dict().items())
    loaded = load_compressed(path)
    assert all(same_bytes(x, loaded[name]) for name, x in module.state_dict().items())


def test_what_changes_a_bias_is_found(tmp_path):
    module = NoNorm()
    callback = WeightUnificationCallback(**SMALL)
    fit(module, callback, max_epochs=6)
    with torch.no_grad():
        module.layer[0].bias.add_(0.3 * callback._run.rounding.steps["layer.0.bias"])
    with pytest.raises(StateError, match=r"layer.0.bias is not what the file would hold, whole multiples of"):
        callback.verify()


@pytest.mark.parametrize("how", ["never", "averaged"])
def test_nothing_is_rounded_where_it_is_not_wanted_or_would_be_averaged(how, tmp_path):
    module, path = NoNorm(), tmp_path / "m.muws"
    phases = Phases(admm_start=1, admm_end=4, update_every=1, round_start=1.0) if how == "never" else PHASES
    callback = WeightUnificationCallback(compression=12, phases=phases, save_to=path)
    others = [WeightAveraging()] if how == "averaged" else []
    fit(module, callback, *others, max_epochs=6)
    assert callback._run.rounding is None
    callback.verify()
    assert raw_bytes(module) / path.stat().st_size >= 12
    loaded = load_compressed(path)
    assert not torch.equal(loaded["layer.0.weight"], module.layer[0].weight)


def test_the_callback_lets_go_of_the_trainer():
    callback = WeightUnificationCallback(**SMALL)
    fit(NoNorm(), callback, max_epochs=6)
    assert callback._run.stepper is None
