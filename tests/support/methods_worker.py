"""One of two processes of test_methods: each training method under DDP and under FSDP2, on the same batches."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_muws import MicroStructure, Penalty, Phases, WeightUnificationCallback
from lightning_muws.structure.sharded import whole
from tests.support.fsdp_worker import Sharded
from tests.support.modules import fit

METHODS = {"soft": Penalty(rho=50), "straight_through": Penalty(), "straight_through+admm": Penalty(rho=0.1)}
STRATEGIES = {
    "0": lambda: DDPStrategy(process_group_backend="gloo"),
    "1": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"),
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results = {}
    for method, penalty in METHODS.items():
        module, file = Sharded("adam"), folder / f"{method}.muws"
        phases = Phases(admm_start=1, admm_end=5, update_every=1, method=method)
        callback = WeightUnificationCallback(
            MicroStructure((4, 2), 0.4, 0.3), phases=phases, penalty=penalty, save_to=file
        )
        options = {"strategy": STRATEGIES[os.environ["SHARDED"]](), "devices": 2, "use_distributed_sampler": False}
        fit(module, callback, max_epochs=6, limit_val_batches=1, **options)
        callback.verify()
        results[method] = {
            "weights": {name: whole(p.detach()).clone() for name, p in module.named_parameters()},
            "kinds": {name: support.kinds for name, support in callback.supports.items()},
            "history": [tuple(vars(update).values()) for update in callback.history],
            "file": str(file),
        }
    torch.save(results, folder / f"{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    if dist.is_initialized():  # or its threads may still run when the interpreter is gone, and abort the process
        dist.barrier()
        dist.destroy_process_group()
