"""The learning rate of the retraining phase. Reads and writes a Trainer, and imports no Lightning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def restart(trainer: Any, epoch: int, step: int) -> None:
    """Let the module's learning-rate schedules begin anew, over what is left of the run.

    The module configures its optimizers once more, and sees as the Trainer's length what follows epoch ``epoch`` and
    step ``step``, where retraining began. Nothing happens where the Trainer steps no schedule: without schedulers, and
    in manual optimization.

    Args:
        trainer: The Trainer, in fit.
        epoch: Epochs that were over when retraining began.
        step: Optimizer steps that were done when retraining began.
    """
    strategy = trainer.strategy
    if not strategy.lr_scheduler_configs or not trainer.lightning_module.automatic_optimization:
        return
    with _shortened(trainer, epoch, step):
        strategy.setup_optimizers(trainer)
        strategy.setup_precision_plugin()


@contextmanager
def _shortened(trainer: Any, epoch: int, step: int) -> Iterator[None]:
    """Take what is over off the Trainer's length, for as long as optimizers are configured."""
    loop = trainer.fit_loop
    epochs, steps = loop.max_epochs, loop.epoch_loop.max_steps
    try:
        if epochs not in (None, -1):
            loop.max_epochs = max(1, epochs - epoch)
        if steps not in (None, -1):
            loop.epoch_loop.max_steps = max(1, steps - step)
        yield
    finally:
        loop.max_epochs, loop.epoch_loop.max_steps = epochs, steps
