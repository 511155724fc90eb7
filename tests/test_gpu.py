"""What only a CUDA device can show: the tests of test_exactness, test_callback, test_real and test_ranks, there."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import Net
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_muws import FineTuning, Retraining, WeightUnificationCallback
from lightning_muws import compress as shrink
from tests.support.ddp_worker import CASES
from tests.support.explicit import PHASES, assert_same_after_admm
from tests.support.modules import OPTIMIZERS, STRUCTURE, Probe, TwoLayers, fit
from tests.support.strategies import same_bits
from tests.test_fine_tuning import batches, network
from tests.trainer.test_exactness import ExplicitGan, ExplicitLayers, Fused, Gan, of_one_step
from tests.trainer.test_ranks import launch
from tests.trainer.test_real import Classifier, Recurrent, compress, labelled

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
ON = {"accelerator": "gpu", "devices": 1}


def scaler(scale: float = 256.0) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cuda", torch.amp.GradScaler("cuda", init_scale=scale))


# ---- ADMM


@pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 0.05}, {"accumulate_grad_batches": 3}], ids=str)
@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-mixed", "16-mixed"])
def test_the_injected_penalty_is_the_explicit_one(precision, clip):
    def options():
        return {**ON, **clip, **({"plugins": [scaler()]} if precision == "16-mixed" else {"precision": precision})}

    assert_same_after_admm(TwoLayers(), ExplicitLayers(), options, bound=1e-12 if precision == "64-true" else 1e-5)


def test_a_fused_optimizer_gets_a_scaled_penalty():
    seen = of_one_step(Fused(), scaler(), **ON)
    assert seen["scale"] == 256
    assert (seen["found"] - seen["truth"]).norm() < 2e-3 * seen["truth"].norm()


@pytest.mark.parametrize("clip", [False, True])
def test_each_of_several_optimizers_gets_its_own_penalty(clip):
    assert_same_after_admm(Gan(clip), ExplicitGan(clip), lambda: {**ON, "precision": "64-true"})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("part", [False, True])
def test_compiled_by_inductor(part):
    class Compiled(TwoLayers):
        def __init__(self):
            super().__init__()
            self.layer = torch.compile(self.layer)

    if part:
        callback, module = WeightUnificationCallback(STRUCTURE, phases=PHASES), Compiled()
        probe = Probe(callback)
        fit(module, callback, probe, max_epochs=6, **ON)
        assert probe.n_checked == 2 * 8 * 2
    else:
        assert_same_after_admm(TwoLayers(), ExplicitLayers(), lambda: ON, bound=1e-5, wrap=torch.compile)


# ---- retraining


FAST = {
    **OPTIMIZERS,
    "fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "capturable": lambda p: torch.optim.Adam(p, 1e-2, capturable=True),
}


@pytest.mark.parametrize("unified", ["tied", "frozen"])
@pytest.mark.parametrize("optimizer", FAST)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_the_constraint_holds_after_every_step(unified, optimizer, precision):
    class Module(TwoLayers):
        def configure_optimizers(self):
            return FAST[optimizer](self.parameters())

    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES, retraining=Retraining(unified))
    first, last = Probe(callback), Probe(callback)
    fit(Module(), first, callback, last, max_epochs=7, precision=precision, **ON)
    assert first.n_checked == last.n_checked == 3 * 8 * 2
    callback.verify()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_weights_that_share_one_memory(kind):
    compress(Classifier(Recurrent(kind)), labelled(4, 6, n_words=40), **ON)


def test_channels_last():
    compress(Classifier(Net()).to(memory_format=torch.channels_last), labelled(4, 1, 28, 28), **ON)


# ---- life


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_a_checkpoint_of_the_gpu_goes_on_there_and_on_the_cpu(tmp_path):
    every = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    module, callback = TwoLayers("adam"), WeightUnificationCallback(STRUCTURE, phases=PHASES)
    fit(module, callback, every, max_epochs=6, enable_checkpointing=True, **ON)
    callback.verify()
    for path in sorted(tmp_path.glob("*.ckpt"))[:-1]:
        for where in (ON, {}):
            resumed, again = TwoLayers("adam"), WeightUnificationCallback(STRUCTURE, phases=PHASES)
            probe = Probe(again)
            fit(resumed, again, probe, max_epochs=6, ckpt_path=path, **where)
            again.verify()
            assert probe.n_checked > 0
            for a, b in zip(module.parameters(), resumed.parameters(), strict=True):
                assert where == {} or same_bits(a.detach(), b.detach()), path


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_ranks_over_nccl(tmp_path):
    one, two = launch("tests.support.ddp_worker", tmp_path, ACCELERATOR="gpu")
    for case in CASES:
        for rank in (one, two):
            for name, expected in rank[case]["explicit"].items():
                assert (rank[case]["after admm"][name] - expected).abs().max() <= 1e-12, name
        for name, weight in one[case]["final"].items():
            assert same_bits(weight, two[case]["final"][name]), name
        assert one[case]["checked"] == two[case]["checked"] > 0
    assert one["apart"] == two["apart"]


# ---- Fine-tuning


def test_a_compressed_model_that_was_moved_stays_in_its_blocks_and_on_its_steps():
    small, report = shrink(network(), 12, batches(4))
    tuning = FineTuning(small, report)
    small.cuda()
    optimizer = torch.optim.Adam(small.parameters(), 1e-3)
    tuning.attach(optimizer)
    before = small[0].weight.detach().clone()
    for x in batches(10):
        optimizer.zero_grad()
        small(x.cuda()).square().mean().backward()
        optimizer.step()
        tuning.verify()
    assert not torch.equal(before, small[0].weight.detach())
