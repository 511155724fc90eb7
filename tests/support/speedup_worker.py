"""One of two processes of test_speedup: each rank would measure other times, and the first one's hold."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from lightning_muws import WeightUnificationCallback
from lightning_muws.errors import MuwsError
from tests.support.clocks import fake_times
from tests.support.explicit import PHASES
from tests.support.modules import TwoLayers, fit

RANK = int(os.environ.get("LOCAL_RANK", "0"))


def train(module: TwoLayers, timer, speedup: float) -> WeightUnificationCallback:
    callback = WeightUnificationCallback(speedup=speedup, phases=PHASES)
    callback.timer = timer
    fit(module, callback, max_epochs=6, strategy=DDPStrategy(process_group_backend="gloo"), devices=2)
    return callback


def failure(timer, speedup: float) -> str:
    try:
        train(TwoLayers("adam", 48), timer, speedup)
    except (ValueError, MuwsError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    timed = []

    def timer(module, example_input, entries, say):
        timed.append(RANK)
        times = fake_times(module, example_input, entries, say)
        for i, name in enumerate(times.layers):  # another machine: other layers are slow there
            if i % 2 == RANK:
                times.layers[name] = fake_times(module, example_input, entries, speed=0.5).layers[name]
        return times

    def broken(*_):
        raise ValueError("no clock here")

    module = TwoLayers("adam", 48)
    callback = train(module, timer, 2.0)
    callback.verify()
    results = {
        "plan": str(callback.plan),
        "predicted": callback.report.predicted_speedup,
        "timed": len(timed),
        "final": {name: p.detach().clone() for name, p in module.named_parameters()},
        "refused": failure(timer, 900.0),
        "failed": failure(broken, 2.0),
    }
    torch.save(results, folder / f"{RANK}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    if dist.is_initialized():  # or its threads may still run when the interpreter is gone, and abort the process
        dist.barrier()
        dist.destroy_process_group()
