"""Soft shrinkage, straight-through and one-shot in real Trainers, against twins in autograd that share no code."""

from typing import ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.func import functional_call

from lightning_muws import Penalty, Phases, WeightUnificationCallback, load_compressed
from lightning_muws.errors import SettingError
from lightning_muws.structure.kinds import Kind
from tests.support.methods_worker import METHODS as ON_RANKS
from tests.support.modules import STRUCTURE, Probe, TwoLayers, fit
from tests.support.strategies import same_bits
from tests.trainer.test_exactness import Gan, scaler_on_cpu
from tests.trainer.test_ranks import launch

TIMES = {"admm_start": 1, "admm_end": 4, "update_every": 1}
COVERED = ("layer.0.weight", "layer.2.weight")
PENALTY = {"soft": Penalty(rho=20, rho_growth=2.0), "straight_through": Penalty()}


def matrix_of(weight: torch.Tensor) -> torch.Tensor:
    """Return the projection onto the blocks and signs that the weight's nearest point has, as a matrix of numbers."""
    support = STRUCTURE.nearest(weight, STRUCTURE.grid).support
    n, index = weight.numel(), torch.arange(weight.numel()).view(weight.shape)
    found = torch.eye(n, dtype=weight.dtype)
    (rows, cols), unified = STRUCTURE.grid.block_shape, 0
    for i in range(support.kinds.shape[0]):
        for j in range(support.kinds.shape[1]):
            block = index[i * rows : (i + 1) * rows, j * cols : (j + 1) * cols].flatten()
            kind = int(support.kinds[i, j])
            if kind != Kind.DENSE:
                found[block, block] = 0.0
            if kind == Kind.UNIFIED:
                signs = 1.0 - 2.0 * support.negative[:, unified].flatten().to(weight.dtype)
                found[block[:, None], block] = signs[:, None] * signs / len(block)
                unified += 1
    return found


class Twin(TwoLayers):
    """Keeps the projection of each weight as a matrix, made anew at the start of each epoch of the method."""

    projections: ClassVar = {}

    def on_train_epoch_start(self) -> None:
        self.projections = {}
        if self.current_epoch:
            self.projections = {name: matrix_of(self.get_parameter(name).detach()) for name in COVERED}


class SoftTwin(Twin):
    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.share = 0.02 * 2 ** max(0, self.current_epoch - 1)

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            for name, projection in self.projections.items():
                w = self.get_parameter(name)
                w += self.share * ((projection @ w.flatten()).view(w.shape) - w)


class StraightTwin(Twin):
    """The loss of the projected weights; the gradient passes the projection, whose derivative autograd never sees."""

    def forward(self, x):
        shown = {}
        for name, projection in self.projections.items():
            w = self.get_parameter(name)
            shown[name.removeprefix("layer.")] = w + ((projection @ w.flatten()).view(w.shape) - w).detach()
        return functional_call(self.layer, shown, (x.to(self.dtype),))


TWINS = {"soft": SoftTwin, "straight_through": StraightTwin}


class Last(L.Callback):
    """Keeps what the method trains, as the last batch before its end left it."""

    def __init__(self, callback=None) -> None:
        self.callback = callback

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.current_epoch < 4:
            self.weights = {name: p.detach().cpu().clone() for name, p in pl_module.named_parameters()}
            method = self.callback._run.method
            for name, left in (getattr(method, "_left", None) or {}).items():
                self.weights[name] += left


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.05}], ids=str)
@pytest.mark.parametrize("optimizer", ["plain", "adam"])
@pytest.mark.parametrize("method", TWINS)
def test_the_method_is_its_twin_in_autograd(method, optimizer, options, monkeypatch):
    # weight decay sees the projected weights in ours, the exact ones in the twin: neither has any
    plain = {"plain": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), "adam": lambda p: torch.optim.Adam(p, 1e-2)}
    monkeypatch.setattr("tests.support.modules.OPTIMIZERS", plain)
    twin, module = TWINS[method](optimizer), TwoLayers(optimizer)
    module.load_state_dict(twin.state_dict())
    callback = WeightUnificationCallback(STRUCTURE, phases=Phases(**TIMES, method=method), penalty=PENALTY[method])
    last = Last(callback)
    fit(module, last, callback, max_epochs=5, precision="64-true", **options)
    fit(twin, max_epochs=4, precision="64-true", **options)
    assert len(callback.history) == 3
    for name, parameter in twin.named_parameters():
        assert (last.weights[name] - parameter.detach()).abs().max() < 1e-10, name
    assert all(0 < update.primal < 1 for update in callback.history)


