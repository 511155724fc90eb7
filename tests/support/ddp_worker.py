"""One of two processes of test_ranks: trains each case with and without the callback and saves what came out."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_muws import WeightUnificationCallback
from lightning_muws.errors import StateError
from tests.support.explicit import PENALTY, PHASES, Explicit, Snapshot
from tests.support.modules import STRUCTURE, Probe, TwoLayers, fit


class Unused(TwoLayers):
    """Has a layer that no batch ever goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(32, 16)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)["loss"]


class ExplicitUnused(Explicit, Unused):
    covered = ("layer.0.weight", "layer.2.weight", "unused.weight")

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.penalty()


CASES = {
    "plain": {},
    "accumulate": {"accumulate_grad_batches": 3},
    "clip": {"gradient_clip_val": 0.05},
    "accumulate, clip, bucket view": {"accumulate_grad_batches": 4, "gradient_clip_val": 0.05},
}


class Apart(Callback):
    """Lets one rank's weights differ."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2 and trainer.global_rank == 1:
            pl_module.layer[0].weight.data[0] += 1.0


ON = {"accelerator": os.environ.get("ACCELERATOR", "cpu"), "devices": 2}
BACKEND = "gloo" if ON["accelerator"] == "cpu" else "nccl"


def ddp(name: str) -> DDPStrategy:
    return DDPStrategy(
        find_unused_parameters=True, gradient_as_bucket_view="bucket" in name, process_group_backend=BACKEND
    )


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results = {}
    for name, options in CASES.items():
        torch.manual_seed(0)
        explicit, module = ExplicitUnused(), Unused()
        module.load_state_dict(explicit.state_dict())
        callback, last = (
            WeightUnificationCallback(STRUCTURE, phases=PHASES, penalty=PENALTY, save_to=folder / f"{name}.muws"),
            Snapshot(),
        )
        probe = Probe(callback)
        common = {**ON, "precision": "64-true", **options}
        fit(module, last, callback, probe, max_epochs=7, strategy=ddp(name), **common)
        fit(explicit, max_epochs=4, strategy=ddp(name), **common)
        results[name] = {
            "after admm": last.weights,
            "v": last.v,
            "explicit": {n: p.detach().cpu().clone() for n, p in explicit.named_parameters()},
            "final": {n: p.detach().cpu().clone() for n, p in module.named_parameters()},
            "kinds": {n: s.kinds.cpu() for n, s in callback.supports.items()},
            "history": [vars(update) for update in callback.history],
            "checked": probe.n_checked,
            "wrote": callback.saved is not None,
            "file": str(folder / f"{name}.muws"),
        }
    try:
        fit(
            Unused(),
            Apart(),
            WeightUnificationCallback(STRUCTURE, phases=PHASES),
            max_epochs=7,
            strategy=ddp(""),
            **ON,
        )
    except StateError as error:
        results["apart"] = str(error)
    torch.save(results, folder / f"{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    if dist.is_initialized():  # or its threads may still run when the interpreter is gone, and abort the process
        dist.barrier()
        dist.destroy_process_group()
