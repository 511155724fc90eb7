"""One of two processes of test_drop: max_drop under DDP or FSDP2, with other validation data on each rank."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lightning_muws import WeightUnificationCallback
from lightning_muws.structure.sharded import whole
from tests.support.budget_worker import Ranked, strategy
from tests.support.explicit import PHASES
from tests.support.modules import fit


class Seen(Ranked):
    """Keeps the value that its last validation logged on this rank."""

    def validation_step(self, batch, batch_idx):
        self.last = float(self.loss(self(batch)))
        super().validation_step(batch, batch_idx)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    module, file = Seen(), folder / "m.muws"
    callback = WeightUnificationCallback(max_drop=0.05, monitor="val_loss", phases=PHASES, save_to=file)
    fit(module, callback, max_epochs=6, strategy=strategy(), devices=2)
    callback.verify()
    results = {
        "drop": vars(callback.drop),
        "plan": str(callback.plan),
        "last": module.last,
        "final": {name: whole(p.detach()).clone() for name, p in module.named_parameters()},
        "file_ratio": callback.saved.compression_ratio if callback.saved else 0,
    }
    torch.save(results, folder / f"{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    if dist.is_initialized():  # or its threads may still run when the interpreter is gone, and abort the process
        dist.barrier()
        dist.destroy_process_group()