def test_straight_through_computes_inside_the_structure_at_every_step():
    callback = WeightUnificationCallback(STRUCTURE, phases=Phases(**TIMES, method="straight_through"))
    seen = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            if callback.phase == "straight_through":
                choices = callback._run.method.choices()
                seen.extend(choices[name][0].error(pl_module.get_parameter(name)) for name in COVERED)

    fit(TwoLayers("adam"), callback, Look(), max_epochs=5)
    assert seen == [0.0] * 2 * 3 * 8


def test_soft_shrinkage_comes_near_and_keeps_dense_blocks():
    found = {}
    for rho in (0.001, 100):
        callback = WeightUnificationCallback(STRUCTURE, phases=Phases(**TIMES, method="soft"), penalty=Penalty(rho=rho))
        fit(TwoLayers("adam"), callback, max_epochs=5)
        found[rho] = [update.primal for update in callback.history]
    assert found[100] == sorted(found[100], reverse=True)
    assert found[100][-1] < 0.5 * found[0.001][-1]


def test_one_shot_is_one_projection_of_dense_training():
    trained = []
    for phases in (Phases(admm_start=1, admm_end=3, method="one_shot"), Phases(admm_start=3, admm_end=3)):
        module, callback = TwoLayers("adam"), WeightUnificationCallback(STRUCTURE, phases=phases)
        fit(module, callback, max_epochs=5)
        assert [update.when for update in callback.history] == [3]
        trained.append(module)
    for a, b in zip(*(module.parameters() for module in trained), strict=True):
        assert same_bits(a.detach(), b.detach())


def test_methods_follow_each_other_in_equal_times():
    phases = Phases(admm_start=1, admm_end=5, update_every=1, method="straight_through+soft+admm")
    callback = WeightUnificationCallback(STRUCTURE, phases=phases, penalty=Penalty(rho=0.5))
    found = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if callback.phase not in ("dense", "retraining"):
                found.append(type(callback._run.method._method).__name__)

    fit(TwoLayers("adam"), callback, Look(), max_epochs=6, limit_train_batches=6)
    assert found == ["StraightThrough"] * 8 + ["SoftShrinkage"] * 8 + ["Admm"] * 8
    callback.verify()


class Adversaries(Gan):
    def __init__(self) -> None:
        super().__init__(clip=True)


MODES = {
    "plain": (lambda: TwoLayers("adam"), dict),
    "sgd": (lambda: TwoLayers("sgd"), dict),
    "accumulation and clipping": (
        lambda: TwoLayers("adam"),
        lambda: {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1},
    ),
    "manual": (Adversaries, dict),
    "bf16-mixed": (lambda: TwoLayers("adam"), lambda: {"precision": "bf16-mixed"}),
    "bf16-true": (lambda: TwoLayers("adam"), lambda: {"precision": "bf16-true"}),
    "16-mixed": (lambda: TwoLayers("adam"), lambda: {"plugins": [scaler_on_cpu()]}),
    "compiled": (lambda: torch.compile(TwoLayers("adam"), backend="aot_eager"), dict),
}
NAMES = ("soft", "straight_through", "one_shot", "straight_through+admm")


