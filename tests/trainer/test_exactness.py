"""The injected penalty is the explicit one wherever Lightning trains: precisions, compiled, manual, many optimizers."""

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_muws import MicroStructure, Phases, WeightUnificationCallback
from tests.support.explicit import PENALTY, PHASES, Explicit, assert_same_after_admm
from tests.support.modules import STRUCTURE, TwoLayers, fit


class ExplicitLayers(Explicit, TwoLayers):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)["loss"] + self.penalty()


def scaler_on_cpu(scale: float = 256.0) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


@pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 0.05}, {"accumulate_grad_batches": 3}], ids=str)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_in_single_and_mixed_precision(precision, clip):
    def options():
        return clip | ({"plugins": [scaler_on_cpu()]} if precision == "16-mixed" else {"precision": precision})

    assert_same_after_admm(TwoLayers(), ExplicitLayers(), options, bound=1e-6)


class Fused(TwoLayers):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2, fused=True)


def of_one_step(module: L.LightningModule, scaler: MixedPrecision, **options) -> dict[str, torch.Tensor]:
    """Return the gradient that a step in ADMM gets, without the scaler's scale, and the true one."""
    # Adam turns a rounding error of a small gradient into a full step, so the gradients of one step are compared.
    seen = {}

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if callback.phase == "admm" and not seen:
                seen["scale"] = trainer.precision_plugin.scaler.get_scale()
                weight, admm = pl_module.layer[0].weight, callback._run.method
                loss = pl_module.loss(pl_module(batch["x"]))
                difference = weight - admm.z("layer.0.weight") + admm.u("layer.0.weight")
                loss = loss + admm.rho / 2 * difference.square().sum()
                seen["truth"] = torch.autograd.grad(loss, weight)[0]
                seen["found"] = weight.grad / seen["scale"]

        def on_train_batch_start(self, trainer, pl_module, batch_, batch_idx):
            batch["x"] = batch_

    batch = {}
    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES, penalty=PENALTY)
    fit(module, callback, Look(), max_epochs=5, plugins=[scaler], **options)
    return seen


def test_a_fused_optimizer_gets_a_scaled_penalty():
    seen = of_one_step(Fused(), scaler_on_cpu())
    assert seen["scale"] == 256
    # the loss ran in float16
    assert (seen["found"] - seen["truth"]).norm() < 2e-3 * seen["truth"].norm()


def test_steps_that_a_scaler_skips_change_nothing():
    scalers = []

    def options():
        scalers.append(scaler_on_cpu(2.0**30))  # overflows until it has been halved often enough
        return {"plugins": [scalers[-1]]}

    assert_same_after_admm(TwoLayers(), ExplicitLayers(), options, bound=1e-6)
    assert all(scaler.scaler.get_scale() < 2.0**20 for scaler in scalers)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_module_is_the_same():
    def compiled(module):
        return torch.compile(module, backend="aot_eager")

    assert_same_after_admm(TwoLayers(), ExplicitLayers(), bound=1e-6, wrap=compiled)


class Wrapped(TwoLayers):
    def __init__(self):
        super().__init__()
        self.layer = torch.compile(self.layer, backend="aot_eager")


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_part_keeps_its_names_clean():
    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES)
    fit(Wrapped(), callback, max_epochs=5)
    assert list(callback.supports) == ["layer.0.weight", "layer.2.weight"]


# ---- manual optimization


class Gan(TwoLayers):
    """Two optimizers stepped by hand, one of them every second batch; ``clip`` clips for itself."""

    def __init__(self, clip: bool = False):
        super().__init__()
        self.automatic_optimization = False
        self.layer = None
        self.clip = clip
        self.generator = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 32))
        self.critic = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4))

    def penalty(self, *_):
        return 0.0

    def forward(self, x):
        return self.critic(self.generator(x.to(self.dtype)))

    def training_step(self, batch, batch_idx):
        generator, critic = self.optimizers()
        batch = batch.to(self.dtype)
        if batch_idx % 2 == 0:
            loss = self.critic(self.generator(batch)).square().mean() + self.penalty("generator")
            self.step(generator, loss)
        loss = (self.critic(batch) - 1).square().mean() + self.critic(self.generator(batch).detach()).square().mean()
        self.step(critic, loss + self.penalty("critic"))

    def step(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.clip:
            self.clip_gradients(optimizer, gradient_clip_val=0.02, gradient_clip_algorithm="norm")
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.generator.parameters(), 0.1, momentum=0.9), torch.optim.Adam(
            self.critic.parameters(), 1e-2
        )


class ExplicitGan(Explicit, Gan):
    covered = ("generator.0.weight", "generator.2.weight", "critic.0.weight", "critic.2.weight")


@pytest.mark.parametrize("clip", [False, True])
def test_each_of_several_optimizers_gets_its_own_penalty(clip):
    assert_same_after_admm(Gan(clip), ExplicitGan(clip), lambda: {"precision": "64-true"})


@pytest.mark.parametrize("clip", [False, True])
def test_several_optimizers_in_mixed_precision(clip):
    # a module that clips without unscaling clips the scaled gradient: a small scale lets it move
    assert_same_after_admm(Gan(clip), ExplicitGan(clip), lambda: {"plugins": [scaler_on_cpu(4.0)]}, bound=1e-5)


def test_nothing_is_left_on_a_module_that_clips():
    module, plain = Gan(clip=True), Gan(clip=True)
    fit(plain, max_epochs=5)
    fit(module, WeightUnificationCallback(STRUCTURE, phases=PHASES), max_epochs=5)
    assert set(module.__dict__) == set(plain.__dict__)


def test_steps_of_several_optimizers_count_as_one_batch():
    callback = WeightUnificationCallback(STRUCTURE, phases=Phases("step", 4, 20, 8))
    fit(Gan(), callback, max_epochs=4)
    assert [update.when for update in callback.history] == [12, 20]


def test_bf16_penalties_are_rounded_once():
    module = TwoLayers().bfloat16()
    callback = WeightUnificationCallback(MicroStructure((2, 4), 0.5, 0.25), phases=PHASES, penalty=PENALTY)
    seen = {}

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if callback.phase == "admm" and callback.history and not seen:
                weight, admm = pl_module.layer[0].weight, callback._run.method
                before = weight.grad.clone()
                weight.grad = torch.zeros_like(weight)
                admm.before_step({"layer.0.weight": weight})
                seen["found"] = weight.grad.double()
                z, u = admm.z("layer.0.weight").double(), admm.u("layer.0.weight").double()
                seen["truth"] = admm.rho * (weight.detach().double() - z + u)
                weight.grad = before

    fit(module, callback, Look(), max_epochs=5, precision="bf16-true")
    difference = (seen["found"] - seen["truth"]).norm() / seen["truth"].norm()
    assert difference < 4e-3  # half a unit in the last place of bfloat16
