"""One of two processes of test_compression: a budget under DDP or FSDP2, with other data, and other buffers, a rank."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_muws import MicroStructure, WeightUnificationCallback
from lightning_muws.structure.sharded import whole
from tests.support.explicit import PHASES
from tests.support.modules import TwoLayers, fit

IS_SHARDED = os.environ.get("STRATEGY") == "fsdp"


class Ranked(TwoLayers):
    """Has a norm whose running statistics differ between ranks."""

    def __init__(self) -> None:
        super().__init__("adam")
        self.layer = nn.Sequential(
            nn.Linear(32, 96), nn.BatchNorm1d(96), nn.Tanh(), nn.Linear(96, 50), nn.Linear(50, 7)
        )
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2

    def configure_model(self) -> None:
        if IS_SHARDED and not isinstance(self.layer[0].weight, DTensor):
            for part in self.layer:
                if list(part.parameters()):
                    fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def train_dataloader(self):
        data = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))
        return torch.utils.data.DataLoader(data, batch_size=4)


def strategy() -> Strategy:
    """Return DDP, or FSDP2 where the environment asks for it."""
    if IS_SHARDED:
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    return DDPStrategy(process_group_backend="gloo")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    module, file = Ranked(), folder / "m.muws"
    structure = MicroStructure("auto", unify_ratio=(0.1, 1.0))
    callback = WeightUnificationCallback(structure, compression=6, phases=PHASES, save_to=file)
    fit(module, callback, max_epochs=6, strategy=strategy(), devices=2)
    callback.verify()
    final = {name: whole(p.detach()).clone() for name, p in module.named_parameters()}
    buffers = sum(x.nbytes for x in module.buffers())
    results = {
        "plan": str(callback.plan),
        "final": final,
        "rounded": sorted(callback._run.rounding.steps),
        "wrote": callback.saved is not None,
        "file_ratio": (sum(x.nbytes for x in final.values()) + buffers) / file.stat().st_size if callback.saved else 0,
    }
    torch.save(results, folder / f"{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    if dist.is_initialized():  # or its threads may still run when the interpreter is gone, and abort the process
        dist.barrier()
        dist.destroy_process_group()
