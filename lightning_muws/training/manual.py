"""Modules that optimize by hand and clip for themselves: the penalty must be in the gradient before their clip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


class ClipWatch:
    """Calls ``before`` ahead of a module's own ``clip_gradients``, and remembers for which optimizers it did.

    It sits on the instance, as an attribute, and is gone after :meth:`remove`. A module that calls torch's own clipping
    functions cannot be seen: there the penalty comes after the clip.

    Args:
        module: A LightningModule in manual optimization.
        before: What to do with the optimizer whose gradients will be clipped.
    """

    def __init__(self, module: Any, before: Callable[[Optimizer], None]) -> None:
        self._module, self._before, self._done = module, before, set[int]()
        self._clip = module.clip_gradients
        module.clip_gradients = self._clip_gradients

    def _clip_gradients(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        inner = getattr(optimizer, "optimizer", optimizer)  # Lightning hands out wrapped optimizers
        if id(inner) not in self._done:
            self._done.add(id(inner))
            self._before(inner)
        return self._clip(optimizer, *args, **kwargs)

    def was_before(self, optimizer: Optimizer) -> bool:
        """Return whether the gradients of this step were handled ahead of a clip, and forget it."""
        found = id(optimizer) in self._done
        self._done.discard(id(optimizer))
        return found

    def remove(self) -> None:
        """Give the module its own method back."""
        self._module.__dict__.pop("clip_gradients", None)
