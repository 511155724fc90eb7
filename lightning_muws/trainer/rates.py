"""The learning rate of the retraining phase. Reads and writes a Trainer, and imports no Lightning by name."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_muws.errors import SettingError
from lightning_muws.training.phases import Retraining

OF_GROUP = ("lr", "initial_lr", "max_lr", "min_lr")  # the rates that schedulers keep in an optimizer's groups


def refuse(trainer: Any, retraining: Retraining) -> None:
    """Refuse ``constant`` and ``cosine`` where Lightning steps no schedules, and ``cosine`` in a run without an end.

    Raises:
        SettingError: The schedule is refused; the message says what to give.
    """
    if retraining.schedule == "cosine" and trainer.max_epochs in (None, -1) and trainer.max_steps in (None, -1):
        raise SettingError(
            "schedule='cosine' falls until the end of the run, and this run has none: give the Trainer max_epochs or "
            "max_steps, or give schedule='constant'"
        )
    if retraining.schedule in ("constant", "cosine") and not trainer.lightning_module.automatic_optimization:
        raise SettingError(
            f"schedule={retraining.schedule!r} needs a Trainer that steps schedules, and in manual optimization the "
            "module does: give schedule='module' or 'restart', with an lr if you like"
        )


@dataclass(frozen=True)
class Beginning:
    """Where in a fit retraining began.

    Args:
        epoch: Completed epochs.
        step: Completed optimizer steps.
        length: Remaining optimizer steps.
    """

    epoch: int = 0
    step: int = 0
    length: int = 0

    @classmethod
    def now(cls, trainer: Any) -> Beginning:
        """Return the beginning at this moment; the length is 1 in a run without an end, where nothing uses it."""
        epoch, step = trainer.current_epoch, trainer.global_step
        with _shortened(trainer, epoch, step):
            length = trainer.estimated_stepping_batches
        return cls(epoch, step, max(1, length) if math.isfinite(length) else 1)


def begin(trainer: Any, retraining: Retraining, began: Beginning) -> None:
    """Set up the learning rate of the retraining phase, also when a run resumes in it.

    ``restart``: the module configures its optimizers again, and sees a Trainer as long as the retraining phase; if the
    Trainer steps no schedule, nothing changes. ``constant`` and ``cosine`` replace the module's schedules and keep its
    optimizers. ``module`` changes nothing.

    Args:
        trainer: The Trainer, in fit. Its data is not read, because its state may not be restored yet.
        retraining: The settings.
        began: Where retraining began.
    """
    strategy, automatic = trainer.strategy, trainer.lightning_module.automatic_optimization
    if retraining.schedule == "restart" and automatic and strategy.lr_scheduler_configs:
        with _shortened(trainer, began.epoch, began.step):
            strategy.setup_optimizers(trainer)
            strategy.setup_precision_plugin()
    if retraining.schedule in ("constant", "cosine"):
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.get("initial_lr", group["lr"])
        cosines = trainer.optimizers if retraining.schedule == "cosine" else []
        strategy.lr_scheduler_configs = [_cosine(trainer, optimizer, began.length) for optimizer in cosines]
    if retraining.lr:
        _scale(trainer, retraining.lr)


def _cosine(trainer: Any, optimizer: Optimizer, length: int) -> Any:
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    # the class of the Trainer's own namespace, lightning.pytorch or pytorch_lightning
    types = importlib.import_module(type(trainer).__module__.split(".trainer")[0] + ".utilities.types")
    return types.LRSchedulerConfig(CosineAnnealingLR(optimizer, length), interval="step")


def _scale(trainer: Any, lr: float) -> None:
    """Scale the rates of all groups and of their schedules so that the first group begins at ``lr``."""
    for optimizer in trainer.optimizers:
        first = optimizer.param_groups[0]
        factor = lr / (first.get("initial_lr", first["lr"]) or 1.0)
        for group in optimizer.param_groups:
            group |= {key: group[key] * factor for key in OF_GROUP if key in group}
        for config in trainer.strategy.lr_scheduler_configs:
            if config.scheduler.optimizer is optimizer and hasattr(config.scheduler, "base_lrs"):
                config.scheduler.base_lrs = [rate * factor for rate in config.scheduler.base_lrs]


@contextmanager
def _shortened(trainer: Any, epoch: int, step: int) -> Iterator[None]:
    """Subtract the completed epochs and steps from the Trainer's length while rates are set up."""
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
