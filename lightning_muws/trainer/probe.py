"""A validation pass in the middle of a fit, which leaves the fit as it was. It finds classes by name."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muws.errors import SettingError
from lightning_muws.generators import kept_generators
from lightning_muws.structure.budget import Allocation
from lightning_muws.structure.plan import PlanEntry
from lightning_muws.trainer.trainers import is_a, reshard
from lightning_muws.training.drop import Drop, compressed

LOOP = ("_restarting", "_loaded_from_state_dict", "_resuming_from_checkpoint", "_restart_stage", "_has_run")
CONNECTOR = ("_progress_bar_metrics", "_logged_metrics", "_callback_metrics", "_current_fx", "_first_loop_iter")
METRIC = ("_update_count", "_computed", "_forward_cache", "_cache", "_is_synced", "_to_sync", "_should_unsync")
MUTED = ("ProgressBar", "WeightAveraging")  # one would show the pass, the other would swap the weights
HOOKS = [f"on_validation_{when}" for when in ("start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end")]


def refuse_no_validation(trainer: Any) -> None:
    """Check that the Trainer validates.

    Raises:
        SettingError: It has no validation data, or the module has no ``validation_step``.
    """
    if not trainer.enable_validation:
        raise SettingError(
            "max_drop needs a validation, and this fit has none: give the module a validation_step that logs the "
            "monitor, give the Trainer validation data, and leave limit_val_batches above 0"
        )


class Probe:
    """Runs the validation of a Trainer's fit, as its sanity check does, and returns the metrics.

    Other callbacks see a sanity check, which checkpoints, early stopping and loggers ignore. Modes, buffers, metrics,
    progress and random number generators are those of before afterwards.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, Tensor] | None = None  # None where no probe is running

    def read(self, trainer: Any) -> None:
        """Read the metrics if a probe is running: to be called at the end of each validation, before their reset."""
        if self._metrics is None:
            return
        results = _loop(trainer)._results
        before = results.dataloader_idx
        for index in dict.fromkeys(item.meta.dataloader_idx for item in results.values()):
            results.dataloader_idx = index  # else only those of one dataloader are found
            self._metrics |= results.metrics(on_step=False)["callback"]
        results.dataloader_idx = before

    def run(self, trainer: Any, n_batches: float = math.inf) -> dict[str, Tensor]:
        """Return the metrics of the module as it is, on at most so many batches of each dataloader.

        All ranks must call it. They may find different values, as in any validation.
        """
        found: dict[str, Tensor] = {}
        self._metrics = found
        try:
            with _undisturbed(trainer, n_batches):
                _loop(trainer).run()
        finally:
            self._metrics = None
        return found

    def measure(
        self, trainer: Any, drop: Drop, entries: Mapping[str, PlanEntry]
    ) -> Callable[[Allocation | None, float], float]:
        """Return a function of an allocation and a recovery that measures the network compressed by them.

        It returns the metric as the mean over the ranks, the same on all; see
        :func:`lightning_muws.training.drop.compressed`.
        """

        def measured(allocation: Allocation | None, recovery: float) -> float:
            module = trainer.lightning_module
            try:
                with compressed(module, entries, allocation, recovery):
                    reshard(module)
                    value = torch.as_tensor(drop.find(self.run(trainer)), device=trainer.strategy.root_device)
            finally:
                reshard(module)
            return float(trainer.strategy.reduce(value.detach().to(torch.float32, copy=True), reduce_op="mean"))

        return measured


def _loop(trainer: Any) -> Any:
    return trainer.fit_loop.epoch_loop.val_loop


@contextmanager
def _undisturbed(trainer: Any, n_batches: float) -> Iterator[None]:
    """Let a validation run as a sanity check of this length, and put everything back that it changes."""
    loop, connector = _loop(trainer), trainer._logger_connector
    with ExitStack() as after:
        for thing, names in ((loop, LOOP), (connector, CONNECTOR)):
            after.callback(vars(thing).update, {name: _kept(getattr(thing, name)) for name in names})
        after.callback(setattr, loop, "batch_progress", loop.batch_progress)
        after.callback(setattr, trainer.state, "stage", trainer.state.stage)
        for name in ("num_sanity_val_steps", "_last_val_time"):
            after.callback(setattr, trainer, name, getattr(trainer, name, None))
        after.enter_context(kept_generators(_generators(loop)))
        after.enter_context(_kept_state(trainer.lightning_module))
        for callback in trainer.callbacks:
            if any(is_a(callback, name) for name in MUTED):
                after.enter_context(_muted(callback))
        loop._restarting = False
        loop.batch_progress = copy.deepcopy(loop.batch_progress)
        loop.batch_progress.reset()
        connector.reset_metrics()
        connector._first_loop_iter = connector._current_fx = None
        trainer.num_sanity_val_steps = n_batches
        trainer.sanity_checking = True
        yield


@contextmanager
def _muted(callback: Any) -> Iterator[None]:
    """Let a callback's validation hooks do nothing; it stays in the Trainer's list, where its threads look for it."""
    vars(callback).update(dict.fromkeys(HOOKS, _nothing))
    try:
        yield
    finally:
        for name in HOOKS:
            del vars(callback)[name]


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _kept(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def _generators(loop: Any) -> list[torch.Generator]:
    """Return the random number generators of the validation's dataloaders."""
    loaders = loop._combined_loader.flattened if loop._combined_loader is not None else []
    found = [getattr(thing, "generator", None) for x in loaders for thing in (x, getattr(x, "sampler", None))]
    return [generator for generator in found if isinstance(generator, torch.Generator)]


@contextmanager
@torch.no_grad()
def _kept_state(module: nn.Module) -> Iterator[None]:
    """Put back the buffers and the metrics of a module, in the same objects."""
    buffers = [
        (part, name, x, x.clone()) for part in module.modules() for name, x in part._buffers.items() if x is not None
    ]
    metrics = [(part, _metric_state(part)) for part in module.modules() if is_a(part, "Metric")]
    try:
        yield
    finally:
        for part, name, x, value in buffers:
            part._buffers[name] = x.copy_(value)
        for part, state in metrics:
            vars(part).update(state)


def _metric_state(metric: nn.Module) -> dict[str, Any]:
    names = [*getattr(metric, "_defaults", {}), *METRIC]
    return {name: copy.deepcopy(vars(metric)[name]) for name in names if name in vars(metric)}