@pytest.mark.filterwarnings(
    "ignore:.*callbacks used to create the checkpoint need to be provided",
    "ignore:.*`torch.jit.script_method` is deprecated",
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", NAMES)
def test_every_mode_ends_inside_the_structure_and_resumes_bit_for_bit(method, mode, tmp_path):
    make, options = MODES[mode]

    def callback():
        phases = Phases(admm_start=1, admm_end=5, update_every=0.5, method=method)
        return WeightUnificationCallback(STRUCTURE, phases=phases, save_to=tmp_path / "m.muws")

    module, whole = make(), callback()
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(module, whole, probe := Probe(whole), saving, max_epochs=6, enable_checkpointing=True, **options())
    whole.verify()
    assert probe.n_checked
    loaded = load_compressed(tmp_path / "m.muws")
    assert all(same_bits(p.detach(), loaded[name.removeprefix("_orig_mod.")]) for name, p in module.named_parameters())
    for epoch in (1, 2, 3, 4):
        again, resumed = make(), callback()
        fit(again, resumed, max_epochs=6, ckpt_path=tmp_path / f"epoch={epoch}.ckpt", **options())
        assert resumed.history == whole.history
        for a, b in zip(module.parameters(), again.parameters(), strict=True):
            assert same_bits(a.detach(), b.detach()), epoch


def test_checkpoints_hold_plain_values(tmp_path):
    phases = Phases(**TIMES, method="straight_through")
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    callback = WeightUnificationCallback(STRUCTURE, phases=phases)
    fit(TwoLayers(), callback, saving, max_epochs=5, enable_checkpointing=True)
    state = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["callbacks"]["WeightUnificationCallback"]["run"]
    assert state["phase"] == "straight_through"
    assert set(state["method"]) == {"rho", "weights", "left"}


class Averaging(torch.optim.ASGD):
    """Keeps an average of each weight beside it."""


class WithPoints(TwoLayers):
    def configure_optimizers(self):
        return Averaging(self.parameters(), 0.01)


def test_straight_through_refuses_optimizers_that_keep_points():
    callback = WeightUnificationCallback(STRUCTURE, phases=Phases(**TIMES, method="straight_through"))
    with pytest.raises(SettingError, match="method='straight_through' with Averaging, which keeps other values"):
        fit(WithPoints(), callback, max_epochs=5)


@pytest.mark.parametrize("method", ["", "admm+", "one_shot+admm", "admm soft", None, 3, ["admm"]])
def test_what_is_no_method_is_refused(method):
    with pytest.raises(
        SettingError, match=r"give 'auto', 'admm', 'soft', 'straight_through' or 'one_shot', or several"
    ):
        Phases(method=method)


@pytest.mark.parametrize("setting", [{"balance": "network"}, {"relative": False}], ids=str)
def test_what_only_admm_uses_is_refused_without_it(setting):
    with pytest.raises(SettingError, match="has no effect with method='soft': leave it out"):
        WeightUnificationCallback(STRUCTURE, phases=Phases(method="soft"), penalty=Penalty(**setting))
    WeightUnificationCallback(STRUCTURE, phases=Phases(method="soft+admm"), penalty=Penalty(**setting))


@pytest.mark.parametrize("method", ["one_shot", "straight_through", "straight_through+straight_through"])
def test_a_penalty_without_effect_is_refused(method):
    with pytest.raises(SettingError, match=r"penalty.rho=0.5 has no effect with method=.*: leave it out"):
        WeightUnificationCallback(STRUCTURE, phases=Phases(method=method), penalty=Penalty(rho=0.5))


# ---- two processes


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    return launch("tests.support.methods_worker", tmp_path_factory.mktemp("ddp"), SHARDED="0")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return launch("tests.support.methods_worker", tmp_path_factory.mktemp("fsdp"), SHARDED="1")


@pytest.mark.slow
@pytest.mark.parametrize("method", ON_RANKS)
def test_ranks_hold_the_same_bits_and_shards_choose_what_replicas_choose(method, replicas, shards):
    for one, two in (replicas, shards):
        assert one[method]["history"] == two[method]["history"]
        for name, weight in one[method]["weights"].items():
            assert same_bits(weight, two[method]["weights"][name]), name
    state = load_compressed(shards[0][method]["file"])
    for name, weight in shards[1][method]["weights"].items():
        assert same_bits(state[name], weight), name
        torch.testing.assert_close(weight, replicas[0][method]["weights"][name], rtol=1e-4, atol=1e-5)
    for name, kinds in replicas[0][method]["kinds"].items():
        assert torch.equal(kinds, shards[0][method]["kinds"][name])
