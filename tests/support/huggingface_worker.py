"""One of two processes of test_huggingface: trains by DDP through accelerate, is killed and resumed."""

import contextlib
import os
import sys
from pathlib import Path

import torch

from lightning_muws.transformers import WeightUnificationCallback
from tests.support.huggingface import (
    PENALTY,
    PHASES,
    STRUCTURE,
    Explicit,
    ExplicitTrainer,
    Kill,
    Killed,
    Snapshot,
    net,
    trainer,
)

DDP = {"ddp_backend": "gloo", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 0.05}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = os.environ["RANK"] = os.environ["LOCAL_RANK"]
    explicit, model, snapshot, reference = net(), net(), Snapshot(), Snapshot()
    trainer(folder / "explicit", explicit, Explicit(explicit), reference, kind=ExplicitTrainer, **DDP).train()
    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES, penalty=PENALTY, save_to=folder / "model.muws")
    trainer(folder / "whole", model, callback, snapshot, **DDP).train()
    callback.verify()
    saves = {"save_strategy": "steps", "save_steps": 5}
    options = {"phases": PHASES, "penalty": PENALTY}
    with contextlib.suppress(Killed):
        trainer(folder / "cut", net(), WeightUnificationCallback(STRUCTURE, **options), Kill(7), **DDP, **saves).train()
    resumed, again = net(), WeightUnificationCallback(STRUCTURE, **options)
    trainer(folder / "cut", resumed, again, **DDP, **saves).train(str(folder / "cut" / "checkpoint-5"))
    again.verify()
    torch.save(
        {
            "explicit": reference.weights,
            "after admm": snapshot.weights,
            "whole": model.state_dict(),
            "resumed": resumed.state_dict(),
            "printed": callback.report is not None,
            "saved": callback.saved is not None,
        },
        folder / f"{rank}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
