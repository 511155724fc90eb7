"""What the callback reads and changes in a Trainer of Hugging Face's transformers. It finds classes by name."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_muws.errors import SettingError, StateError
from lightning_muws.trainer import trainers
from lightning_muws.training.phases import Retraining


def running() -> tuple[Any, str | None]:
    """Return the Trainer whose ``train`` is running, and the checkpoint that it resumes from, or None.

    A Trainer of transformers passes neither to its callbacks, so both are read from the stack of calls.

    Raises:
        StateError: No Trainer is running.
    """
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals
        if "resume_from_checkpoint" in found and trainers.is_a(owner := found.get("self"), "Trainer"):
            checkpoint = found["resume_from_checkpoint"]
            return owner, checkpoint if isinstance(checkpoint, str) else None
        frame = frame.f_back
    raise StateError("no Trainer of transformers is running: give this callback to one, and call its train")


def refuse(trainer: Any, retraining: Retraining) -> None:
    """Refuse what the method cannot be exact with.

    Raises:
        SettingError: The Trainer does that; the message says what to use instead.
    """
    for name, is_on in (("DeepSpeed", trainer.is_deepspeed_enabled), ("FSDP", trainer.is_fsdp_enabled)):
        if is_on:
            raise SettingError(
                f"WeightUnificationCallback does not work with {name} in a Trainer of transformers: use DDP (torchrun) "
                "there, or Lightning with ModelParallelStrategy"
            )
    if trainer.state.is_hyper_param_search:
        raise SettingError("WeightUnificationCallback does not work in hyperparameter_search: call train for each run")
    trainers.refuse(unwrapped(trainer.optimizer))
    if retraining.schedule in ("constant", "cosine") and not isinstance(trainer.lr_scheduler, LambdaLR):
        raise SettingError(
            f"schedule={retraining.schedule!r} cannot replace a {type(trainer.lr_scheduler).__name__}, whose state a "
            "resumed run would load into it: give schedule='module' or 'restart', or another lr_scheduler_type"
        )


def set_rank(trainer: Any) -> None:
    """Tell the messages for rank 0 which rank this is, unless Lightning has done so."""
    if getattr(rank_zero_only, "rank", None) is None:
        rank_zero_only.rank = trainer.args.process_index  # type: ignore[attr-defined]


def unwrapped(optimizer: Any) -> Optimizer:
    """Return the optimizer of torch inside those of accelerate."""
    while trainers.is_a(optimizer, "AcceleratedOptimizer"):
        optimizer = optimizer.optimizer
    found: Optimizer = optimizer
    return found


def gradient_scale(optimizer: Any) -> float:
    """Return the factor on the gradients before they are clipped: 1, or the scale of a GradScaler."""
    scaler = getattr(optimizer, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0


def length(state: Any, interval: str) -> int | None:
    """Return how many epochs (or optimizer steps) the run has; None if its epochs have no end."""
    if interval == "step":
        return int(state.max_steps)
    return None if state.num_train_epochs == sys.maxsize else int(state.num_train_epochs)


def now(state: Any, interval: str) -> float:
    """Return the epoch with its fraction (or the step) that begins."""
    return float(state.global_step if interval == "step" else state.epoch or 0.0)


def refuse_ranks_apart(trainer: Any, fingerprint: int) -> None:
    """Check that all ranks chose the same structure. A collective.

    Raises:
        StateError: They chose different ones, because their weights differ.
    """
    if trainer.args.world_size > 1:
        found = trainer.accelerator.gather(torch.tensor([fingerprint], dtype=torch.int64, device=trainer.args.device))
        if (found != found[0]).any():
            raise StateError(
                f"the ranks chose different structures (checksums {found.tolist()}): their weights differ, so find "
                "what changes weights on one rank only"
            )


def broadcast(thing: Any) -> Any:
    """Return on every rank what rank 0 gave."""
    shared = [thing]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def forget_best(trainer: Any) -> None:
    """Forget the best checkpoint so far: it is of a network without structure."""
    state = trainer.state
    state.best_metric = state.best_model_checkpoint = state.best_global_step = None
    forgive_early_stopping(trainer)


def forgive_early_stopping(trainer: Any) -> None:
    """Reset the patience of each EarlyStoppingCallback."""
    for callback in trainer.callback_handler.callbacks:
        if trainers.is_a(callback, "EarlyStoppingCallback"):
            callback.early_stopping_patience_counter = 0


class Clipping:
    """Call a function before a Trainer clips gradients, until :meth:`remove`.

    The Trainer has a hook after the clip, which is too late: the penalty belongs to the gradient that is clipped. So
    this replaces ``clip_grad_norm_`` of the Trainer's Accelerator, which the Trainer also calls without a clip, for the
    norm that it logs.

    Args:
        accelerator: The Accelerator of the Trainer.
        before: The function.
    """

    def __init__(self, accelerator: Any, before: Callable[[], None]) -> None:
        self._accelerator, self._before, self._clip = accelerator, before, accelerator.clip_grad_norm_
        accelerator.clip_grad_norm_ = self._clip_grad_norm

    def _clip_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self._before()
        return self._clip(*args, **kwargs)

    def remove(self) -> None:
        """Restore the method of the Accelerator."""
        self._accelerator.__dict__.pop("clip_grad_norm_", None)


def begin_schedule(trainer: Any, retraining: Retraining, n_steps: int, resumes: bool = False) -> None:
    """Set up the learning rate of the retraining phase.

    ``restart`` makes the schedule of the Trainer's arguments again, for the length of the phase, with its warmup, and
    keeps the optimizer. A schedule that the user handed to the Trainer cannot be made again: it goes on.

    Args:
        trainer: The Trainer.
        retraining: The settings.
        n_steps: The optimizer steps of the whole retraining phase.
        resumes: Whether the state of this phase's schedule was loaded into the schedule that the Trainer made.
    """
    old, groups = trainer.lr_scheduler, trainer.optimizer.param_groups
    rates, new, kind = [group["lr"] for group in groups], old, retraining.schedule
    is_replaced = kind in ("constant", "cosine") or (kind == "restart" and trainer._created_lr_scheduler)
    if is_replaced:
        for group in groups:
            group["lr"] = group.get("initial_lr", group["lr"])
    if is_replaced and kind == "restart":
        trainer.lr_scheduler = None
        new = trainer.create_scheduler(num_training_steps=n_steps, optimizer=trainer.optimizer)
    elif is_replaced:
        new = LambdaLR(trainer.optimizer, partial(_falling, n_steps=n_steps) if kind == "cosine" else _level)
    if retraining.lr:
        _scale(groups, new, retraining.lr)
    if resumes and new is not old:
        new.load_state_dict(old.state_dict())
    if resumes:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
    trainer.lr_scheduler = trainer.callback_handler.lr_scheduler = new


def _level(step: int) -> float:
    return 1.0


def _falling(step: int, n_steps: int) -> float:
    return (1 + math.cos(math.pi * min(step, n_steps) / n_steps)) / 2


def _scale(groups: list[dict[str, Any]], scheduler: Any, lr: float) -> None:
    """Scale the rates of all groups and of the schedule so that the first group begins at ``lr``."""
    factor = lr / (groups[0].get("initial_lr", groups[0]["lr"]) or 1.0)
    for group in groups:
        group |= {key: group[key] * factor for key in ("lr", "initial_lr") if key in group}
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        scheduler._last_lr = [group["lr"] for group in groups]  # which the Trainer logs
