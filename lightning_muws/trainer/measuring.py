"""The times of layers: measured on rank 0 by a timer that the callback hands in, and the same on all ranks.

The timer needs one input of the network, as it is called in use.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import IterableDataset

from lightning_muws.errors import MuwsError, SettingError
from lightning_muws.structure.plan import PlanEntry
from lightning_muws.structure.sharded import is_sharded
from lightning_muws.structure.speed import NetworkTimes

Timer = Callable[..., NetworkTimes]  # (module, example_input, entries, say)
ADVICE = "set example_input_array in the LightningModule to what its forward takes, with the batch size of use"


def measure(timer: Timer, trainer: Any, pl_module: Any, entries: Mapping[str, PlanEntry]) -> NetworkTimes:
    """Return what the layers take on the machine of rank 0. A collective.

    Args:
        timer: Measures the times.
        trainer: The Trainer.
        pl_module: The module.
        entries: The covered weights, by name.

    Raises:
        SettingError: The weights are sharded, or rank 0 finds no input to measure with.
    """
    if sharded := [name for name, p in pl_module.named_parameters() if is_sharded(p)]:
        raise SettingError(
            f"speedup cannot be measured with sharded weights, such as {sharded[0]}: use strategy='ddp', or choose the "
            "structures before, with CompressionRun and layer_times, and give them as rules"
        )
    found: NetworkTimes | Exception | None = None
    if trainer.is_global_zero:
        rank_zero_info("muws: timing the layers with pruned blocks on this machine")
        try:
            found = timer(
                pl_module, example_of(trainer, pl_module), entries, lambda line: rank_zero_info(f"muws: {line}")
            )
        except Exception as error:  # the other ranks wait: they must hear of it
            found = error
    shared = found if not isinstance(found, Exception) or isinstance(found, MuwsError) else SettingError(str(found))
    if trainer.world_size > 1:
        shared = trainer.strategy.broadcast(shared)
    if isinstance(found, Exception):
        raise found
    if isinstance(shared, Exception):
        raise shared
    assert shared is not None  # noqa: S101  rank 0 has times or an error
    return shared


def example_of(trainer: Any, pl_module: Any) -> Any:
    """Return an input of the module: its ``example_input_array``, or the part of a training sample that forward takes.

    The sample is the first one of the dataset, collated alone. Random numbers that it draws are given back.

    Returns:
        A tensor, a tuple of arguments, or a dict of keyword arguments, on the module's device.

    Raises:
        SettingError: There is no such input.
    """
    if (example := pl_module.example_input_array) is not None:
        return _on(pl_module.device, example)
    with _same_random_numbers():
        batch = _on(pl_module.device, _sample(trainer.train_dataloader))
        trial = copy.deepcopy(pl_module).eval()
        for args, kwargs in _calls(batch):
            try:
                with torch.no_grad():
                    trial(*args, **kwargs)
            except Exception:  # noqa: S112  forward is arbitrary code: what it does not take raises anything
                continue
            return kwargs or args
    raise SettingError(f"forward takes no part of a training sample, so its layers cannot be timed: {ADVICE}")


def _sample(loader: Any) -> Any:
    """Return the first sample of a loader's dataset as a batch of one.

    Raises:
        SettingError: The loader has no dataset with an index, or its first sample cannot be read.
    """
    dataset: Any = getattr(loader, "dataset", None)
    collate = getattr(loader, "collate_fn", None)
    if not hasattr(dataset, "__getitem__") or isinstance(dataset, IterableDataset) or collate is None:
        raise SettingError(f"the training data has no first sample to time the layers with: {ADVICE}")
    try:
        sample = dataset[0]
        if loader.batch_sampler is not None:
            return collate([sample])
        return apply_to_collection(collate(sample), Tensor, lambda x: x[:1] if x.dim() else x)  # a whole batch
    except Exception as error:
        raise SettingError(f"the first sample of the training data cannot be read ({error!r}): {ADVICE}") from error


def _calls(batch: Any) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield what forward may take of a batch, as arguments and keyword arguments, the likeliest first."""
    if isinstance(batch, Mapping):
        yield (), dict(batch)
    if isinstance(batch, (tuple, list)) and batch:
        yield (batch[0],), {}
        yield tuple(batch), {}
    yield (batch,), {}


def _on(device: torch.device, batch: Any) -> Any:
    return apply_to_collection(batch, Tensor, lambda x: x.to(device))


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    state = random.getstate()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(state)
