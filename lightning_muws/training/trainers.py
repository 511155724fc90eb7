"""What the callback asks of a Trainer and of its other callbacks. Reads classes by name, so it imports no Lightning."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_muws.errors import SettingError

REFUSED = {
    "DeepSpeedStrategy": "it keeps gradients where they cannot be changed; use strategy='ddp'",
    "FSDPStrategy": "it flattens weights, and blocks with them; use strategy='ddp'",
    "ModelParallelStrategy": "sharded weights are not supported yet; use strategy='ddp'",
    "StochasticWeightAveraging": "it averages weights of different structures; use WeightAveraging",
    "LBFGS": "it evaluates the loss inside its step, without the penalty; use another optimizer",
}


def is_a(thing: object, name: str) -> bool:
    """Return whether a class of this name is among the classes of ``thing``, in either Lightning namespace."""
    return any(kind.__name__ == name for kind in type(thing).__mro__)


def refuse(*things: object) -> None:
    """Refuse strategies, callbacks and optimizers that the method cannot be exact with.

    Raises:
        SettingError: One of them is such; says what to use instead.
    """
    for thing in things:
        for name, why in REFUSED.items():
            if is_a(thing, name):
                raise SettingError(f"WeightUnificationCallback does not work with {type(thing).__name__}: {why}")


def length(trainer: Any, interval: str) -> int | None:
    """Return how many epochs (or steps) the Trainer runs; None if it runs without end."""
    if interval == "epoch":
        return None if trainer.max_epochs in (None, -1) else int(trainer.max_epochs)
    if trainer.max_steps not in (None, -1):
        return int(trainer.max_steps)
    steps = trainer.estimated_stepping_batches
    return None if math.isinf(steps) else int(steps)


def gradient_scale(trainer: Any, optimizer: Optimizer) -> float:
    """Return what the gradients are multiplied with at this moment: 1, but for a fused optimizer with a GradScaler."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())


def forgive_early_stopping(trainer: Any) -> None:
    """Let each EarlyStopping start counting anew."""
    for callback in trainer.callbacks:
        if is_a(callback, "EarlyStopping"):
            callback.wait_count, callback.best_score = 0, _worst(callback.mode)


def reset_monitors(trainer: Any) -> list[str]:
    """Let EarlyStopping and monitoring ModelCheckpoints judge from here on; return the files they leave behind."""
    forgive_early_stopping(trainer)
    left: list[str] = []
    for callback in trainer.callbacks:
        if is_a(callback, "ModelCheckpoint") and callback.monitor is not None:
            left += callback.best_k_models
            callback.best_k_models, callback.kth_best_model_path, callback.best_model_path = {}, "", ""
            callback.best_model_score = callback.current_score = None
            callback.kth_value = _worst(callback.mode)
    return left


def _worst(mode: str) -> torch.Tensor:
    return torch.tensor(math.inf if mode == "min" else -math.inf)
