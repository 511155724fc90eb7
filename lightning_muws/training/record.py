"""What a saved state depends on: weights, grids and structures, recorded in the state and compared on resuming."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_muws.errors import StateError
from lightning_muws.structure.plan import PlanEntry

Record = dict[str, Any]
"""Settings as plain values: strings, numbers, lists and dicts with string keys."""


def record(entries: Mapping[str, PlanEntry]) -> dict[str, Record]:
    """Return the shape, grid and structure of each weight, by name, as plain values."""
    return {
        name: {"shape": list(entry.shape), "grid": plain(entry.grid), "structure": plain(entry.structure)}
        for name, entry in entries.items()
    }


def plain(value: object) -> Any:
    """Return a setting as plain values; a dataclass as a dict of its fields with its class name under ``type``.

    Example:
        >>> from lightning_muws import Retraining
        >>> plain(Retraining())
        {'type': 'Retraining', 'unified': 'tied', 'schedule': 'restart', 'lr': 0.0}
    """
    if dataclasses.is_dataclass(value):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, (tuple, list)):
        return [plain(x) for x in value]
    return value if value is None or type(value) in (bool, int, float, str) else repr(value)


def refuse_differences(saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Check that two records are equal.

    Raises:
        StateError: They differ; the message has the first five differences, with both values.
    """
    found = list(_differences(saved, given, ""))
    if found:
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise StateError(
            f"the checkpoint does not fit the settings: {'; '.join(found[:5])}{more}. Resume with the settings of the "
            "checkpoint, or begin a new fit from its weights alone"
        )


def _differences(saved: Mapping[str, Any], given: Mapping[str, Any], path: str) -> Iterator[str]:
    for key in [*saved, *(key for key in given if key not in saved)]:
        where = f"{path} {key}".lstrip()
        if key not in given:
            yield f"the checkpoint has {where}, the settings have not"
        elif key not in saved:
            yield f"the settings have {where}, the checkpoint has not"
        elif isinstance(saved[key], Mapping) and isinstance(given[key], Mapping):
            yield from _differences(saved[key], given[key], where)
        elif saved[key] != given[key]:
            yield f"{where} is {saved[key]!r} in the checkpoint and {given[key]!r} in the settings"


def on_device(saved: Mapping[str, Tensor], weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return copies of a weight's saved tensors on that weight's device, those of floating point in a dtype."""
    return {
        key: x.to(weight.device, dtype if x.dtype.is_floating_point else x.dtype, copy=True) for key, x in saved.items()
    }
