"""One of several processes of test_resize: begins a run, or goes on from a checkpoint that more processes wrote."""

import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_muws import MicroStructure, WeightUnificationCallback
from lightning_muws.structure.sharded import whole
from tests.support.explicit import PHASES
from tests.support.fsdp_worker import Sharded
from tests.support.modules import fit

STRATEGIES = ("ddp", "fsdp")
EPOCHS = 7


def strategy(name: str, n_ranks: int):
    if n_ranks == 1:
        return "auto"
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    return ModelParallelStrategy(
        data_parallel_size=n_ranks,
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,
        process_group_backend="gloo",
    )


class Loaded(Callback):
    """Keeps what a checkpoint brought back, before the first step."""

    def __init__(self, callback: WeightUnificationCallback) -> None:
        self.callback = callback

    def on_train_start(self, trainer, pl_module) -> None:
        self.weights = {name: whole(p.detach()).clone() for name, p in pl_module.named_parameters()}
        self.state = copy.deepcopy(self.callback.state_dict())


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    n_ranks, start = int(os.environ["RANKS"]), os.environ.get("FROM")
    results = {}
    for name in STRATEGIES:
        os.environ["SHARDED"] = str(int(name == "fsdp" and n_ranks > 1))
        module = Sharded("adam")
        callback = WeightUnificationCallback(MicroStructure((4, 2), 0.4, 0.3), phases=PHASES)
        saver = ModelCheckpoint(folder / name, filename="{epoch}", save_top_k=-1)
        options = {"max_epochs": EPOCHS, "limit_val_batches": 0, "enable_checkpointing": True}
        options |= {"devices": n_ranks, "strategy": strategy(name, n_ranks), "use_distributed_sampler": False}
        loaded = Loaded(callback)
        fit(module, callback, saver, loaded, ckpt_path=start and start.format(name), **options)
        callback.verify()
        results[name] = {
            "weights": {key: whole(p.detach()).clone() for key, p in module.named_parameters()},
            "kinds": {key: support.kinds for key, support in callback.supports.items()},
            "loaded": (loaded.weights, loaded.state),
            "key": callback.state_key,
            "history": [tuple(vars(update).values()) for update in callback.history],
        }
    torch.save(results, folder / f"{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    if dist.is_initialized():  # or its threads may still run when the interpreter is gone, and abort the process
        dist.barrier()
        dist.destroy_process_group()
