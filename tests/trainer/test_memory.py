"""What a run keeps in memory beside the network, its gradients and moments: all tensors alive, counted."""

import gc

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_muws import MicroStructure, Retraining, WeightUnificationCallback
from tests.support.explicit import PHASES
from tests.support.modules import TwoLayers, fit

STRUCTURE = MicroStructure(prune_ratio=0.8, unify_ratio=0.1)


class Wide(TwoLayers):
    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        self.layer = nn.Sequential(nn.Linear(32, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 8))


class Scheduled(Wide):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


class Count(Callback):
    """Counts the bytes beside network, gradients and moments, at the last batch of each epoch and in validation."""

    def __init__(self) -> None:
        self.after_step, self.in_validation = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 7:
            self.after_step.append(n_bytes_beside(trainer))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 1:
            self.in_validation.append(n_bytes_beside(trainer))


def n_bytes_beside(trainer) -> int:
    gc.collect()
    # by type: isinstance would wake what other packages import lazily
    alive = storages(x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter))
    parameters = list(trainer.lightning_module.parameters())
    moments = [x for state in trainer.optimizers[0].state.values() for x in state.values()]
    known = storages([*parameters, *moments, *(p.grad for p in parameters if p.grad is not None)])
    return sum(size for place, size in alive.items() if place not in known)


def storages(tensors) -> dict[int, int]:
    return {s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in tensors)}


@pytest.fixture
def _nothing_older():
    """Lets gc.get_objects see only what is made from here on."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_nothing_older")
@pytest.mark.parametrize("kind", [Wide, Scheduled])
@pytest.mark.parametrize("unified", ["tied", "frozen"])
def test_what_is_kept_beside_the_network(kind, unified):
    callback, module, count = callback_of(unified), kind("adam"), Count()
    fit(module, callback, count, max_epochs=6, num_sanity_val_steps=0)
    covered = sum(4 * module.get_parameter(name).numel() for name in callback.supports)
    after_step, in_validation = ([x / covered for x in xs] for xs in (count.after_step, count.in_validation))
    assert after_step[0] < 0.02  # dense: the data
    after_step, in_validation = ([x - after_step[0] for x in xs] for xs in (after_step, in_validation))
    assert all(1 < x <= 1.25 for x in after_step[1:4])  # ADMM: V, and some bits a block
    assert all(0.1 < x <= 0.35 for x in after_step[4:])  # retraining
    assert all(2 < x <= 2.25 for x in in_validation[1:4])  # the raw weights are put aside
    assert all(0.1 < x <= 0.35 for x in in_validation[4:])


def callback_of(unified: str) -> WeightUnificationCallback:
    return WeightUnificationCallback(STRUCTURE, phases=PHASES, retraining=Retraining(unified))
