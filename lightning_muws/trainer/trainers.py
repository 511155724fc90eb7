"""What the callback reads from a Trainer and its other callbacks. It finds classes by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_muws.errors import SettingError, StateError
from lightning_muws.structure.plan import clean_name

REFUSED = {
    "DeepSpeedStrategy": "it keeps gradients where they cannot be changed; use strategy='ddp'",
    "FSDPStrategy": "it flattens weights, and blocks with them; use strategy='ddp' or ModelParallelStrategy",
    "StochasticWeightAveraging": "it averages weights of different structures; use WeightAveraging",
    "ModelPruning": "both would write the same weights; leave it out, and give a prune_ratio",
    "LBFGS": "it evaluates the loss inside its step, without the penalty; use another optimizer",
}


def is_a(thing: object, name: str) -> bool:
    """Return whether a class of this name is among the classes of ``thing``, in either Lightning namespace."""
    return any(kind.__name__ == name for kind in type(thing).__mro__)


def refuse(*things: object) -> None:
    """Refuse strategies, callbacks and optimizers with which the method cannot be exact.

    Raises:
        SettingError: A thing is one of them; the message says what to use instead.
    """
    for thing in things:
        for name, why in REFUSED.items():
            if is_a(thing, name):
                raise SettingError(f"WeightUnificationCallback does not work with {type(thing).__name__}: {why}")


def length(trainer: Any, interval: str) -> int | None:
    """Return how many epochs (or optimizer steps) the Trainer runs; None if it runs without end."""
    if interval == "epoch":
        return None if trainer.max_epochs in (None, -1) else int(trainer.max_epochs)
    if trainer.max_steps not in (None, -1):
        return int(trainer.max_steps)
    steps = trainer.estimated_stepping_batches
    return None if math.isinf(steps) else int(steps)


def refuse_namespace(trainer: Any, namespace: str) -> None:
    """Refuse a Trainer of the other namespace, where each isinstance check would silently fail.

    Raises:
        SettingError: The Trainer is of the other namespace; the message says which import to change.
    """
    found = next(kind.__module__ for kind in type(trainer).__mro__ if kind.__name__ == "Trainer")
    found = "pytorch_lightning" if found.startswith("pytorch_lightning.") else "lightning.pytorch"
    if found != namespace:
        home = "lightning_muws" if found == "lightning.pytorch" else "lightning_muws.pytorch_lightning"
        raise SettingError(
            f"this callback is for {namespace}, and the Trainer is of {found}: "
            f"change the import to 'from {home} import WeightUnificationCallback'"
        )


def refuse_ranks_apart(trainer: Any, fingerprint: int) -> None:
    """Check that all ranks chose the same structure.

    Raises:
        StateError: They chose different ones, because their weights differ.
    """
    if trainer.world_size == 1:
        return
    found = trainer.strategy.all_gather(
        torch.tensor(fingerprint, dtype=torch.int64, device=trainer.strategy.root_device)
    )
    if (found != found.flatten()[0]).any():
        raise StateError(
            f"the ranks chose different structures (checksums {found.flatten().tolist()}): their weights differ, so "
            "find what changes weights on one rank only"
        )


def gradient_scale(trainer: Any, optimizer: Optimizer, scaled: bool = False) -> float:
    """Return the factor on the gradients: 1, or the scale of a GradScaler.

    The Trainer removes the scale just before the step; a fused optimizer removes it inside its step.

    Args:
        trainer: The Trainer.
        optimizer: The optimizer whose gradients are meant.
        scaled: Whether the Trainer has not removed the scale yet.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not (scaled or getattr(optimizer, "_step_supports_amp_scaling", False)):
        return 1.0
    return float(scaler.get_scale())


def forgive_early_stopping(trainer: Any) -> None:
    """Reset the count and the best score of each EarlyStopping."""
    for callback in trainer.callbacks:
        if is_a(callback, "EarlyStopping"):
            callback.wait_count, callback.best_score = 0, _worst(callback.mode)


def reset_monitors(trainer: Any) -> list[str]:
    """Reset EarlyStopping and each ModelCheckpoint with a monitor; return the paths of the files they leave on disk."""
    forgive_early_stopping(trainer)
    left: list[str] = []
    for callback in trainer.callbacks:
        if is_a(callback, "ModelCheckpoint") and callback.monitor is not None:
            left += callback.best_k_models
            callback.best_k_models, callback.kth_best_model_path, callback.best_model_path = {}, "", ""
            callback.best_model_score = callback.current_score = None
            callback.kth_value = _worst(callback.mode)
    return left


def reshard(module: Any) -> None:
    """Drop the gathered weights that FSDP2 may keep after a validation: the next training step would use them."""
    for part in module.modules():
        if is_a(part, "FSDPModule"):
            part.reshard()


def averages(trainer: Any) -> bool:
    """Return whether a callback of the Trainer averages weights."""
    return any(is_a(callback, "WeightAveraging") for callback in trainer.callbacks)


def logs_now(trainer: Any, batch_idx: int) -> bool:
    """Return whether the Trainer logs at the end of this batch."""
    every = trainer.log_every_n_steps
    return bool(every) and not trainer.barebones and ((batch_idx + 1) % every == 0 or trainer.is_last_batch)


def reset_averages(trainer: Any) -> None:
    """Restart WeightAveraging: averaging unstructured with structured weights would break the structure."""
    for callback in trainer.callbacks:
        average = getattr(callback, "_average_model", None) if is_a(callback, "WeightAveraging") else None
        if average is not None:
            average.module.load_state_dict(trainer.lightning_module.state_dict())
            average.n_averaged.zero_()


def _worst(mode: str) -> torch.Tensor:
    return torch.tensor(math.inf if mode == "min" else -math.inf)


def put_back(raw: Mapping[str, Tensor], pl_module: Any, state: dict[str, Any]) -> None:
    """Put the raw weights into a state_dict that a checkpoint takes in the middle of a projected validation."""
    for name, _ in pl_module.named_parameters() if raw else ():
        if clean_name(name) in raw:
            state[name] = raw[clean_name(name)].clone()
