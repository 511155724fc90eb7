"""Calibration batches: how each is given to a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_muws.errors import SettingError

Forward = Callable[[nn.Module, Any], object]


def read_batches(calibration: object, device: torch.device) -> list[Any]:
    """Return the calibration batches as a list, their tensors on a device.

    Raises:
        SettingError: There are none, or it is no iterable of batches.
    """
    if isinstance(calibration, (Tensor, Mapping, str)) or not isinstance(calibration, Iterable):
        raise SettingError(
            f"calibration is a {type(calibration).__name__}: give an iterable of batches, such as a list of tensors "
            "or a DataLoader"
        )
    found = [tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, _plain(batch)) for batch in calibration]
    if not found:
        raise SettingError("calibration has no batches: give at least one, or None to compress without data")
    return found


def feed(model: nn.Module, batch: Any) -> object:
    """Return the output of a model for a batch: a tensor, a tuple or list of arguments, or a dict of named ones.

    Entries of a tuple beyond what ``forward`` accepts are left out, so that ``(images, labels)`` of a DataLoader feeds
    a model whose ``forward`` has one argument.

    Example:
        >>> feed(nn.Identity(), (torch.ones(2), "label"))
        tensor([1., 1.])
    """
    if isinstance(batch, dict):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch[: _most_arguments(model)])
    return model(batch)


def _plain(batch: Any) -> Any:
    """Return a mapping as a dict: tokenizers have mappings of their own."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def _most_arguments(model: nn.Module) -> int | None:
    """Return how many positional arguments ``forward`` accepts; None for any number."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
