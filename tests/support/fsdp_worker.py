"""One of two processes of test_shards: a whole life under FSDP2, on the CPU, with weights sharded over both."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_muws import MicroStructure, Retraining, WeightUnificationCallback
from lightning_muws.structure.sharded import whole
from tests.support.explicit import PHASES
from tests.support.modules import OPTIMIZERS, TwoLayers, fit


class Sharded(TwoLayers):
    """Three layers: blocks of the first end where shards do, those of the others straddle ranks."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        generator = torch.Generator().manual_seed(1)
        self.layer = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 18), nn.Tanh(), nn.Linear(18, 7))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2

    def configure_model(self) -> None:
        if os.environ["SHARDED"] == "1" and not isinstance(self.layer[0].weight, DTensor):
            for part in self.layer:
                if isinstance(part, nn.Linear):
                    fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def train_dataloader(self):
        # the same batches on every rank, so that two ranks do what one process does
        return torch.utils.data.DataLoader(
            torch.randn(16, 32, generator=torch.Generator().manual_seed(2)), batch_size=2, sampler=range(16)
        )

    def configure_optimizers(self):
        return OPTIMIZERS[self.optimizer](self.parameters())


class Watch(Callback):
    """Checks the constraint with == after each step, and that V and the moments stay sharded."""

    def __init__(self, callback: WeightUnificationCallback) -> None:
        self.callback, self.errors, self.sharded, self.kinds = callback, [], [], []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        run, weights = self.callback._run, dict(pl_module.named_parameters())
        self.errors += [support.error(whole(weights[name].detach())) for name, support in run.supports.items()]
        if run.method:
            self.sharded += [isinstance(split.v, DTensor) for split in run.method._splits.values()]
        if os.environ["SHARDED"] == "1" and (engine := run.constraint or run.method):
            # blocks of the first layer end where shards do: half of the choice is this rank's
            self.kinds += [support.kinds.shape[0] for support, _ in [engine.choices()["layer.0.weight"]]]
        run.load_state_dict(run.state_dict())  # saved whole and loaded again after every step
        for weight, state in trainer.optimizers[0].state.items():
            moments = [m for m in state.values() if isinstance(m, torch.Tensor) and m.shape == weight.shape]
            self.sharded += [isinstance(moment, DTensor) for moment in moments]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results = {}
    for unified in ("tied", "frozen"):
        for optimizer in ("sgd", "adam"):
            module = Sharded(optimizer)
            structure, retraining = MicroStructure((4, 2), 0.4, 0.3), Retraining(unified)
            file = folder / f"{unified}-{optimizer}.muws"
            callback = WeightUnificationCallback(structure, phases=PHASES, retraining=retraining, save_to=file)
            watch, options = Watch(callback), {"max_epochs": 7, "limit_val_batches": 1}
            if os.environ["SHARDED"] == "1":
                strategy = ModelParallelStrategy(
                    data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
                )
                options |= {"strategy": strategy, "devices": 2, "use_distributed_sampler": False}
            fit(module, callback, watch, **options)
            results[unified, optimizer] = {
                "weights": {name: whole(p.detach()).clone() for name, p in module.named_parameters()},
                "kinds": {name: support.kinds for name, support in callback.supports.items()},
                "errors": watch.errors,
                "sharded": watch.sharded,
                "rows": watch.kinds,
                "file": str(file),
                "history": [tuple(vars(update).values()) for update in callback.history],
            }
    torch.save(results, folder / f"{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    if dist.is_initialized():  # or its threads may still run when the interpreter is gone, and abort the process
        dist.barrier()
        dist.destroy_process_group()
